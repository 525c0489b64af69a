"""Laws of gpt.py: fast = clear, cached = uncached, padded = unpadded, and what generate promises."""

import pytest
import torch

from gpt import GPT, GPTConfig, KVCache, attention, decode, left_pad, sample
from lib.checks import checked

CONFIG = GPTConfig(vocab_size=61, context_length=24, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)


def make(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(CONFIG), **changes})).eval()
    with torch.no_grad():  # fresh positions and biases are so small that a mistake in them would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))


def padded(ids, lengths, side):
    mask = torch.zeros_like(ids)
    for row, n in zip(mask, lengths, strict=True):
        row[slice(None, n) if side == "right" else slice(len(row) - n, None)] = 1
    return mask


@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 5, 1)])
def test_sdpa_equals_explicit_attention_in_outputs_and_gradients(ids, lengths):
    results = []
    for kind in ("sdpa", "explicit"):
        model = make(attention=kind)
        out = model(ids, attention_mask=padded(ids, lengths, "left"), labels=ids)
        out["loss"].backward()
        results.append((out["logits"], [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 5, 1)])
def test_in_bf16_on_a_cpu_attention_is_two_products(ids, lengths):
    """torch's fused kernel made a step of the small models slower in bf16 than in fp32."""
    mask = padded(ids, lengths, "left")
    with torch.autocast("cpu", torch.bfloat16):
        ours, explicit = (make(attention=kind)(ids, attention_mask=mask)["logits"] for kind in ("sdpa", "explicit"))
    assert torch.equal(ours, explicit)
    exact = make()(ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(ours.float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype, keys, explicit", [("bfloat16", 600, True), ("bfloat16", 601, False), ("float32", 5, False)])
def test_where_two_products_are_taken(monkeypatch, dtype, keys, explicit):
    """Not with many keys: their [T, S] weights would need the memory that the kernel saves. Nor in fp32, unless autocast."""
    asked = []
    monkeypatch.setattr("gpt.explicit_attention", lambda *args: asked.append(args))
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, keys, 4)
    attention(*(x.to(getattr(torch, dtype)) for x in (q, k, k)))
    assert bool(asked) == explicit
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, k, k)
    assert len(asked) == (2 if explicit else keys <= 600)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys_and_values_compute_what_copies_of_them_would(explicit, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.3 if masked else None
    mask = mask if mask is None else mask | torch.eye(5, dtype=torch.bool)
    copies = (x.repeat_interleave(3, dim=1) for x in (k, v))
    ours = attention(q, k, v, mask, causal=not masked, explicit=explicit)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, *copies, mask, is_causal=not masked)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_token_never_sees_later_ones(model, ids):
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    torch.testing.assert_close(model(ids)["logits"][:, :7], model(changed)["logits"][:, :7])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(model, ids, side):
    lengths = (12, 7, 1)
    mask = padded(ids, lengths, side)
    together = model(ids, attention_mask=mask)["logits"]
    assert together.isfinite().all()
    for row in range(3):
        alone = model(ids[row : row + 1, mask[row].bool()])["logits"][0]
        torch.testing.assert_close(together[row, mask[row].bool()], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]])
@pytest.mark.parametrize("lengths", [None, (12, 7, 9)])
def test_cached_equals_uncached(model, ids, chunks, lengths):
    mask = None if lengths is None else padded(ids, lengths, "left")
    whole = model(ids, attention_mask=mask)["logits"]
    cache, parts, start = model.new_cache(3, 12), [], 0
    for n in chunks:
        part = slice(start, start + n)
        step_mask = None if mask is None else mask[:, part]
        parts.append(model(ids[:, part], attention_mask=step_mask, cache=cache)["logits"])
        start += n
    real = torch.ones(3, 12, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-5, rtol=1e-5)


def test_inputs_embeds_are_what_input_ids_look_up(model, ids):
    embeds = model.token_embedding(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds)["logits"], model(ids)["logits"])
    with pytest.raises(AssertionError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)


def test_loss_is_of_the_next_token_and_the_mean_of_all_but_minus_100(model, ids):
    labels = ids.clone()
    labels[:, 7:] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :6].flatten(0, 1), ids[:, 1:7].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0  # and not NaN


def test_logits_beside_a_loss_are_computed_when_they_are_read(model, ids):
    """Training reads the loss alone; [B, T, V] logits were the largest tensor of a step."""
    calls = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    out = model(ids, labels=torch.where(ids > 30, ids, -100))
    assert calls == [int((ids[:, 1:] > 30).sum())]  # for the labels that count, and no others
    handle.remove()
    assert out.logits is out["logits"] and out.logits.shape == (3, 12, 61) and not hasattr(out, "hidden")


@pytest.mark.parametrize("padding", [None, (12, 7, 9)])
def test_a_row_of_a_selected_cache_goes_on_as_the_row_it_was(model, ids, padding):
    mask = None if padding is None else padded(ids, padding, "left")
    cache = model.new_cache(3, 13)
    model(ids, attention_mask=mask, cache=cache)
    new = torch.tensor([[5], [6], [7]])
    picked = model(new[[2, 0, 2]], cache=cache.select([2, 0, 2]))["logits"]
    torch.testing.assert_close(picked, model(new, cache=cache)["logits"][[2, 0, 2]], atol=1e-5, rtol=1e-5)


def test_positions_past_the_context_length_are_an_error(model):
    with pytest.raises(ValueError, match="25 tokens are more than the context length of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="context length of 24"):
        model.generate([[1] * 20], max_new_tokens=5)
    cache = model.new_cache(1, 40)
    model(torch.zeros(1, 24, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="25 tokens are more than the context length"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_full_cache_refuses_and_stays_as_it_was():
    cache = KVCache(1, 1, 1, max_length=4, head_dim=2)
    cache.open(None, 3)
    with pytest.raises(ValueError, match="holds 4 tokens; 3 are in it and 2 more do not fit"):
        cache.open(None, 2)
    assert cache.length == 3


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, context_length=200, hidden_size=256, num_hidden_layers=8, num_attention_heads=4))
    block = model.blocks[3]
    assert model.lm_head.weight is model.token_embedding.weight
    for weight, std in (
        (model.token_embedding.weight, 0.02),
        (model.position_embedding.weight, 0.01),
        (block.attn.qkv.weight, 0.02),
        (block.mlp.fc.weight, 0.02),
        (block.attn.proj.weight, 0.02 / 16**0.5),
        (block.mlp.proj.weight, 0.02 / 16**0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert block.attn.qkv.bias.abs().max() == 0


@pytest.mark.parametrize(
    "name, millions", [("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)]
)
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 30}, "30 cannot be split over 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 1001}, "exceeds the maximum of 1000"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": "9"}, "vocab_size is '9': it must be int"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"width": 3}, "GPTConfig has no setting width"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        checked(GPTConfig, **{**vars(CONFIG), **change})


# ---- generation --------------------------------------------------------------------------------------------------------


def test_greedy_generation_equals_taking_the_argmax_by_hand(model):
    text = [3, 1, 4]
    for _ in range(8):
        text.append(model(torch.tensor([text]))["logits"][0, -1].argmax().item())
    assert model.generate([[3, 1, 4]], max_new_tokens=8) == [text[3:]]


def test_a_batch_of_different_lengths_generates_what_each_prompt_does_alone(model):
    prompts = [[5], [3, 1, 4, 1, 5, 9], [2, 7]]
    alone = [model.generate([p], max_new_tokens=10)[0] for p in prompts]
    assert model.generate(prompts, max_new_tokens=10) == alone


def test_stop_tokens_end_a_row_and_not_the_others(model):
    prompts = [[5, 6], [3, 1]]
    free = model.generate(prompts, max_new_tokens=12)
    stop = next(token for token in free[0] if token not in free[1][: free[0].index(token) + 1])
    ended = model.generate(prompts, max_new_tokens=12, stop_tokens=[stop])
    assert ended[0] == free[0][: free[0].index(stop)]
    assert ended[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])
    assert model.generate([[5]], 3, stop_tokens=range(61)) == [[]]


def test_streaming_yields_token_by_token_what_generate_returns(model):
    streamed = list(model.stream([[1, 2], [3]], max_new_tokens=6))
    assert [list(row) for row in zip(*streamed, strict=True)] == model.generate([[1, 2], [3]], max_new_tokens=6)


def test_the_prompt_is_read_once_and_then_one_token_at_a_time(model, monkeypatch):
    widths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **kw: widths.append(x.shape[1]) or forward(x, **kw))
    model.generate([[1, 2, 3, 4]], max_new_tokens=5)
    assert widths == [4, 1, 1, 1, 1]


LOGITS = torch.log(torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]]))


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 5),
        ({"top_p": 0.71}, 3),  # 0.4 + 0.3 do not reach it
        ({"top_p": 0.01}, 1),
        ({"min_p": 0.3}, 3),  # 0.3 x 0.4 = 0.12
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.7}, 2),
    ],
)
def test_sampling_keeps_the_right_tokens_in_every_row(settings, kept):
    """Rows are filtered each on their own: a shared threshold is a bug that peers had for batches."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample(LOGITS, temperature=1.0, generator=generator, **settings) for _ in range(600)])
    assert set(draws[:, 0].tolist()) == set(range(kept))
    assert set(draws[:, 1].tolist()) == {4 - i for i in range(kept)}


def test_temperature_is_the_power_of_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sample(LOGITS[:1], temperature=0.5, generator=generator) for _ in range(4000)])
    expected = (LOGITS[0].exp() ** 2) / (LOGITS[0].exp() ** 2).sum()
    assert torch.allclose(draws.flatten().bincount(minlength=5) / 4000, expected, atol=0.03)
    assert sample(LOGITS, temperature=0).tolist() == [0, 4]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="empty prompt"):
        left_pad(prompts)


def test_decode_needs_no_model_call_for_its_first_token():
    assert list(decode(None, LOGITS, None, max_new_tokens=1)) == [[0, 4]]
