"""lib/loss.py: the plain losses, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import token_loss as plain
from lib.loss import chunked_cross_entropy
from toys import V, close, make, random_ids


def head(weight):
    return lambda hidden: F.linear(hidden, weight)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_chunked_loss_is_the_plain_loss(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 8, generator=generator), torch.randn(V, 8, generator=generator)
    targets, results = random_ids(10), []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = (chunked_cross_entropy if chunked else plain)(head(w), h, targets, *([chunk_size] if chunked else []))
        (3 * loss).backward()
        results.append((loss, h.grad, w.grad))
    close(*results, 1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_no_tensor_of_the_loss_grows_with_text_times_vocabulary():
    hidden, weight = torch.randn(600, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(head(weight), hidden, torch.zeros(600, dtype=torch.long), 32).backward()
    assert largest.size == 32 * 500


def test_a_decoder_takes_it_in_place_of_its_own():
    model, ids = make(), random_ids(3, 12)
    labels = ids.masked_fill(ids < 20, -100)
    plain = model(ids, labels=labels)["loss"]
    model.token_loss = lambda *args: chunked_cross_entropy(*args, chunk_size=4)
    close(model(ids, labels=labels)["loss"], plain)
