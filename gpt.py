"""A GPT-2 decoder: token ids in, the next token's logits out. Every other model of this project starts from this block.

Mirrors: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) and the published GPT-2 checkpoints,
whose logits it reproduces (tests/test_checkpoint.py). Read it from top to bottom; then read vit_scratch.py, which takes
the same block, drops the causal mask and reads patches of an image.

    model = GPT(GPTConfig.preset("gpt2"))                        # 124M parameters, freshly initialised
    model = lib.checkpoint.from_pretrained("path/to/gpt2")       # the published ones
    model(input_ids, labels=input_ids).loss                      # labels stand where the tokens stand: the shift is done inside
    model.generate([[464, 3290]], max_new_tokens=20)             # prompts of any lengths, as lists of ids

Axes: B batch, T new tokens, S all tokens so far (S = T without a cache), H heads, D width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    context_length: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None  # width inside the MLP; 4 x hidden_size unless given
    hidden_act: str = "gelu_tanh"  # one of ACTIVATIONS
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    qkv_bias: bool = True
    tie_word_embeddings: bool = True
    attention: str = "sdpa"  # or "explicit": softmax(QK^T)V spelled out, the same numbers more slowly
    num_image_tokens: int | None = None  # placeholders per image, where images stand among the words (model.py fills it in)

    # What differs from the defaults above, per published size.
    PRESETS = {
        "gpt2": {},
        "gpt2-medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "gpt2-large": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
        "gpt2-xl": {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25},
    }

    def __post_init__(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        D, H = self.hidden_size, self.num_attention_heads
        assert D % H == 0, f"hidden_size {D} cannot be split over {H} attention heads: choose a multiple"

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        return cls(**{**cls.PRESETS[name], **changes})


class Output(dict):
    """What a model returns: entries that are attributes too, out["loss"] and out.loss. An entry given as a function is computed
    when it is first read: training never reads the logits beside its loss, and the largest tensor, [B, T, V], is never made."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if isinstance(value, Callable):
            value = self[key] = value()
        return value

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(f"this output has no {name}, only {', '.join(self)}")
        return self[name]


# ---- attention -------------------------------------------------------------------------------------------------------


def causal_mask(real: torch.Tensor, num_new: int) -> torch.Tensor:
    """Which tokens each token may attend to: bool [B, 1, T, S] from real [B, S] (False: padding), for the last T = num_new.

    Without padding, T = S = 3:  1 0 0     with the first token padding:  1 0 0   <- the padding sees only itself, for
                                 1 1 0                                    0 1 0      a softmax over nothing is NaN
                                 1 1 1                                    0 1 1
    """
    S = real.shape[1]
    keys = torch.arange(S, device=real.device)
    queries = keys[S - num_new :, None]
    mask = (keys <= queries) & real[:, None, :]  # [B, T, S]
    return (mask | (keys == queries))[:, None]


def explicit_attention(q, k, v, mask=None, causal=False, dropout=0.0) -> torch.Tensor:
    """softmax(QK^T / sqrt(head_dim)) V, "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.1; see attention."""
    if k.shape[1] < q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if causal:
        mask = causal_mask(torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device), q.shape[2])
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ v


def attention(q, k, v, mask=None, causal=False, dropout=0.0, explicit=False) -> torch.Tensor:
    """The one attention of all models here: q [B, H, T, head_dim], k and v [B, KV, S, head_dim] -> [B, H, T, head_dim].

    KV divides H: heads in groups may share their keys and values (Ainslie et al. 2023). mask: bool, broadcast to
    [B, H, T, S], True where a token may attend; or a function of (q, k, v, dropout) that attends in its own way
    (data/packing.py). causal: in place of a mask, each token attends to itself and earlier ones. Both forms give the same
    numbers (tests/core/test_gpt.py): `explicit` is for readers, and faster in bf16 on a CPU, where torch's fused kernel takes
    two to seven times as long, as long as its weights [B, H, T, S] are few (docs/speed.md).
    """
    if callable(mask):
        return mask(q, k, v, dropout)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    if explicit or (q.device.type == "cpu" and dtype == torch.bfloat16 and k.shape[2] <= 600):
        return explicit_attention(q, k, v, mask, causal, dropout)
    if k.shape[1] < q.shape[1] and q.device.type == "cuda":  # not every GPU has a kernel for shared heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=k.shape[1] < q.shape[1])


