"""The other way to join images and words: the decoder's words attend to the images from layers between its blocks.

Mirrors: Flamingo (Alayrac et al. 2022, section 2.2). Read model.py first. There an image becomes tokens among the words; here
it has a single placeholder, a word like any other, which only marks where the image belongs (a zero vector where the vocabulary
has no row for it). A token sees the images whose placeholder it may attend to: all before it in its row, or in its own
sample where samples are packed. (In Flamingo it sees the last of them only.)

    vlm = CrossAttentionVLM(CrossAttentionConfig(vision_config={...}, text_config={...}, cross_every=4))
    python finetune_vlm.py --fusion cross ...

Axes: as in model.py, and M the most images in one row.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import GPT, GPTConfig, KVCache, positions_and_mask
from model import (
    FeedForward,
    GroupQueryAttention,
    Llama3ForCausalLM,
    Llama3Model,
    LLAMA32Config,
    LLAMARMSNorm,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
)


@dataclass
class CrossTextConfig(LLAMA32Config):
    cross_every: int = 4  # a layer that attends to the images before blocks 0, 4, 8, ...


@dataclass
class CrossGPTConfig(GPTConfig):
    cross_every: int = 4


@dataclass
class CrossAttentionConfig(MLLAMAConfig):
    cross_every: int = 4

    def __post_init__(self):
        super().__post_init__()
        text = {**vars(self.text_config), "num_image_tokens": 1, "cross_every": self.cross_every}
        self.text_config = (CrossGPTConfig if isinstance(self.text_config, GPTConfig) else CrossTextConfig)(**text)


class GatedCrossAttention(nn.Module):
    """A block whose keys and values come from the images. Both branches pass a gate tanh(0) = 0 at first, so that a trained
    decoder starts out unchanged."""

    def __init__(self, config: LLAMA32Config):
        super().__init__()
        self.input_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = GroupQueryAttention(config)
        self.post_attention_layernorm = LLAMARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.attn_gate, self.mlp_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def keys_and_values(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image features [B, S, D] -> k and v [B, KV heads, S, head_dim]; they have no positions, so they are not rotated."""
        attn = self.cross_attn
        k, v = attn.heads(attn.k_proj(features)), attn.heads(attn.v_proj(features))
        return (attn.k_norm(k) if attn.qk_norm else k), v

    def forward(self, x, k, v, visible):
        """x [B, T, D]; visible: bool [B, T, S], which image features each token sees. One that sees none stays as it is."""
        sees = visible.any(dim=-1, keepdim=True)
        mask = (visible | ~sees)[:, None]  # a softmax over nothing is NaN
        attn = self.cross_attn
        q = attn.heads(attn.q_proj(self.input_layernorm(x)))
        q = attn.q_norm(q) if attn.qk_norm else q
        x = x + self.attn_gate.tanh() * attn.attend(q, k, v, mask) * sees
        return x + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x)) * sees


class ImageKVCache(KVCache):
    """Also holds the keys and values of the images, computed once: {layer: (k, v)}, and what later tokens see of them."""

    images: tuple[dict, torch.Tensor] | None = None

    @classmethod
    def like(cls, plain: KVCache) -> "ImageKVCache":
        return cls(*plain.keys.shape, plain.keys.dtype, plain.keys.device)

    def select(self, rows):
        new = super().select(rows)
        if self.images is not None:
            images, visible = self.images
            new.images = {layer: (k[rows], v[rows]) for layer, (k, v) in images.items()}, visible[rows]
        return new


class CrossLayers(nn.ModuleDict):
    """{"0": layer, "4": layer, ...}: those before blocks 0, 4, 8, ... of a decoder of so many blocks."""

    def __init__(self, config: LLAMA32Config, blocks: int, every: int):
        super().__init__({str(i): GatedCrossAttention(config) for i in range(0, blocks, every)})

    def keys_and_values(self, images, cache, T):
        """What each layer attends to, {block: (k, v)}, and which of it each of T tokens sees. images: None, or (features
        [B, S, D], visible bool [B, T, S]); a cache keeps what later tokens see."""
        if images is not None:
            if cache is not None and cache.images is not None:
                raise ValueError("this cache holds images already: give all images of a text in the first call")
            features, visible = images
            images = {int(i): layer.keys_and_values(features) for i, layer in self.items()}
            if cache is not None:
                cache.images = images, visible[:, -1:]  # later tokens see what the last one saw
            return images, visible
        if cache is None or cache.images is None:
            return {}, None
        images, visible = cache.images
        return images, visible.expand(-1, T, -1)

    def before(self, block: int, x, images, visible):
        """x [B, T, D] on its way into a block, past the layer before that, if there is one and there are images."""
        return self[str(block)](x, *images[block], visible) if block in images else x


