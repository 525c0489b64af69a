"""lib/lora.py: which layers get LoRA, and LoRA merged away again. (The layer: tests/core/test_model.py.)"""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.lora import find_linears, lora_layers, lora_parameters, merge_lora
from model import convert_linears_to_lora
from toys import close, make, random_ids


@pytest.fixture(scope="module")
def ids():
    return random_ids(3, 12)


def trained_lora(model, **settings):
    names = convert_linears_to_lora(model, **{"rank": 4, "alpha": 8, **settings})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in lora_parameters(model):
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return names


def test_merging_keeps_what_the_layers_compute_and_restores_plain_ones(ids):
    model = make(attention_bias=True)
    before, plain = copy.deepcopy(model.state_dict()), model(ids)["logits"]
    names = trained_lora(model)
    expected = model(ids)["logits"]
    assert (expected - plain).abs().max() > 0.1
    layer = lora_layers(model)[names[0]]
    assert torch.equal(layer.linear.weight, before[names[0] + ".weight"])
    merge_lora(model)
    close(model(ids)["logits"], expected)
    assert set(model.state_dict()) == set(before) and not list(lora_parameters(model))


class Packed(nn.Module):
    """A layer whose weight is not a matrix of floats, as a quantised one."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 4, 3
        self.register_buffer("codes", torch.arange(12, dtype=torch.uint8))

    def forward(self, x):
        return F.linear(x, self.codes.view(3, 4).to(x.dtype))


def test_lora_wraps_any_layer_but_merges_into_floats_only():
    model = nn.Sequential(Packed())
    convert_linears_to_lora(model, 2, 2, target_module_classes=(Packed,))
    x = torch.randn(2, 4, dtype=torch.float16)
    assert model(x).dtype == torch.float16
    with pytest.raises(ValueError, match="Packed has no plain weight"):
        merge_lora(model)


def test_targets_that_make_no_sense():
    with pytest.raises(ValueError, match="name no linear layer"):
        find_linears(make(), ["qproj"])
    with pytest.raises(ValueError, match="shares its weight with the embedding"):
        find_linears(make(tie_word_embeddings=True), ["lm_head"])
    assert list(find_linears(make(), ["lm_head"])) == ["lm_head"]