class KVCache:
    """Keys and values of every token seen so far, allocated once, so that a new token costs one row and no copy.

    The cache owns its position: `open` reserves the slots of the new tokens, `write` fills them layer by layer. A slot
    that holds padding is marked as such and masked from then on. Opening more slots than max_length is a ValueError.
    """

    def __init__(self, num_layers, batch_size, num_kv_heads, max_length, head_dim, dtype=torch.float32, device="cpu"):
        shape = (num_layers, batch_size, num_kv_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.real = torch.zeros(batch_size, max_length, dtype=torch.bool, device=device)
        self.max_length = max_length
        self.length = 0
        self.padded = False  # a Python flag: asking the tensor at every token would stall a GPU

    def open(self, attention_mask: torch.Tensor | None, num_new: int) -> torch.Tensor:
        """Reserve num_new slots. attention_mask [B, num_new], 0 for padding. Returns which slots are real, bool [B, S]."""
        start, end = self.length, self.length + num_new
        if end > self.max_length:
            raise ValueError(
                f"the KV cache holds {self.max_length} tokens; {start} are in it and {num_new} more do not fit: "
                "make it larger (max_length) or the text shorter"
            )
        self.length = end
        self.real[:, start:end] = True if attention_mask is None else attention_mask.bool()
        self.padded = self.padded or not (attention_mask is None or bool(attention_mask.all()))
        return self.real[:, :end]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' k and v [B, KV, T, head_dim]; returns all keys and values so far [B, KV, S, head_dim]."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer, :, :, new] = k
        self.values[layer, :, :, new] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A cache of these rows of the batch: some of them several times, some not at all."""
        (layers, _, heads, _, width), used = self.keys.shape, slice(self.length)
        new = type(self)(layers, len(rows), heads, self.max_length, width, self.keys.dtype, self.keys.device)
        rows = torch.tensor(rows, device=self.keys.device)
        new.keys[:, :, :, used], new.values[:, :, :, used] = self.keys[:, rows, :, used], self.values[:, rows, :, used]
        new.real[:, used], new.length, new.padded = self.real[rows, used], self.length, self.padded
        return new


def positions_and_mask(x, attention_mask=None, position_ids=None, cache=None, limit=math.inf):
    """Where each token of x [B, T, D] stands, int64 [T] or [B, T]: real tokens are counted, so that padding moves nothing. And
    what it may attend to: a mask for `attention`, or None for the plain causal one. Reserves T slots of the cache.

    attention_mask: [B, T], 0 for padding on either side; or the whole pattern, bool [B or 1, 1, T, S] or a function (see
    attention). position_ids [B, T] replace the counting. Raises ValueError for positions past `limit`.
    """
    T, start = x.shape[1], 0 if cache is None else cache.length
    is_pattern = callable(attention_mask) or (attention_mask is not None and attention_mask.ndim == 4)
    real = None if is_pattern else attention_mask
    for name, given in (("attention_mask", real), ("position_ids", position_ids)):
        assert given is None or given.shape == x.shape[:2], f"{name} is {list(given.shape)}, the input {list(x.shape[:2])}"
    if cache is not None:
        real, padded = cache.open(real, T), cache.padded
    else:  # padding on the right needs no mask of its own: the causal one hides it from all real tokens
        on_the_right = real is not None and bool((real[:, 1:] <= real[:, :-1]).all() & real[:, 0].all())
        padded = real is not None and not (on_the_right and T <= limit)

    positions = torch.arange(start, start + T, device=x.device) if position_ids is None else position_ids
    if padded and position_ids is None:
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)[:, start:]
    if (start + T > limit or position_ids is not None) and (last := int(positions.max())) >= limit:
        raise ValueError(
            f"{last + 1} tokens are more than the context length of {limit}: shorten the text, "
            "or train a model with a longer context"
        )
    if is_pattern:
        rows = attention_mask if callable(attention_mask) else attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
        return positions, rows  # a row of nothing but False would be a softmax over nothing
    if padded:
        return positions, causal_mask(real.bool(), T)
    plain = start == 0 or T == 1  # a single new token may attend to everything there is
    return positions, None if plain else causal_mask(torch.ones(1, start + T, dtype=torch.bool, device=x.device), T)


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

    def forward(self, x, mask=None, cache=None, layer=0):
        """x [B, T, D] -> [B, T, D]. mask: see attention; None for the plain causal one (T = S, or T = 1)."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, head_dim] each
        if cache is not None:
            k, v = cache.write(layer, k, v)
        causal = self.causal and mask is None and T > 1
        y = attention(q, k, v, mask, causal, self.dropout if self.training else 0.0, self.explicit)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)


# ---- block -----------------------------------------------------------------------------------------------------------


ACTIVATIONS = {
    "gelu": F.gelu,  # Google's ViT
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2 and SigLIP
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP
}


