"""A GPT-2 decoder: token ids in, the next token's logits out. Every other model in this house starts from this block.

Mirrors: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and the published GPT-2 checkpoints,
whose logits it reproduces (tests/test_checkpoint.py). Read it from top to bottom; then read vit_scratch.py, which takes
the same block, drops the causal mask and looks at pictures.

    model = GPT(GPTConfig.preset("gpt2"))                        # 124M parameters, freshly initialised
    model = checkpoint.from_pretrained("path/to/gpt2")           # the published ones
    model.generate([[464, 3290]], max_new_tokens=20)             # prompts of any lengths, as lists of ids

Axes: B batch, T new tokens, S all tokens so far (S = T without a cache), H heads, D width, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    context_length: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None  # width inside the MLP; 4 x hidden_size unless given
    hidden_act: str = "gelu_tanh"  # GPT-2 and SigLIP use the tanh approximation, Google's ViT the exact "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    qkv_bias: bool = True
    attention: str = "sdpa"  # or "explicit": softmax(QK^T)V spelled out, the same numbers more slowly

    # What differs from the defaults above, per published size.
    PRESETS = {
        "gpt2": {},
        "gpt2-medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "gpt2-large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
        "gpt2-xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
    }

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        check_block_config(self)
        for name in ("vocab_size", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        return cls(**{**preset_settings(cls.PRESETS, name), **changes})


def preset_settings(presets: dict, name: str) -> dict:
    """The settings of one row of a preset table; an unknown name raises ValueError and lists the known ones."""
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]


def check_depth(layers: int) -> None:
    """Raise ValueError for more layers than anybody has trained: to build a billion of them would take days."""
    if layers > 1000:
        raise ValueError(f"{layers} layers are out of all proportion: choose at most 1000")


def check_block_config(config) -> None:
    """Raise ValueError for sizes that no transformer block can have. Works for GPTConfig and ViTConfig."""
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be at least 1")
    check_depth(config.num_hidden_layers)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} cannot be split over {config.num_attention_heads} attention heads: "
            "choose a multiple"
        )
    if not 0 < config.layer_norm_eps < 1:
        raise ValueError(f"layer_norm_eps is {config.layer_norm_eps}: it must be a small number above 0")
    for name, value, known in (
        ("hidden_act", config.hidden_act, ("gelu", "gelu_tanh")),
        ("attention", config.attention, ("sdpa", "explicit")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}")


class KVCache:
    """Keys and values of every token seen so far, allocated once, so that a new token costs one row and no copy.

    The cache owns its position: `open` reserves the slots of the new tokens, `write` fills them layer by layer. A slot
    holding padding is remembered as such and is never looked at. Opening more slots than max_length is a ValueError.
    """

    def __init__(self, num_layers, batch_size, num_kv_heads, max_length, head_dim, dtype=torch.float32, device="cpu"):
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.real = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.max_length = max_length
        self.length = 0
        self.padded = False  # a Python flag: asking the tensor at every token would stall a GPU
        self.images = None  # what model.py's cross-attention looks at: the pictures' keys and values, made once

    def open(self, attention_mask: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """Reserve num_new slots. attention_mask [B, num_new], 0 for padding. Returns which slots are real, bool [B, S]."""
        start, self.length = self.length, self.length + num_new
        if self.length > self.max_length:
            self.length = start
            raise ValueError(
                f"the KV cache holds {self.max_length} tokens; {start} are in it and {num_new} more do not fit: "
                "make it larger (max_length) or the text shorter"
            )
        self.real[:, start : self.length] = True if attention_mask is None else attention_mask.bool()
        self.padded = self.padded or not (attention_mask is None or bool(attention_mask.all()))
        return self.real[:, : self.length]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' k and v [B, H, T, head_dim]; returns all keys and values so far [B, H, S, head_dim]."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer, :, :, new] = k
        self.values[layer, :, :, new] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]


def causal_mask(real: torch.Tensor, num_new: int) -> torch.Tensor:
    """Who may look at whom: bool [B, 1, T, S] from real [B, S] (False: padding), for the last T = num_new tokens.

    Without padding, T = S = 3:  1 0 0     with the first token padding:  1 0 0   <- the padding sees only itself, for
                                 1 1 0                                    0 1 0      a softmax over nothing is NaN
                                 1 1 1                                    0 1 1
    """
    S = real.shape[1]
    keys = torch.arange(S, device=real.device)
    queries = keys[S - num_new :, None]
    mask = (keys <= queries) & real[:, None, :]  # [B, T, S]
    return (mask | (keys == queries))[:, None]


def positions_and_mask(real, padded, start, T, limit, device):
    """Where each token stands, [T] or [B, T], counting real tokens only so that padding moves nothing; and the mask."""
    S = start + T
    if padded:
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        used = S if S <= limit else int(positions.max()) + 1  # padding takes no position; looked up only if it matters
        positions, mask = positions[:, start:], causal_mask(real.bool(), T)
    else:
        positions, used = torch.arange(start, S, device=device), S
        plain = start == 0 or T == 1
        mask = None if plain else causal_mask(torch.ones(1, S, dtype=torch.bool, device=device), T)
    if used > limit:
        raise ValueError(
            f"{used} tokens are more than the context length of {limit}: shorten the text, "
            "or train a model with a longer context"
        )
    return positions, mask


def explicit_attention(q, k, v, mask=None, dropout_p=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(QK^T / sqrt(head_dim)) V as in "Attention Is All You Need", section 3.2.1: output and weights [B, H, T, S]."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return weights @ v, weights


def products_win(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether explicit_attention is faster than torch's fused kernel: in bf16 on a CPU, where that one takes two to seven times
    as long; not with many keys, for whose weights, [B, H, T, S] a layer, there would be no room (docs/speed.md)."""
    if q.device.type != "cpu" or k.shape[-2] > 600:
        return False
    return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype) == torch.bfloat16


