"""Laws of lib/answers.py: a batch answers like one prompt alone, whatever it shares; blind means blind; the loss is the slow
one."""

import re
from dataclasses import replace

import pytest
import torch

from data.batches import blind_pixels
from data.scene_batches import about_image
from data.scenes import corpus
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from gpt import KVCache
from lib import answers
from lib.answers import Item, answer, mean_answer_loss, scene_items
from lib.beam_search import continue_prompts
from lib.scores import score
from lib.tokenizer import BPETokenizer
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import MllamaImageProcessor, process_images

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 48, "n_heads": 4, "n_kv_groups": 2, "n_layers": 2, "hidden_dim": 64, "max_position_embeddings": 128}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAINED_TOKENIZER = []  # the corpus is read once for all tests


def build(fusion="early", **text):
    """An untrained VLM whose weights are far enough from zero for its words to depend on everything, and its processor."""
    if not TRAINED_TOKENIZER:
        TRAINED_TOKENIZER.append(BPETokenizer.train(corpus()[:400], vocab_size=330, special_tokens=CHATML))
    tokenizer = BPETokenizer(TRAINED_TOKENIZER[0]._spec, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    tokenizer.chat_template = "chatml"
    tokens = 1 if fusion == "cross" else 4
    processor = MllamaImageProcessor(tokenizer, num_image_token=tokens, image_size=32, add_location_tokens=False)
    torch.manual_seed(0)
    parts = VISION, TEXT | {"vocab_size": len(tokenizer)} | text
    if fusion == "cross":
        config = CrossAttentionConfig(*parts, image_token_id=processor.image_token_id, cross_every=1)
        model = CrossAttentionVLM(config).eval()
    else:
        model = MllamaForConditionalGeneration(MLLAMAConfig(*parts, image_token_id=processor.image_token_id)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model, processor


def photos(count, seed=0):
    torch.manual_seed(seed)
    return [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(count)]


def mixed_items():
    """Shared and lone images, two images, none, a longer conversation, a question that is asked twice."""
    a, b, c = photos(3)
    items = [Item(a, about_image(q), t) for q, t in (("Count the digits.", "3"), ("Is there a 5?", "no"), ("What?", "a red 7"))]
    items += [Item([b], about_image("Describe the picture."), "a red 7 at the top left", "describe"), items[0]]
    items += [Item([a, c], [{"role": "user", "content": "<image>then <image>which is red?"}], "the first", "two")]
    items += [Item(None, [{"role": "user", "content": text}], "yes", "text") for text in ("Is it so?", "Is it not so, then?")]
    turns = [*about_image("Add up the digits."), {"role": "assistant", "content": "3 plus 4 is 7"}]
    return items + [Item(c, [*turns, {"role": "user", "content": "Is there a 4?"}], "yes", "later")]


def slow_answer(model, processor, item, new_tokens, beams=1):
    """One prompt by the processor and the model's own generate, without a batch and without anything shared."""
    batch = processor(None, item.images or None, [item.messages], add_generation_prompt=True)
    stop = answers.stop_tokens(model, processor.tokenizer)
    if beams > 1:
        prompts, seen = batch.pop("input_ids"), {key: batch[key] for key in batch if key != "attention_mask"}
        return processor.decode(continue_prompts(model, prompts, beams, new_tokens, stop, **seen)[0][0].ids).strip()
    return processor.decode(model.generate(**batch, max_new_tokens=new_tokens, stop_tokens=stop)[0]).strip()


@pytest.mark.parametrize("fusion", ["early", "cross"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_a_batch_answers_like_each_prompt_alone(fusion, batch_size):
    model, processor = build(fusion)
    items = mixed_items()
    wanted = [slow_answer(model, processor, item, 12) for item in items]
    assert len(set(wanted)) >= len(items) - 2  # or the comparison would show nothing
    assert answer(model, processor, items, batch_size, 12) == wanted
    searched = [slow_answer(model, processor, item, 12, beams=3) for item in items]
    assert answer(model, processor, items, batch_size, 12, beams=3) == searched != wanted


def test_rows_that_stop_early_do_not_change_the_others(monkeypatch):
    """Stop tokens that some rows meet soon and others late: rows leave the batch at several points on the way."""
    model, processor = build()
    items = [Item(image, about_image(q), "") for image in photos(4) for q in ("Count the digits.", "Is there a 5?", "What?")]
    plain = [processor.tokenizer.encode(text) for text in answer(model, processor, items, None, 20)]
    common = [token for token, _ in sorted(((t, sum(t in row for row in plain)) for t in range(330)), key=lambda x: -x[1])[:6]]
    monkeypatch.setattr(answers, "stop_tokens", lambda model, tokenizer: set(common))
    sizes, select = [], KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda cache, rows: sizes.append(len(rows)) or select(cache, rows))
    said = answer(model, processor, items, None, 20)
    assert said == [slow_answer(model, processor, item, 20) for item in items]
    assert sizes[0] == len(items) and len(sizes) >= 3 and sizes == sorted(sizes, reverse=True), sizes


def test_answers_end_with_a_turn_or_at_their_own_limit():
    model, processor = build()
    assert answers.stop_tokens(model, processor.tokenizer) == {processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    logits, cache = start(model, processor, mixed_items()[:3])
    assert [len(row) for row in answers.continue_rows(model, logits, cache, [2, 5, 1], stop=set())] == [2, 5, 1]


def start(model, processor, items):
    rows = answers.prompt_rows(processor, items, False, False)
    with torch.no_grad():
        cache, prefixes = answers.prefill(model, processor, items, rows, False, 8, {})
        cache = cache.select(prefixes)
        out = model.language_model(**answers.own_parts(rows, cache), cache=cache, logits_to_keep=1)
    return out["logits"][:, -1], cache


def test_the_vision_tower_sees_each_image_once(monkeypatch):
    model, processor = build()
    seen, features = [], model.image_features
    monkeypatch.setattr(model, "image_features", lambda pixels: seen.append(len(pixels)) or features(pixels))
    items = scene_items("test", 5, seed=1)
    known = {}
    said = answer(model, processor, items, None, 2, encoded=known)
    assert len(items) > 30 and seen == [5]
    losses = answers.answer_losses(model, processor, items, encoded=known)
    assert said == answer(model, processor, items, None, 2, encoded=known) and seen == [5]
    for one, other in zip(losses, answers.answer_losses(model, processor, items), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    mean_answer_loss(model, processor, items)
    answer(model, processor, items, None, 2, blind=True)  # where all are the same image
    assert seen == [5, 5, 5, 1]


def test_questions_about_scenes_carry_their_truth_and_share_their_image():
    items = scene_items("test", 3, seed=1, per_scene=4)
    assert len({id(item.image) for item in items}) == 3 and len(items) == 12
    assert all(item.messages[0]["content"].startswith("<image>\n") and item.answer and item.kind for item in items)


# ---- blind ---------------------------------------------------------------------------------------------------------------


def test_blind_answers_do_not_depend_on_the_image_and_need_none():
    model, processor = build()
    asked = about_image("Describe the picture.")
    first, second = ([Item(image, asked, "")] for image in photos(2))
    assert answer(model, processor, first) != answer(model, processor, second)
    nowhere = [Item("nowhere/at/all.png", asked, "")]
    assert answer(model, processor, first, blind=True) == answer(model, processor, nowhere, blind=True)
    assert mean_answer_loss(model, processor, first, blind=True) == mean_answer_loss(model, processor, nowhere, blind=True)


def test_blind_is_an_image_of_the_mean_colour():
    model, processor = build()
    pixels = process_images(photos(2), (32, 32))
    assert blind_pixels(pixels).shape == pixels.shape and not blind_pixels(pixels).any()
    grey = (128 / 255,) * 3  # which becomes 0
    processor.image_settings = replace(processor.image_settings, image_mean=grey)
    item = Item(torch.full((3, 32, 32), 128, dtype=torch.uint8), about_image("Count the digits."), "3")
    blind, seen = (mean_answer_loss(model, processor, [item], blind=b)[0] for b in (True, False))
    assert blind == pytest.approx(seen, rel=1e-4)


# ---- the model is left as it was --------------------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_been_asked():
    """Dropout and gradients are off while answering; afterwards each part trains as before, or not: a frozen tower does not."""
    model, processor = build(dropout=0.5)
    items = mixed_items()
    model.train()
    model.vision_tower.eval()
    assert answer(model, processor, items, None, 4) == answer(model, processor, items, None, 4)
    assert mean_answer_loss(model, processor, items) == mean_answer_loss(model, processor, items)
    assert model.language_model.training and not model.vision_tower.training and torch.is_grad_enabled()
    batch = processor.conversation([*items[0].messages, {"role": "assistant", "content": "3"}], items[0].image)
    model(**batch)["loss"].backward()


def test_a_model_that_learned_two_answers_gives_them():
    """End to end: images, prompt, training, decoding, score. The two questions differ in nothing but the image."""
    model, processor = build()
    said = ("a red 7 at the top left", "no")
    items = [Item(image, about_image("What?"), text) for image, text in zip(photos(2), said, strict=True)]
    conversations = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in items]
    batch = processor(None, [[item.image] for item in items], conversations)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert answer(model, processor, items) == [*said]
    assert score(items, answer(model, processor, items))["exact_match"] == 1
    assert mean_answer_loss(model, processor, items)[0] < 0.1
    assert score(items, answer(model, processor, items, blind=True))["right"] <= 1


# ---- perplexity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["early", "cross"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_loss_is_what_adding_up_logarithms_gives(fusion, batch_size):
    """By hand: each answer token's probability after all tokens before it, one conversation at a time. Of several turns only
    the last answer counts."""
    model, processor = build(fusion)
    items, total, count = mixed_items(), 0.0, 0
    for item in items:
        conversation = [*item.messages, {"role": "assistant", "content": item.answer}]
        batch = processor(None, item.images or None, [conversation])
        labels = batch.pop("labels")[0]
        prompt = processor(None, item.images or None, [item.messages], add_generation_prompt=True)["input_ids"].shape[1]
        with torch.no_grad():
            logits = model(**batch)["logits"][0].log_softmax(-1)
        for t in range(prompt, len(labels)):
            if labels[t] >= 0:
                total, count = total - float(logits[t - 1, labels[t]]), count + 1
    assert count == sum(len(processor.tokenizer.encode(item.answer)) + 1 for item in items)
    loss, tokens = mean_answer_loss(model, processor, items, batch_size)
    assert tokens == count and loss == pytest.approx(total / count, rel=1e-5)


# ---- faults ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item, message",
    [
        (Item(None, about_image("What?"), ""), "says <image> 1 times and has 0 images"),
        (Item(photos(2), about_image("What?"), ""), "says <image> 1 times and has 2 images"),
        (Item("gone.png", about_image("What?"), ""), "gone.png"),
        (
            Item(None, [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "7"}], ""),
            "end with the question",
        ),
        (Item(None, [{"role": "user", "content": "What? " * 100}], ""), "leaves no room for its answer"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(item, message):
    model, processor = build()
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        answer(model, processor, [item])
    assert "\n" not in str(error.value)


def test_a_full_context_ends_an_answer_and_disturbs_no_other():
    model, processor = build(context_length=48)
    short, long = Item(None, [{"role": "user", "content": "A?"}], ""), Item(None, [{"role": "user", "content": "A " * 12}], "")
    together = answer(model, processor, [short, long], max_new_tokens=25)
    assert together == [answer(model, processor, [item], max_new_tokens=25)[0] for item in (short, long)]
    assert 0 < len(processor.tokenizer.encode(together[1])) < len(processor.tokenizer.encode(together[0]))