class MLP(nn.Module):
    """Two linear layers, token by token: where a transformer keeps most of its weights."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.proj(self.act(self.fc(x))), self.dropout, self.training)


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

    def forward(self, x, mask=None, cache=None, layer=0):
        x = x + self.drop_path(self.attn(self.norm_1(x), mask, cache, layer))
        return x + self.drop_path(self.mlp(self.norm_2(x)))


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


# ---- what every decoder does, GPT and LLaMA alike: loss, and text one token at a time ----------------------------------------


def token_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of head(hidden [M, D]) against targets [M]; 0 without any. lib/loss.py has one that never holds all
    M x V logits at once."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum") / max(1, len(targets))


class Decoder(nn.Module):
    """A subclass has `config`, `lm_head`, embed(input_ids), hidden_states(inputs_embeds, attention_mask, position_ids, cache)
    and new_cache(batch_size, max_length); this adds what follows from them."""

    token_loss = staticmethod(token_loss)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Output:
        """One pass over T tokens.

        input_ids [B, T] or inputs_embeds [B, T, D] (exactly one); attention_mask: [B, T], 1 for real tokens, 0 for padding
        on either side, or a pattern (see positions_and_mask); position_ids [B, T]: unless given, the real tokens are counted;
        labels [B, T], as in transformers the ids themselves, -100 where there is nothing to learn; cache: continues where it
        stands; logits_to_keep: only the last so many positions (0: all).
        Returns {"logits": [B, T, V]}, and "loss" with labels. Raises ValueError for positions past the context length.
        """
        assert (input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds, and not both"
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.hidden_states(embeds, attention_mask, position_ids, cache)
        if labels is None:
            return Output(logits=self.lm_head(hidden[:, -logits_to_keep:]))  # [-0:] is all of them
        loss = self.loss(hidden, labels, attention_mask)
        return Output(loss=loss, logits=lambda: self.lm_head(hidden[:, -logits_to_keep:]))

    def loss(self, hidden, labels, attention_mask=None) -> torch.Tensor:
        """Each hidden state [B, T, D] against the label [B, T] of the next position: the mean over all that count. Left out are
        labels of -100, padding, and tokens that may not attend to the one before, which is padding or of another sample.
        (Where the mask is a function, data/packing.py has set such labels to -100 already.)"""
        counts = labels[:, 1:] != -100
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            counts = counts & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        elif isinstance(attention_mask, torch.Tensor):
            counts = counts & attention_mask[:, 0, :, -labels.shape[1] :].diagonal(-1, dim1=1, dim2=2)
        return self.token_loss(self.lm_head, hidden[:, :-1][counts], labels[:, 1:][counts])

    @torch.inference_mode()
    def stream(
        self, input_ids, max_new_tokens: int, attention_mask=None, prefill: Callable | None = None,
        step: Callable | None = None, **sampling,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Yield the next token of every prompt as soon as it is there; None for a row that has stopped. See `generate`.
        prefill, step: what reads the prompts, and what computes one more token, if not this model itself. A vision-language
        model reads the prompt with its images; every later token is this decoder's alone, with the cache."""
        if attention_mask is not None:  # a padded batch: back to rows of real tokens
            input_ids = [row[real].tolist() for row, real in zip(input_ids, attention_mask.bool(), strict=True)]
        input_ids, attention_mask = left_pad(input_ids, self.lm_head.weight.device)
        longest, limit = input_ids.shape[1] + max_new_tokens, self.config.context_length
        if longest > limit:
            raise ValueError(
                f"a prompt of {input_ids.shape[1]} tokens and {max_new_tokens} new ones are {longest}, more than the "
                f"context length of {limit}: shorten the prompt or lower max_new_tokens"
            )
        cache = self.new_cache(len(input_ids), longest)
        out = (prefill or self)(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1)
        yield from decode(step or self, out["logits"][:, -1], cache, max_new_tokens, **sampling)

    def generate(self, input_ids, max_new_tokens: int, attention_mask=None, **options) -> list[list[int]]:
        """Continue every prompt (a list of id lists of any lengths, or a tensor [B, T], with attention_mask [B, T] where it
        holds padding): the new ids, row by row. options: temperature, top_k, ..., stop_tokens (see `decode`); see stream."""
        return collect(self.stream(input_ids, max_new_tokens, attention_mask, **options), len(input_ids))


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
    times as likely as the likeliest (Nguyen et al. 2024).
    """
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
def decode(
    step, logits, cache, max_new_tokens, stop_tokens: Sequence[int] = (), adjust: Callable | None = None, **sampling
) -> Iterator[list[int | None]]:
    """The loop after the prompt: from its last logits [B, V] and its filled cache, one token per row and step.

    A row stops when it draws one of stop_tokens (which is not yielded) and yields None from then on; the loop ends when
    all rows have stopped or after max_new_tokens. adjust: changes logits [B, V] before a token is chosen; sampling: the
    settings of `sample`. step: a decoder, or anything else that maps (input_ids [B, 1], cache=cache) to {"logits": [B, 1, V]}.
    """
    stopped, ids = [False] * len(logits), None
    for _ in range(max_new_tokens):
        if ids is not None:
            logits = step(ids[:, None], cache=cache)["logits"][:, -1]
        ids = sample(adjust(logits) if adjust else logits, **sampling)
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


# ---- model -----------------------------------------------------------------------------------------------------------


class GPT(Decoder):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self, self.blocks)
        nn.init.normal_(self.position_embedding.weight, std=0.01)  # as OpenAI's own code does
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:  # one matrix turns a token into a vector and a vector into a token
            self.lm_head.weight = self.token_embedding.weight

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D], without positions."""
        return self.token_embedding(input_ids)

    def hidden_states(self, inputs_embeds, attention_mask=None, position_ids=None, cache=None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D], after the final norm. The arguments are those of Decoder.forward."""
        limit = self.config.context_length
        positions, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, cache, limit)
        x = inputs_embeds + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        return self.norm(x)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KVCache for so many rows of so many tokens."""
        config, weight = self.config, self.token_embedding.weight
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        return KVCache(config.num_hidden_layers, batch_size, heads, max_length, width, weight.dtype, weight.device)