class MultiHeadAttention(nn.Module):
    """Every token asks all earlier ones a question (q), matches it with what they offer (k) and takes their content (v)."""

    causal = True

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.explicit = config.attention == "explicit"
        self.dropout = config.dropout
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)  # one matrix product instead of three
        self.proj = nn.Linear(D, D)

    def forward(self, x, mask=None, cache=None, layer=0, trace=None, queries=None):
        """x [B, T, D] -> [B, T, D]. mask: bool [B, 1, T, S], or None for the plain causal one (T = S, or T = 1).
        queries: only the first so many tokens ask, and get an answer; without a mask that makes sense in a ViT alone."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, head_dim] each
        q = q[:, :, :queries]
        if cache is not None:
            k, v = cache.write(layer, k, v)

        dropout_p = self.dropout if self.training else 0.0
        causal = self.causal and mask is None and T > 1  # a single new token may look at everything there is
        if self.explicit or trace is not None or products_win(q, k):
            if causal:
                mask = causal_mask(torch.ones(1, T, dtype=torch.bool, device=x.device), T)
            y, weights = explicit_attention(q, k, v, mask, dropout_p)
            if trace is not None:
                trace[f"blocks.{layer}.attention"] = weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout_p)
        y = y.transpose(1, 2).reshape(B, -1, D)
        return F.dropout(self.proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers, token by token: where a transformer keeps most of its weights."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = "tanh" if config.hidden_act == "gelu_tanh" else "none"
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.fc(x), approximate=self.approximate)
        return F.dropout(self.proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block: tokens talk (attention), then each thinks for itself (MLP)."""

    attention_class = MultiHeadAttention

    def __init__(self, config):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = self.attention_class(config)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop_path = nn.Identity()  # training a ViT skips whole branches at random here; GPT-2 does not

    def forward(self, x, mask=None, cache=None, layer=0, trace=None, queries=None):
        x = x[:, :queries] + self.drop_path(self.attn(self.norm_1(x), mask, cache, layer, trace, queries))
        x = x + self.drop_path(self.mlp(self.norm_2(x)))
        if trace is not None:
            trace[f"blocks.{layer}"] = x
        return x


def run_blocks(blocks, x, mask=None, cache=None, trace=None, grad_checkpoint=False, last_queries=None):
    """x [B, T, D] through all blocks. grad_checkpoint: recompute activations in the backward pass instead of keeping them.
    last_queries: how many leading tokens the caller will read; the last block works for those only."""
    for layer, block in enumerate(blocks):
        queries = last_queries if layer == len(blocks) - 1 else None
        if grad_checkpoint and torch.is_grad_enabled() and cache is None:
            x = checkpoint(block, x, mask, None, layer, trace, queries, use_reentrant=False)
        else:
            x = block(x, mask, cache, layer, trace, queries)
    return x