class CrossAttentionModel(Llama3Model):
    def __init__(self, config: CrossTextConfig):
        super().__init__(config)
        self.cross_layers = CrossLayers(config, config.n_layers, config.cross_every)

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None, images=None) -> torch.Tensor:
        """As Llama3Model.forward. images: see CrossLayers.keys_and_values."""
        limit = self.config.context_length
        positions, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, cache, limit)
        x, rope = inputs_embeds, self.rotary_emb(positions, inputs_embeds.dtype)
        images, visible = self.cross_layers.keys_and_values(images, cache, x.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(self.cross_layers.before(i, x, images, visible), rope, mask, cache, i)
        return self.norm(x)


class CrossAttentionDecoder(Llama3ForCausalLM):
    model_class = CrossAttentionModel

    def hidden_states(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None, images=None) -> torch.Tensor:
        return self.model(inputs_embeds, attention_mask, position_ids, cache, images)

    def new_cache(self, batch_size: int, max_length: int) -> ImageKVCache:
        return ImageKVCache.like(super().new_cache(batch_size, max_length))


class CrossAttentionGPT(GPT):
    """The layers between are the same as in a LLaMA, with its norm and MLP."""

    def __init__(self, config: CrossGPTConfig):
        super().__init__(config)
        sizes = {"hidden_size": config.hidden_size, "n_heads": config.num_attention_heads}
        sizes |= {"hidden_dim": config.intermediate_size, "dropout": config.dropout, "attention": config.attention}
        between = LLAMA32Config(**sizes)
        self.cross_layers = CrossLayers(between, config.num_hidden_layers, config.cross_every)
        for weight in self.cross_layers.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def hidden_states(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None, images=None) -> torch.Tensor:
        """As GPT.hidden_states. images: see CrossLayers.keys_and_values."""
        limit = self.config.context_length
        positions, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, cache, limit)
        x = F.dropout(inputs_embeds + self.position_embedding(positions), self.config.dropout, self.training)
        images, visible = self.cross_layers.keys_and_values(images, cache, x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(self.cross_layers.before(i, x, images, visible), mask, cache, i)
        return self.norm(x)

    def new_cache(self, batch_size: int, max_length: int) -> ImageKVCache:
        return ImageKVCache.like(super().new_cache(batch_size, max_length))


def images_by_row(features, places, pattern=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features [I, N, D], sorted into the rows of their placeholders, bool [B, T], become [B, M * N, D], zeros where a
    row has fewer than M images; and which of them each token sees, bool [B, T, M * N]: those whose placeholder is at its own
    place or before it, or where `pattern`, bool [B or 1, 1, T, S], lets it attend."""
    (B, T), (_, N, D) = places.shape, features.shape
    rows, at = places.nonzero(as_tuple=True)
    number = places.cumsum(dim=1)[places] - 1  # counted from 0 in each row
    M = int(places.sum(dim=1).max())
    sorted_features = features.new_zeros(B, M, N, D).index_put((rows, number), features)
    stands = torch.full((B, M), T, device=places.device).index_put((rows, number), at)  # T: there is no such image
    if pattern is None:
        visible = stands[:, None] <= torch.arange(T, device=places.device)[:, None]
    else:
        column = stands.clamp(max=T - 1)[:, None].expand(B, T, M)
        visible = pattern[:, 0, :, -T:].expand(B, T, T).gather(2, column) & (stands < T)[:, None]
    return sorted_features.flatten(1, 2), visible.repeat_interleave(N, dim=2)


class CrossAttentionVLM(MllamaForConditionalGeneration):
    """vision_tower and multi_modal_projector as in model.py, and a decoder with layers that attend to their features."""

    decoders = {CrossTextConfig: CrossAttentionDecoder, CrossGPTConfig: CrossAttentionGPT}

    def hidden_states(self, image_features, input_ids, places, attention_mask=None, position_ids=None, cache=None):
        without_row = places & (input_ids >= self.config.text_config.vocab_size)
        embeds = self.language_model.embed(input_ids.masked_fill(without_row, 0)).masked_fill(without_row[..., None], 0)
        images = None
        if image_features is not None:
            is_pattern = callable(attention_mask) or (attention_mask is not None and attention_mask.ndim == 4)
            pattern = attention_mask if is_pattern else None
            pattern = pattern.pattern(input_ids.shape[1]) if callable(pattern) else pattern
            images = images_by_row(image_features.to(embeds.dtype), places, pattern)
        return self.language_model.hidden_states(embeds, attention_mask, position_ids, cache, images)
