"""Toy decoders and vision-language models with random weights, and rows of tokens for them, which several test files share."""

import torch

from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from model import Llama3ForCausalLM, LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration

V, IMAGE = 61, 60
TEXT = {"vocab_size": V, "hidden_size": 36, "n_heads": 9, "n_kv_groups": 3, "n_layers": 3, "hidden_dim": 50}
TEXT |= {"max_position_embeddings": 64, "rope_base": 10000.0}
VISION = {"hidden_size": 20, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


def shaken(module, seed=0):
    """Random everything, norms and biases included: what starts at 0 or 1 would hide a part that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make(**changes):
    torch.manual_seed(0)
    return shaken(Llama3ForCausalLM(LLAMA32Config(**{**TEXT, **changes})))


def make_vlm(text=None, vision=None, cross=False, **changes):
    torch.manual_seed(0)
    config_class, model = (CrossAttentionConfig, CrossAttentionVLM) if cross else (MLLAMAConfig, MllamaForConditionalGeneration)
    changes = {"image_token_id": IMAGE, **({"cross_every": 2} if cross else {}), **changes}
    return shaken(model(config_class({**VISION, **(vision or {})}, {**TEXT, **(text or {})}, **changes)))


def random_ids(*shape, seed=1):
    return torch.randint(1, IMAGE, shape, generator=torch.Generator().manual_seed(seed))


def padding(lengths, T, side):
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    return (real if side == "right" else real.flip(1)).long()


def place(rows, side, T):
    """Rows of ids, padded with id 7: input_ids and attention_mask [B, T]."""
    mask = padding([len(row) for row in rows], T, side)
    ids = torch.full_like(mask, 7)
    for b, row in enumerate(rows):
        ids[b, mask[b].bool()] = torch.tensor(row)
    return ids, mask


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def block_pattern(lengths):
    """Samples packed one after the other: bool [1, 1, T, T] and positions [1, T] that start again in each."""
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    pattern = (sample[:, None] == sample) & torch.ones(len(sample), len(sample)).tril().bool()
    return pattern[None, None], torch.cat([torch.arange(n) for n in lengths])[None]


def words_and_images(N):
    """Three rows: two images, none, one; and the three images."""
    words = [random_ids(n, seed=n).tolist() for n in (2, 3, 4, 5, 6, 1)]
    image = [IMAGE] * N
    rows = [words[0] + image + words[1] + image + words[2], words[3], words[5] + image + words[4]]
    return rows, torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
