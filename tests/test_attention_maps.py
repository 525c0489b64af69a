"""Laws of attention_maps.py: a map is what the trace says, laid on the right part of the right image; nothing looks ahead;
and of the images that figures.py draws of it: the hottest place is the brightest, signs tell right from wrong."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from extras.attention_maps import METHODS, attention_over_image_tokens, group_into_words
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib import figures
from lib.trace import record
from model import MLLAMAConfig, MllamaForConditionalGeneration, pixel_shuffle

IMAGE = 49
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": (16, 24), "patch_size": 4}  # 4 x 6 patches
TEXT = {"vocab_size": 50, "hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 3, "hidden_dim": 48}
TEXT |= {"max_position_embeddings": 64}
KINDS = {"shuffled": {"pixel_shuffle": 2}, "plain": {}, "cross": {"cross_every": 2}}
ANSWER = [7, 31, 2, 18]


@pytest.fixture(params=KINDS)
def model(request):
    torch.manual_seed(0)
    config_class, model_class = MLLAMAConfig, MllamaForConditionalGeneration
    if request.param == "cross":
        config_class, model_class = CrossAttentionConfig, CrossAttentionVLM
    model = model_class(config_class(VISION, TEXT, image_token_id=IMAGE, **KINDS[request.param])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def prompt(model, images: int = 2) -> dict[str, torch.Tensor]:
    """Words, an image, a word, an image, words."""
    torch.manual_seed(1)
    N = model.config.text_config.num_image_tokens
    ids = [3, 4] + [IMAGE] * N + [5] + [IMAGE] * N * (images - 1) + [6, 8]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(images, 3, 16, 24)}


def traced(model, batch, answer=ANSWER) -> dict:
    """All weights of a pass over prompt and whole answer."""
    with torch.no_grad(), record(model, "language_model.*.weights") as seen:
        model(torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1), batch["pixel_values"])
    if isinstance(model, CrossAttentionVLM):
        return [seen[f"language_model.model.cross_layers.{i}.weights"][0] for i in (0, 2)]
    return [seen[f"language_model.model.layers.{i}.self_attn.weights"][0] for i in (0, 1, 2)]


def test_a_map_is_what_the_trace_says(model):
    """By loops: token k was produced at the place before it; image token n of image i lies in row n // w, column n % w."""
    batch = prompt(model)
    maps, layers = attention_over_image_tokens(model, ANSWER, **batch), traced(model, batch)
    ids = batch["input_ids"][0].tolist()
    cross, (I, h, w) = isinstance(model, CrossAttentionVLM), maps.shape[1:]
    assert maps.shape[0] == len(ANSWER) and (h, w) == ((2, 3) if model.config.pixel_shuffle == 2 else (4, 6))
    columns = list(range(I * h * w)) if cross else [place for place, token in enumerate(ids) if token == IMAGE]
    for k in range(len(ANSWER)):
        for i in range(I):
            for n in range(h * w):
                seen = [
                    float(weights[head, len(ids) - 1 + k, columns[i * h * w + n]]) for weights in layers for head in range(4)
                ]
                assert float(maps[k, i, n // w, n % w]) == pytest.approx(sum(seen) / len(seen), abs=1e-6)
    total = maps.sum(dim=(1, 2, 3))
    assert torch.allclose(total, torch.ones(len(ANSWER))) if cross else bool((total < 1).all() and (total > 0).all())


def test_rollout_is_the_product_of_the_layers(model):
    """Share by share: what a token holds after a layer is half its own, half what it looked at."""
    batch = prompt(model)
    maps, layers = attention_over_image_tokens(model, ANSWER, **batch, method="rollout"), traced(model, batch)
    if isinstance(model, CrossAttentionVLM):
        assert torch.equal(maps, attention_over_image_tokens(model, ANSWER, **batch))
        return
    S, first = layers[0].shape[-1], batch["input_ids"].shape[1] - 1
    holds = [[float(s == t) for s in range(S)] for t in range(S)]
    for weights in layers:
        mean = weights.mean(dim=0).tolist()
        looked = [[sum(mean[t][u] * holds[u][s] for u in range(t + 1)) for s in range(S)] for t in range(S)]
        holds = [[(mine + theirs) / 2 for mine, theirs in zip(*pair, strict=True)] for pair in zip(holds, looked, strict=True)]
    rows = torch.tensor(holds)[first : first + len(ANSWER)]
    assert torch.allclose(rows.sum(dim=1), torch.ones(len(ANSWER)))
    expected = rows[:, : len(batch["input_ids"][0])][:, batch["input_ids"][0] == IMAGE]
    assert torch.allclose(maps.flatten(1), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_no_token_looks_at_later_ones(model, method):
    """The weights on all that stands later are 0, and another end of the answer changes no map before it."""
    batch = prompt(model)
    if not isinstance(model, CrossAttentionVLM):
        assert all(bool((weights.triu(1) == 0).all()) for weights in traced(model, batch))
    maps = attention_over_image_tokens(model, ANSWER, **batch, method=method)
    for k in range(1, len(ANSWER) + 1):
        other = attention_over_image_tokens(model, [*ANSWER[:k], 40], **batch, method=method)
        assert torch.allclose(other[:k], maps[:k], atol=1e-6)
    changed = attention_over_image_tokens(model, [9, *ANSWER[1:]], **batch, method=method)
    assert not torch.allclose(changed[1:], maps[1:], atol=1e-4)


def test_features_made_before_give_the_same_maps(model):
    batch = prompt(model)
    with torch.no_grad():
        features = model.image_features(batch["pixel_values"])
    again = attention_over_image_tokens(model, ANSWER, batch["input_ids"].tolist(), image_features=features)
    assert torch.equal(again, attention_over_image_tokens(model, ANSWER, **batch))


def test_a_planted_look_lands_on_its_place(model):
    """A feature that every head takes for the best match draws the map to its own image, row and column."""
    batch = prompt(model)
    with torch.no_grad():
        features = model.image_features(batch["pixel_values"])
    before = attention_over_image_tokens(model, ANSWER, batch["input_ids"], image_features=features)
    h, w = before.shape[2:]
    for image, row, column in ((0, 1, 2), (1, h - 1, 0)):
        planted = features.clone().requires_grad_()
        for _ in range(12):  # climb towards it: the weights on one place as a function of that place's feature
            ids = torch.cat([batch["input_ids"], torch.tensor([ANSWER[:-1]])], dim=1)
            with record(model, "*.weights") as seen:
                model(ids, image_features=planted)
            cross = isinstance(model, CrossAttentionVLM)
            place = image * h * w + row * w + column
            if not cross:
                place = int((ids[0] == IMAGE).nonzero()[place])
            weights = seen[f"language_model.model.{'cross_layers.0' if cross else 'layers.0.self_attn'}.weights"]
            (grad,) = torch.autograd.grad(weights[0, :, -len(ANSWER) :, place].clamp(min=1e-9).log().sum(), planted)
            with torch.no_grad():
                planted[image, row * w + column] += grad[image, row * w + column]
        gain = attention_over_image_tokens(model, ANSWER, batch["input_ids"], image_features=planted.detach()) - before
        gain = gain.sum(dim=0)
        assert tuple(int(i) for i in torch.unravel_index(gain.argmax(), gain.shape)) == (image, row, column)


def test_a_token_of_the_grid_is_a_square_of_the_image():
    """After pixel shuffle token n holds the patches of rows r (n // w) ... and columns r (n % w) ...: the maps count on it."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    patches = torch.stack([rows, columns], dim=-1).view(1, 24, 2)
    middles = pixel_shuffle(patches, (4, 6), 2).view(2, 3, 4, 2).mean(dim=2)
    assert middles[..., 0].tolist() == [[0.5] * 3, [2.5] * 3] and middles[..., 1].tolist() == [[0.5, 2.5, 4.5]] * 2


@pytest.mark.parametrize(
    "pieces, words",
    [
        (["a", " ye", "llow", " 7", "."], {"a": [0], "yellow": [1, 2], "7.": [3, 4]}),
        ([" ", "7", " ", "8", "9"], {"7": [0, 1], "89": [2, 3, 4]}),  # digits apart from their blank
        (["red", "\n", "blue", "\n"], {"red": [0], "blue": [1, 2, 3]}),
        (["", "red", "", " 3", ""], {"red": [0, 1, 2], "3": [3, 4]}),  # special tokens decode to nothing
        (["\n"], {"": [0]}),
    ],
)
def test_tokens_become_words(pieces, words):
    maps = torch.rand(len(pieces), 2, 3, 3)
    found, grouped = group_into_words(range(len(pieces)), maps, lambda ids: "".join(pieces[i] for i in ids))
    assert found == list(words)
    assert torch.allclose(grouped, torch.stack([maps[places].mean(dim=0) for places in words.values()]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_ids": torch.ones(2, 40, dtype=torch.long)}, "must be one row"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "without padding"),
        ({"answer_ids": []}, "at least one token"),
        ({"pixel_values": None}, "no image to attend to"),
        ({"method": "max"}, "must be mean or rollout"),
    ],
)
@pytest.mark.parametrize("model", ["shuffled"], indirect=True)
def test_what_has_no_map_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        attention_over_image_tokens(model, **{"answer_ids": ANSWER, **prompt(model), **changes})


@pytest.mark.parametrize("model", ["shuffled"], indirect=True)
def test_tokens_that_lie_on_no_grid_are_a_strip(model):
    """As of a projector that asks its own questions of the patches: here 5 tokens of an image in place of 2 x 3."""
    model.config.text_config.num_image_tokens = 5
    maps = attention_over_image_tokens(model, ANSWER, prompt(model)["input_ids"], image_features=torch.randn(2, 5, 32))
    assert maps.shape == (len(ANSWER), 2, 1, 5)
    heat = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    drawn = figures.heat_over(torch.full((3, 20, 25), 128, dtype=torch.uint8), heat)
    assert drawn.shape == (25, 25, 3) and drawn[:20].std() < 1e-6  # the image itself shows no place
    assert drawn[22].sum(dim=1).argmax() // 5 == 3


@pytest.mark.parametrize("model", ["shuffled"], indirect=True)
def test_a_model_in_training_is_refused_and_left_as_it_was(model):
    model.train()
    with pytest.raises(ValueError, match="call model.eval"):
        attention_over_image_tokens(model, ANSWER, **prompt(model))
    assert model.training and replace(model.config) == model.config


# ---- the images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shade", [0, 128, 255, None])
def test_what_is_looked_at_is_the_brightest_on_any_image(shade):
    """In grey as well, so that a print without colours, or an eye without some, sees it."""
    torch.manual_seed(0)
    image = torch.randint(256, (3, 32, 32)) if shade is None else torch.full((3, 32, 32), shade)
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    drawn = figures.heat_over(image.to(torch.uint8), heat)
    grey = drawn @ torch.tensor([0.299, 0.587, 0.114])
    y, x = divmod(int(grey.argmax()), 32)
    assert drawn.shape == (32, 32, 3) and (y // 8, x // 8) == (1, 2)
    assert 0 <= drawn.min() and drawn.max() <= 1 and grey.max() > 1.2 * grey[:8].max()


def texts(figure) -> list[str]:
    return [t.get_text() for axes in figure.axes for t in (*axes.texts, axes.title) if t.get_text()]


@pytest.mark.parametrize("words, images, panels", [(1, 1, 2), (4, 2, 12), (6, 1, 7)])
def test_an_overlay_has_a_panel_a_word_and_the_images(tmp_path, words, images, panels):
    """4 words on 2 lines: 8 panels and 4 of the images as they are; no more than `most` words are drawn."""
    said, maps = [f"w{i}$x^{{" for i in range(words)], torch.rand(words, images, 2, 2) / 100
    shown = [torch.randint(256, (3, 16, 24), dtype=torch.uint8) for _ in range(images)]
    figure = figures.attention_overlay(shown, said, maps, tmp_path / "a.png", "What costs $5 or $7?", columns=3, most=5)
    assert len(figure.axes) == panels and Image.open(tmp_path / "a.png").format == "PNG"
    assert texts(figure) == [f"{word}\n{float(m.sum()):.0%}" for word, m in zip(said[:5], maps[:5], strict=True)]
    shown = " ".join(figure.get_suptitle().split())
    assert ("the first 5 of 6 words" in shown) == (words == 6)


def test_an_answer_sheet_marks_right_and_wrong_by_sign_and_colour(tmp_path):
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    answers = ["Two", "a  Red 3", "blue " * 60, "anything", "\x07"]
    truths = ["2", "a red 3", "blue", None, ""]
    figure = figures.answer_sheet(images, ["How many?"] * 5, answers, truths, tmp_path / "a.png", columns=3)
    said = [(t.get_text(), t.get_color()) for axes in figure.axes for t in axes.texts]
    signs = {text[0]: colour for text, colour in said if text[0] in "✓✗"}
    assert signs == {"✓": figures.BLUE, "✗": figures.RED}
    assert [text[:1] for text, _ in said if not text.startswith(("How", "truth"))] == ["✗", "✓", "✗", "a", "✗"]
    assert [text for text, _ in said if text.startswith("truth")] == ["truth: 2", "truth: blue", "truth:"]
    assert max(len(line) for text, _ in said for line in text.split("\n")) <= 34 and any("..." in text for text, _ in said)
    judged = figures.answer_sheet(images[:1], ["?"], ["Two"], ["2"], good=[True], title="what it saw, what it was asked")
    assert texts(judged) == ["?", "✓ Two"]
    assert judged.get_suptitle().count("\n") == 1, "over a single image a title has two lines; it was cut off at both ends"
