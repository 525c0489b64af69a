"""Laws of augment.py: operations do what their names say, all randomness is the generator's, targets fit the mix."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from data.augment import PRESETS, Augment, AugmentConfig, _symmetric_beta, crop_and_flip, cutout, mix, normalize_images
from data.datasets import DATASETS, load_images
from data.rand_augment import COLOUR_OPS, GEOMETRY_OPS, rand_augment
from data.warp import GEOMETRY, warp

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(n: int = 64, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    """Noise over a slope, so that every pixel and direction can be told apart."""
    slope = torch.linspace(0, 100, width) + torch.linspace(0, 90, height)[:, None]
    return (slope + torch.randint(0, 64, (n, channels, height, width), generator=rng(9))).to(torch.uint8)


# ---- the whole ----


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 20, 28)])
def test_every_preset_keeps_shape_and_input_and_repeats_with_its_generator(name, channels, height, width):
    images = some_images(16, channels, height, width)
    before, augment = images.clone(), Augment(PRESETS[name], (0.4,) * channels, (0.2,) * channels)
    generator = rng()
    first = augment(images, generator)
    state = generator.get_state()
    second = augment(images, generator)
    assert first.dtype == torch.float32 and first.shape == images.shape and first.isfinite().all()
    assert torch.equal(images, before)
    assert torch.equal(augment(images, rng()), first)
    assert name == "none" or not torch.equal(first, second)
    assert torch.equal(augment(images, generator.set_state(state)), second)  # a resumed run goes on as it would have


def test_without_augmentation_it_is_normalise_and_that_gives_mean_0_and_deviation_1():
    train, _ = load_images("digits")
    x = normalize_images(train.images, *train.mean_std())
    assert x.mean().abs() < 1e-5 and (x.std() - 1).abs() < 1e-3
    assert torch.equal(Augment(PRESETS["none"], *train.mean_std())(train.images, rng()), x)


def test_only_data_sets_that_allow_it_are_mirrored():
    assert set(PRESETS) == {"none", "light", *DATASETS}
    assert {name for name in DATASETS if PRESETS[name].flip} == {"fashion-mnist", "cifar10", "folder"}


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_wrong_images_are_refused(wrong):
    for call in (lambda: normalize_images(wrong, **PLAIN), lambda: Augment(PRESETS["none"], **PLAIN)(wrong, rng())):
        with pytest.raises(ValueError, match=r"expected torch.uint8 \[B"):
            call()


@pytest.mark.parametrize("wrong", [{"padding": "edge"}, {"magnitude": 1.5}, {"crop": -0.1}, {"cutout": 2}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", PRESETS)
def test_a_cpu_generator_gives_the_gpu_the_same_images(name):
    images, labels, c = some_images(), torch.arange(64) % 10, PRESETS[name]
    outputs = []
    for device in ("cpu", "cuda"):
        generator = rng()
        x = Augment(c, **PLAIN)(images.to(device), generator)
        outputs.append(mix(x, labels.to(device), 10, generator, c.mixup_alpha, c.cutmix_alpha, c.label_smoothing))
    for on_cpu, on_gpu in zip(*outputs, strict=True):
        assert ((on_cpu - on_gpu.cpu()).abs() < 1e-3).float().mean() > 0.99  # posterize may round the other way


# ---- movements ----


def moved(**parameters: float) -> torch.Tensor:
    return torch.tensor([[parameters.get(name, 0.0) for name in GEOMETRY]])


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
def test_no_movement_is_the_identity(padding):
    x = some_images(2, 3, 12, 20) / 255
    assert torch.allclose(warp(x, moved().expand(2, -1), padding), x, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"rotate": 90}, lambda x: x.rot90(1, (2, 3))),
        ({"rotate": 180}, lambda x: x.flip(2, 3)),
        ({"shift_x": 2 / 16}, lambda x: F.pad(x, (0, 2))[..., 2:]),
        ({"shift_y": -3 / 16}, lambda x: F.pad(x, (0, 0, 3, 0))[..., :-3, :]),
        ({"scale": 1.0}, lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")[..., 8:-8, 8:-8]),
        ({"rotate": 90, "shift_x": 2 / 16}, lambda x: F.pad(x, (0, 2))[..., 2:].rot90(1, (2, 3))),
        ({"rotate": 90, "shear_x": 0.3}, lambda x: warp(x.rot90(1, (2, 3)), moved(shear_x=0.3), "zeros")),
        ({"rotate": 90, "shear_y": 0.3}, lambda x: warp(x.rot90(1, (2, 3)), moved(shear_y=0.3), "zeros")),
    ],
)
def test_a_movement_is_what_its_name_says(parameters, wanted):
    x = some_images(1) / 255
    out = warp(x, moved(**parameters), "zeros")
    inner = (..., slice(1, -1), slice(1, -1))  # at the rim, zooming blends with what lies outside
    assert torch.allclose(out[inner], wanted(x)[inner], atol=1e-4)


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear_moves_rows_along_by_their_distance_from_the_centre(name):
    x = torch.zeros(1, 1, 33, 33)
    x[..., 16] = 1  # a line through the centre
    x = x if name == "shear_x" else x.transpose(2, 3)
    out = warp(x, moved(**{name: 0.5}), "zeros")
    out = out if name == "shear_x" else out.transpose(2, 3)
    assert [int(row.argmax()) for row in out[0, 0]][4::8] == [22, 18, 14, 10]


def test_images_that_are_not_square_turn_without_shearing():
    x = torch.zeros(1, 1, 12, 24)
    x[..., 3:9, 9:15] = 1  # a square in the middle looks the same after a quarter turn
    assert torch.allclose(warp(x, moved(rotate=90), "zeros"), x, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(padding, flip):
    """The slow clear version: pad, list all windows and their mirror images, and find each result among them."""
    images = some_images(200, 3, 8, 16)
    out = crop_and_flip(images, 0.125, flip, padding, rng())
    padded = F.pad(images.float(), (2, 2, 1, 1), mode="reflect" if padding == "reflection" else "constant").to(
        torch.uint8
    )
    windows = [padded[..., y : y + 8, x : x + 16] for y in range(3) for x in range(5)]
    windows = torch.stack(windows + ([w.flip(3) for w in windows] if flip else []))  # [windows, B, C, H, W]
    hits = (windows == out).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    assert hits.any(1).all()  # each window turns up


# ---- colours ----


def by_pillow(name: str, image: Image.Image, strength: float) -> Image.Image:
    if name in ("brightness", "contrast", "saturation", "sharpness"):
        enhance = {"saturation": "Color"}.get(name, name.title())
        return getattr(ImageEnhance, enhance)(image).enhance(1 + 0.9 * strength)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * abs(strength)))
    if name == "solarize":
        return ImageOps.solarize(image, math.ceil(255 * (1 - abs(strength))))
    return getattr(ImageOps, name)(image)


@pytest.mark.parametrize("name", COLOUR_OPS)
@pytest.mark.parametrize("strength", [-0.9, -0.25, 0.5, 0.9])
def test_colour_operations_agree_with_pillow(name, strength):
    images = some_images(4, 3, 128, 128)
    ours = COLOUR_OPS[name](images / 255, torch.full((4, 1, 1, 1), strength)).clamp(0, 1) * 255
    for mine, image in zip(ours, images, strict=True):
        theirs = by_pillow(name, Image.fromarray(image.permute(1, 2, 0).numpy()), strength)
        difference = np.abs(mine.permute(1, 2, 0).numpy() - np.asarray(theirs, dtype=float))
        difference = difference[1:-1, 1:-1] if name == "sharpness" else difference  # Pillow leaves the rim as it is
        assert difference.max() <= (5 if name == "equalize" else 2)  # Pillow's equalize rounds its steps


@pytest.mark.parametrize("name", COLOUR_OPS)
def test_colour_operations_stand_an_image_of_one_colour(name):
    x = torch.full((2, 3, 4, 4), 0.5)
    out = COLOUR_OPS[name](x, torch.full((2, 1, 1, 1), 0.3))
    assert out.isfinite().all() and (out - out[0, 0, 0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["equalize", "autocontrast"])
def test_stretching_reaches_black_and_white(name):
    out = COLOUR_OPS[name](some_images(4, 3, 8, 8) / 255, torch.zeros(4, 1, 1, 1))
    assert out.amin((2, 3)).abs().max() < 1e-6 and (out.amax((2, 3)) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_the_policy_draws_every_operation_for_some_image_and_scales_with_magnitude(monkeypatch, channels):
    drawn = {}
    for name, operation in COLOUR_OPS.items():

        def counted(x, s, name=name, operation=operation):
            drawn[name] = drawn.get(name, 0) + len(x)
            return operation(x, s)

        monkeypatch.setitem(COLOUR_OPS, name, counted)
    x = some_images(1000, channels, 4, 4) / 255
    out, geometry = rand_augment(x.clone(), torch.zeros(1000, len(GEOMETRY)), 1, 0.5, rng())
    left_out = {"saturation"} if channels == 1 else set()
    assert set(drawn) == set(COLOUR_OPS) - left_out
    moved_by = geometry.abs().amax(0)
    for name, limit in GEOMETRY_OPS.items():
        assert 0.4 * limit < moved_by[GEOMETRY.index(name)] <= 0.5 * limit
    still = (geometry == 0).all(1)
    assert sum(drawn.values()) == still.sum()  # one operation an image: a colour or a movement
    assert (out != x).flatten(1).any(1)[
        still
    ].float().mean() > 0.6  # faint ones, or nothing to posterize, change nothing
    assert torch.equal(out[~still], x[~still]) and out.min() >= 0 and out.max() <= 1


# ---- boxes and mixtures ----


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_cutout_sets_one_box_to_the_mean_colour_as_often_as_asked(probability):
    out = cutout(torch.ones(2000, 3, 16, 16), probability, 0.5, rng())
    hole = out == 0
    assert ((out == 1) | hole).all() and torch.equal(hole, hole[:, :1].expand_as(hole))
    rows, columns = hole[:, 0].any(2), hole[:, 0].any(1)
    assert torch.equal(hole[:, 0], rows[:, :, None] & columns[:, None, :])  # one rectangle
    assert rows.sum(1).max() <= 8 and columns.sum(1).max() <= 8
    hit = hole.flatten(1).any(1).float().mean()
    assert hit == pytest.approx(probability, abs=0.03 if probability == 0.5 else 0)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_the_beta_draws_have_the_moments_of_beta(alpha):
    draws = _symmetric_beta(alpha, rng(), "cpu", 200_000)
    wanted = torch.distributions.Beta(alpha, alpha)
    assert draws.isfinite().all() and draws.min() >= 0 and draws.max() <= 1
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    assert draws.var() == pytest.approx(float(wanted.variance), rel=0.02)
    fourth = ((draws - 0.5) ** 4).mean()
    assert fourth == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=0.03)


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_hold_the_share_of_each_image(alphas, smoothing):
    """Image i is filled with the number i and has class i, so that pixels tell where they come from."""
    B = 64
    images = torch.arange(B).float().view(-1, 1, 1, 1).expand(B, 2, 8, 12)
    out, targets = mix(images, torch.arange(B), B, rng(), *alphas, smoothing)
    assert torch.allclose(targets.sum(1), torch.ones(B), atol=1e-5)
    hard = (targets - smoothing / B) / (1 - smoothing)
    assert torch.allclose(out.mean((1, 2, 3)), hard @ torch.arange(B).float(), atol=1e-3)
    pasted = torch.tensor([len(image.unique()) > 1 for image in out])
    mixed = (hard > 1e-3).sum(1) == 2
    assert mixed.float().mean() > 0.5
    assert pasted.any() == bool(alphas[1]) and (mixed & ~pasted).any() == bool(alphas[0])
    whole = out.flatten(1)[pasted].round().long()
    own = torch.arange(B)[pasted]
    assert torch.allclose((whole == own[:, None]).float().mean(1), hard[pasted, own], atol=1e-4)


def test_without_mixing_only_the_labels_are_smoothed():
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 2, 1, 2])
    out, targets = mix(images, labels, 3, rng(), label_smoothing=0.3)
    assert torch.equal(out, images)
    logits = torch.randn(4, 3)
    assert torch.allclose(F.cross_entropy(logits, targets), F.cross_entropy(logits, labels, label_smoothing=0.3))
