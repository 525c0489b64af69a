"""One token of a LLaMA on a CPU, faster: the same weights, laid out and computed for one token at a time.

    step = fast_step(decoder)                            # None where it would not be faster
    vlm.generate(..., step=step)

What it is worth, and why: docs/speed.md.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import KVCache, Output, positions_and_mask
from model import FeedForward, GroupQueryAttention, Llama3ForCausalLM


def fast_step(decoder: nn.Module) -> "OneToken | None":
    """Lay out a decoder's weights anew, in place, and return what computes one more token with them. None for a decoder that
    does not gain: any but a plain Llama3ForCausalLM on a CPU, without biases or norms of queries and keys."""
    if type(decoder) is not Llama3ForCausalLM or next(decoder.parameters()).device.type != "cpu":
        return None
    if decoder.config.attention != "sdpa" or decoder.config.qk_norm:
        return None
    arrange_for_decoding(decoder)
    step = OneToken(decoder)
    return step if step.complete else None


def read_together(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """The linear layers of a decoder that gain from lying side by side in memory, in groups that read the same input."""
    for part in module.modules():
        if isinstance(part, GroupQueryAttention):
            yield part.q_proj, part.k_proj, part.v_proj
            yield (part.o_proj,)
        elif isinstance(part, FeedForward):
            yield part.gate_proj, part.up_proj
        elif isinstance(part, Llama3ForCausalLM):
            yield (part.lm_head,)


@torch.no_grad()
def arrange_for_decoding(module: nn.Module) -> nn.Module:
    """Lay out a decoder's weights as a CPU reads them fastest for one new token: q, k and v side by side, gate and up side by
    side, the head column by column. Values, shapes and names stay; anything that copies the weights undoes it. Only a
    decoder without biases gains from it, and FSDP refuses weights that are laid out like this."""
    for layers in read_together(module):
        if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
            block = torch.cat([layer.weight.t() for layer in layers], dim=1)  # [in, all out]
            for layer, part in zip(layers, block.split([layer.out_features for layer in layers], dim=1), strict=True):
                layer.weight.data = part.t()
    return module


def side_by_side(*layers: nn.Module) -> Callable | None:
    """Layers that read the same input as one function of it, x [B, 1, in] -> [B, 1, all out], where their weights lie in memory
    as arrange_for_decoding leaves them; None where they do not (any more). A class of layers that keeps its weights in
    another form than floats may have a function of the same name for them, as int8.Linear8bit has."""
    kind = type(layers[0])
    if any(type(layer) is not kind or getattr(layer, "bias", None) is not None for layer in layers):
        return None
    if kind is not nn.Linear:
        return kind.side_by_side(layers) if hasattr(kind, "side_by_side") else None
    first, rows = layers[0].weight, sum(layer.out_features for layer in layers)
    place = first.data_ptr()
    for layer in layers:
        if layer.weight.data_ptr() != place or layer.weight.stride() != (1, rows):
            return partial(linear_on_all_cores, weight=first) if len(layers) == 1 else None
        place += layer.out_features * first.element_size()
    return partial(linear_on_all_cores, weight=first.as_strided((rows, layers[0].in_features), (1, rows)))


def linear_on_all_cores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for one token, x [1, 1, in]: MKL multiplies a matrix and a vector on a single core, but a batch of slices of
    that matrix on all of them."""
    slices = math.gcd(len(weight), torch.get_num_threads()) if len(x) == 1 and x.device.type == "cpu" else 1
    if slices == 1:
        return F.linear(x, weight)
    blocks = weight.view(slices, -1, weight.shape[1]).transpose(1, 2)
    return torch.bmm(x.expand(slices, -1, -1), blocks).view(1, 1, -1)


class OneToken:
    """Llama3ForCausalLM.forward for T = 1 with a cache and nothing else, in one loop: in a small model on a CPU, what happens
    between the matrix products takes a third of the time. tests/core/test_model.py compares the logits."""

    def __init__(self, model: Llama3ForCausalLM):
        self.model, self.head, self.layers = model, side_by_side(model.lm_head), []
        for attn, mlp in ((block.self_attn, block.mlp) for block in model.model.layers):
            qkv, gate_up = side_by_side(attn.q_proj, attn.k_proj, attn.v_proj), side_by_side(mlp.gate_proj, mlp.up_proj)
            self.layers.append((qkv, side_by_side(attn.o_proj), gate_up, side_by_side(mlp.down_proj)))
        self.complete = None not in [self.head, *(part for layer in self.layers for part in layer)]

    def __call__(self, input_ids: torch.Tensor, cache: KVCache) -> Output:
        model, config, B = self.model.model, self.model.config, len(input_ids)
        H, KV = config.n_heads, config.n_kv_groups
        x = model.embed_tokens(input_ids)
        positions, mask = positions_and_mask(x, cache=cache, limit=config.context_length)
        rope = model.rotary_emb(positions, x.dtype)
        for i, (block, (qkv, o, gate_up, down)) in enumerate(zip(model.layers, self.layers, strict=True)):
            heads = qkv(block.input_layernorm(x)).view(B, H + 2 * KV, 1, -1)
            turned = block.self_attn.rotate(heads[:, : H + KV], rope, i)
            k, v = cache.write(i, turned[:, H:], heads[:, H + KV :])
            q = turned[:, :H].reshape(B, KV, H // KV, -1)  # the queries of a group in the place of T
            y = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + o(y.reshape(B, 1, -1))
            gate, up = gate_up(block.post_attention_layernorm(x)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        return Output(logits=self.head(model.norm(x)))