def init_weights(model: nn.Module, blocks: nn.ModuleList, std: float = 0.02) -> None:
    """GPT-2's initialisation: N(0, 0.02), biases 0, and the layers that add to the residual stream scaled down by
    1 / sqrt(their number), so that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in blocks:
        for proj in (block.attn.proj, block.mlp.proj):
            nn.init.normal_(proj.weight, std=std / math.sqrt(2 * len(blocks)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self, self.blocks)
        nn.init.normal_(self.position_embedding.weight, std=0.01)  # as OpenAI's own code does
        self.tie_weights()

    def tie_weights(self):
        self.lm_head.weight = self.token_embedding.weight  # what reads a word also writes it

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        trace: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """One pass over T tokens.

        input_ids [B, T] or inputs_embeds [B, T, D] (exactly one); attention_mask [B, T], 1 for real tokens, 0 for padding
        on either side; targets [B, T]: the token that *follows* each position (already shifted), -100 where there is
        nothing to learn; cache: continues where it stands; logits_to_keep: only the last so many positions (0: all);
        trace: a dict to be filled with every named intermediate.
        Returns {"logits": [B, T, V]}, with "loss" (mean over the targets that count) when targets are given.
        Raises ValueError for positions past the context length and for sizes that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, D = x.shape
        for name, tensor in (("attention_mask", attention_mask), ("targets", targets)):
            if tensor is not None and tensor.shape != (B, T):
                raise ValueError(f"{name} is {list(tensor.shape)}, the input is [{B}, {T}]: they must agree")

        if cache is not None:
            real = cache.open(attention_mask, T)
            padded, start = cache.padded, cache.length - T
        else:
            real, padded, start = attention_mask, attention_mask is not None, 0
        positions, mask = positions_and_mask(real, padded, start, T, self.config.context_length, x.device)

        x = F.dropout(x + self.position_embedding(positions), self.config.dropout, self.training)
        if trace is not None:
            trace["embeddings"] = x
        x = self.norm(run_blocks(self.blocks, x, mask, cache, trace, self.grad_checkpoint))
        out = {"logits": self.lm_head(x[:, -logits_to_keep:])}
        if trace is not None:
            trace["norm"] = x
        if targets is not None:
            kept = targets[:, -logits_to_keep:].flatten()
            out["loss"] = F.cross_entropy(out["logits"].flatten(0, 1).float(), kept, ignore_index=-100)
        return out

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        config, weight = self.config, self.token_embedding.weight
        head_dim = config.hidden_size // config.num_attention_heads
        return KVCache(
            config.num_hidden_layers, batch_size, config.num_attention_heads, max_length, head_dim, weight.dtype, weight.device
        )

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens: int, **sampling) -> Iterator[list[int | None]]:
        """Yield the next token of every prompt as soon as it is there; None for a row that has stopped. See `decode`."""
        input_ids, attention_mask = left_pad(prompts, self.token_embedding.weight.device)
        longest = input_ids.shape[1] + max_new_tokens
        if longest > self.config.context_length:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new ones are {longest}, more than the "
                f"context length of {self.config.context_length}: shorten the prompt or lower max_new_tokens"
            )
        cache = self.new_cache(len(input_ids), longest)
        logits = self(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1)["logits"][:, -1]
        yield from decode(self, logits, cache, max_new_tokens, **sampling)

    def generate(self, prompts, max_new_tokens: int, **sampling) -> list[list[int]]:
        """Continue every prompt (a list of id lists of any lengths, or a tensor [B, T]): the new ids, row by row."""
        return collect(self.stream(prompts, max_new_tokens, **sampling), len(prompts))


# ---- generation, shared by every decoder in the house ----------------------------------------------------------------


def left_pad(prompts, device="cpu") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Id lists of any lengths -> input_ids [B, T] padded on the left, so that all rows end together, and attention_mask
    (None when all are equally long). An empty prompt is a ValueError."""
    rows = [list(row) for row in (prompts.tolist() if isinstance(prompts, torch.Tensor) else prompts)]
    if not rows or not all(rows):
        raise ValueError("an empty prompt has no last token to continue from: give at least one token per row")
    T = max(map(len, rows))
    input_ids = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    if all(len(row) == T for row in rows):
        return input_ids, None
    return input_ids, torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=device)


def sample(logits, temperature=0.0, top_k=None, top_p=None, min_p=None, generator=None) -> torch.Tensor:
    """Choose one token per row: logits [B, V] -> ids [B].

    temperature 0: the likeliest. Otherwise logits / temperature, then keep, in each row on its own, the top_k likeliest;
    the smallest set whose probabilities reach top_p (nucleus sampling, Holtzman et al. 2020); the tokens at least min_p
    times as likely as the likeliest (Nguyen et al. 2024). Settings outside their range raise ValueError.
    """
    for name, value, good, what in (
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
    ):
        if not good:
            raise ValueError(f"{name} is {value}: it must be {what}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier ones; 0 for the first, which stays
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    if min_p is not None:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def decode(model, logits, cache, max_new_tokens, stop_tokens: Sequence[int] = (), **sampling) -> Iterator[list[int | None]]:
    """The loop after the prompt: from its last logits [B, V] and its filled cache, one token per row and step.

    A row stops when it draws one of stop_tokens (which is not yielded) and yields None from then on; the loop ends when
    all rows have stopped or after max_new_tokens. sampling: the settings of `sample`. model: anything that maps
    (input_ids [B, 1], cache=cache) to {"logits": [B, 1, V]}.
    """
    stopped, ids = [False] * len(logits), None
    for _ in range(max_new_tokens):
        if ids is not None:
            logits = model(ids[:, None], cache=cache)["logits"][:, -1]
        ids = sample(logits, **sampling)
        row = ids.tolist()
        stopped = [done or token in stop_tokens for done, token in zip(stopped, row, strict=True)]
        if all(stopped):
            return
        yield [None if done else token for done, token in zip(stopped, row, strict=True)]


def collect(steps: Iterator[list[int | None]], num_rows: int) -> list[list[int]]:
    """What a stream yields step by step, as one list of ids per row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows
