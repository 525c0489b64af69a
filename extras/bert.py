"""BERT: the block of gpt.py without its causal mask, and with a norm after each half in place of one before it.

Mirrors: "BERT" (Devlin et al., 2019) and "DistilBERT" (Sanh et al., 2019), the body without a head: its hidden states are
those of the published checkpoints (tests/test_llmvit.py). Read vit_scratch.py first; llmvit.py takes it as a backbone.

    model = lib.checkpoint.from_pretrained("path/to/distilbert")
    model.hidden_states(model.embed(input_ids))          # [B, T, D] -> [B, T, D], every token after having seen all others

Axes: B batch, T tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt import Block, init_weights
from vit_scratch import ViTMultiHeadAttention


@dataclass
class BertConfig:
    vocab_size: int = 30522
    context_length: int = 512
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0
    qkv_bias: bool = True
    attention: str = "sdpa"

    def __post_init__(self):
        D, H = self.hidden_size, self.num_attention_heads
        assert D % H == 0, f"hidden_size {D} cannot be split over {H} attention heads: choose a multiple"


class BertBlock(Block):
    """Post-norm, as in "Attention Is All You Need": what leaves a block is normed, the sum along the blocks with it."""

    attention_class = ViTMultiHeadAttention

    def forward(self, x):
        x = self.norm_1(x + self.attn(x))
        return self.norm_2(x + self.mlp(x))


class Bert(nn.Module):
    """BERT's second sentence is not known here: its token type 0, which all tokens have, is part of the positions."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.num_hidden_layers))
        init_weights(self, self.blocks)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D], without positions."""
        return self.token_embedding(input_ids)

    def hidden_states(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D], all tokens real. Raises ValueError for more than context_length."""
        T, limit = inputs_embeds.shape[1], self.config.context_length
        if T > limit:
            raise ValueError(f"{T} tokens exceed the context length of {limit}: shorten the input")
        x = self.norm(inputs_embeds + self.position_embedding.weight[:T])
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return x
