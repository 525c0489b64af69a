"""The loss of a language model without its logits: for a large vocabulary they are the largest tensor of a training step.

    spare_logits(decoder)        # chunked_cross_entropy in place of gpt.token_loss: the same numbers, less memory, more time
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # tokens whose logits exist at once
LARGE_VOCABULARY = 2**12  # from here on the logits of all answers at once are what takes the memory


def spare_logits(decoder: nn.Module) -> None:
    """Give a decoder with a large vocabulary chunked_cross_entropy."""
    if decoder.config.vocab_size > LARGE_VOCABULARY:
        decoder.token_loss = chunked_cross_entropy


def chunked_cross_entropy(head: nn.Module, hidden, targets, chunk_size: int = CHUNK) -> torch.Tensor:
    """Mean cross-entropy of head(hidden [M, D]) against targets [M], chunk_size rows of logits at a time; 0 without any.

    Each chunk is computed again in the backward pass, so that no more than chunk_size x V logits exist at any moment,
    however long the text.
    """

    def chunk_loss(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum() / max(1, len(targets))
