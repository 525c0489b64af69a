"""lib/fast_decode.py: the same logits as the model's own, whatever happened to its weights in between. (Whole answers and the
cache: tests/core/test_model.py.)"""

import copy

import pytest
import torch

from lib.fast_decode import OneToken, fast_step
from lib.lora import merge_lora
from model import convert_linears_to_lora
from toys import close, make, random_ids


@pytest.fixture(scope="module")
def ids():
    return random_ids(3, 12)


@pytest.mark.parametrize("threads", [1, 2, 4, 7])
def test_one_token_on_all_cores(ids, monkeypatch, threads):
    """The sizes here split over 2 and 4 threads, the vocabulary of 61 over none."""
    model = make()
    step = fast_step(model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.no_grad():
        cache = model.new_cache(1, 12)
        model(ids[:1, :11], cache=cache)
        close(step(ids[:1, 11:], cache)["logits"], model(ids[:1])["logits"][:, 11:])


def test_arranging_for_decoding_moves_weights_only_in_memory(ids):
    model = make(tie_word_embeddings=True)
    before, logits = copy.deepcopy(model.state_dict()), model(ids)["logits"]
    assert not OneToken(model).complete
    assert fast_step(model).complete
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    close(model(ids)["logits"], logits)
    copied = copy.deepcopy(model)
    assert OneToken(model).complete and not OneToken(copied).complete

    model(ids, labels=ids)["loss"].backward()
    torch.optim.AdamW(model.parameters()).step()  # the fast step sees what training does to the weights
    with torch.no_grad():
        caches = [model.new_cache(3, 12), model.new_cache(3, 12)]
        for cache in caches:
            model(ids[:, :11], cache=cache)
        close(OneToken(model)(ids[:, 11:], caches[0])["logits"], model(ids[:, 11:], cache=caches[1])["logits"])
    convert_linears_to_lora(model, 2, 4, targets=["k_proj"])
    assert not OneToken(model).complete
    merge_lora(model)
    assert OneToken(model).complete
    model.load_state_dict(before, assign=True)
    assert not OneToken(model).complete


@pytest.mark.parametrize("settings", [{"attention": "explicit"}, {"attention_bias": True}, {"mlp_bias": True}])
def test_a_decoder_that_does_not_gain_has_no_fast_step(settings):
    assert fast_step(make(**settings)) is None
