"""Laws of lib/beam_search.py: the answers and scores of transformers' beam search, for all decoders, lengths and ends."""

import pytest
import torch

from gpt import GPT, GPTConfig
from lib.beam_search import beam_search, continue_prompts
from lib.checkpoint import save_pretrained
from lib.fast_decode import fast_step
from lib.generation import LogitRules
from toys import make, make_vlm, place, random_ids, shaken, words_and_images

transformers = pytest.importorskip("transformers", reason="the search is compared with transformers'")
NEW = 9


def sharp(model):
    """So that tokens differ in likelihood as a trained model's do, and beams end at different lengths."""
    with torch.no_grad():
        getattr(model, "language_model", model).lm_head.weight.mul_(4)
    return model


def gpt():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "context_length": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sharp(shaken(GPT(GPTConfig(**sizes))))


@pytest.fixture(scope="module", params=["gpt", "llama", "vlm"])
def pair(request, tmp_path_factory):
    """(our model, prompts, what else it takes, transformers' model, its input)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "vlm":
        ours = sharp(make_vlm(projector_type="mlp", vision_feature_layer=-2))
        prompts, pixels = words_and_images(ours.config.text_config.num_image_tokens)
        more = {"pixel_values": pixels}
    else:
        ours, more = gpt() if request.param == "gpt" else sharp(make()), {}
        prompts = [random_ids(n, seed=n).tolist() for n in (9, 4, 1)]
    save_pretrained(ours, folder)
    auto = "AutoModelForImageTextToText" if more else "AutoModelForCausalLM"
    theirs = getattr(transformers, auto).from_pretrained(folder)
    input_ids, mask = place(prompts, "left", max(map(len, prompts)))
    return ours, prompts, more, theirs, {"input_ids": input_ids, "attention_mask": mask, **more}


def their_answers(theirs, batch, beams, stop, length_penalty, **more):
    settings = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": length_penalty, "early_stopping": False}
    settings |= {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": stop or None}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    out = theirs.generate(**batch, **settings, **more)
    rows = [row[batch["input_ids"].shape[1] :].tolist() for row in out.sequences]
    ends = [next((t for t, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)], out.sequences_scores


@pytest.mark.parametrize("beams, ends, length_penalty", [(3, 0, 1.0), (3, 1, 1.0), (4, 7, 1.0), (3, 7, 0.0), (2, 7, 2.0)])
def test_hypotheses_and_scores_are_those_of_transformers(pair, beams, ends, length_penalty):
    """All beams of all prompts, with none, one and several tokens that end a text."""
    ours, prompts, more, theirs, batch = pair
    (likely,) = continue_prompts(ours, prompts[:1], 1, NEW, **{k: v[:2] for k, v in more.items()})
    stop = list(dict.fromkeys([*likely[0].ids[2:3], *range(40, 60)]))[:ends]
    found = continue_prompts(ours, prompts, beams, NEW, stop, length_penalty, **more)
    ids, scores = their_answers(theirs, batch, beams, stop, length_penalty)
    assert [each.ids for row in found for each in row] == ids
    torch.testing.assert_close(torch.tensor([each.score for row in found for each in row]), scores, atol=1e-4, rtol=1e-4)
    assert not ends or len({len(each) for each in ids}) > 1, "some end before others"


def test_a_folders_rules_hold_in_each_beam(pair):
    ours, prompts, more, theirs, batch = pair
    rules, stop = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3}, list(range(40, 60))
    found = continue_prompts(ours, prompts, 3, NEW, stop, rules=LogitRules(rules, stop), **more)
    ids, _ = their_answers(theirs, batch, 3, stop, 1.0, **rules)
    assert [each.ids for row in found for each in row] == ids
    plain = continue_prompts(ours, prompts, 3, NEW, stop, **more)
    assert [row[0].ids for row in found] != [row[0].ids for row in plain] and all(len(row[0].ids) >= 3 for row in found)


def test_one_beam_is_greedy_and_a_fast_step_searches_alike():
    model, prompts = sharp(make()), [random_ids(n, seed=n).tolist() for n in (5, 2)]
    greedy = model.generate(prompts, NEW, stop_tokens=[7])
    assert [row[0].ids for row in continue_prompts(model, prompts, 1, NEW, [7])] == greedy
    slow = continue_prompts(model, prompts, 3, NEW, [7])
    fast = continue_prompts(model, prompts, 3, NEW, [7], step=fast_step(model))
    assert [each.ids for row in slow for each in row] == [each.ids for row in fast for each in row]


def test_it_finds_what_greedy_decoding_misses():
    """A table of which token follows which: 1 is likelier at first, but all that follows 1 is unlikely."""
    follows = torch.tensor([[0.0, 0.5, 0.4, 0.1, 0.0], [0.0, 0.3, 0.3, 0.2, 0.2], [0.0, 0.0, 0.0, 0.1, 0.9]]).log()
    cache = make().new_cache(1, 8)

    def step(ids, cache):
        return {"logits": follows[ids.clamp(max=2)]}

    ((best, *_),) = beam_search(step, follows[:1], cache, [5], stop={4}, beams=2, length_penalty=0.0)
    assert best.ids == [2] and best.score == pytest.approx(torch.tensor(0.4 * 0.9).log().item())


def test_more_beams_than_tokens_are_refused():
    with pytest.raises(ValueError, match="--beams 61: it must be 1 to 60"):
        continue_prompts(make(), [[1]], 61, 2, [7])
