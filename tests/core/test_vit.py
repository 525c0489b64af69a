"""Laws of vit_scratch.py: it is gpt.py's block without the mask, and images of the wrong size are an error, never a guess."""

import re
import weakref

import pytest
import torch

from gpt import Block, MultiHeadAttention
from lib.checks import checked
from lib.positions import resize_positions, resized_tower
from lib.trace import record
from vit_scratch import PatchEmbedding, ViTAdapter, ViTBlock, ViTConfig, ViTModel, ViTMultiHeadAttention, sincos_positions

SMALL = {"image_size": (12, 20), "patch_size": 4, "num_labels": 7, "hidden_size": 32, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4}


def make(**changes) -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**{**SMALL, **changes})).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))


def test_the_block_is_gpts_with_one_word_changed():
    assert issubclass(ViTBlock, Block) and issubclass(ViTMultiHeadAttention, MultiHeadAttention)
    assert MultiHeadAttention.causal and not ViTMultiHeadAttention.causal
    assert "forward" not in vars(ViTBlock) and "forward" not in vars(ViTMultiHeadAttention)


def test_shapes_and_names(images):
    model = make()
    assert model(images).shape == (2, 7)
    with record(model, "embeddings", "blocks.?", "blocks.?.attn.weights", "norm") as seen:
        hidden = model(images, output_hidden_states=True)
    assert hidden.shape == (2, 1 + 3 * 5, 32)
    blocks = [f"blocks.{i}{part}" for i in range(3) for part in (".attn.weights", "")]
    assert list(seen) == ["embeddings", *blocks, "norm"]
    assert seen["blocks.0.attn.weights"].shape == (2, 4, 16, 16)
    torch.testing.assert_close(seen["blocks.1.attn.weights"].sum(-1), torch.ones(2, 4, 16))
    torch.testing.assert_close(seen["norm"], hidden)


def test_outputs_have_the_names_that_the_posts_read(images):
    """`outputs.logits`, `outputs.hidden_states[layer]` and `.last_hidden_state`, as of transformers' models: depth + 1, the
    embeddings first."""
    model = make()
    with record(model, "embeddings", "blocks.?") as seen:
        outputs = model(images, output_hidden_states=True)
    assert isinstance(outputs.hidden_states, tuple)
    torch.testing.assert_close(outputs.hidden_states, tuple(seen.values()))
    assert len(outputs.hidden_states) == 1 + 3 and outputs.hidden_states[-2].shape == (2, 1 + 3 * 5, 32)
    assert torch.equal(outputs.last_hidden_state, outputs) and torch.equal(model.norm(outputs.hidden_states[-1]), outputs)
    logits = model(images)
    assert torch.equal(logits.logits, logits) and logits.logits.shape == (2, 7)
    kept = weakref.ref(outputs), weakref.ref(logits)
    del outputs, logits
    assert kept[0]() is kept[1]() is None  # they do not hold themselves


def test_features_are_the_patches_of_the_layer_that_is_asked_for(images):
    model = make()
    with record(model, "embeddings", "blocks.?") as seen:
        last = model.features(images)
    torch.testing.assert_close(last, model(images, output_hidden_states=True)[:, 1:])
    for layer, name in ((0, "embeddings"), (1, "blocks.0"), (3, "blocks.2"), (-1, "blocks.2"), (-2, "blocks.1")):
        torch.testing.assert_close(model.features(images, layer), seen[name][:, 1:])
    with pytest.raises(IndexError):
        model.features(images, 4)
    assert model.grid == (3, 5) and model.image_size == (12, 20)


def test_every_patch_sees_every_other(images):
    """Change the last patch: under a causal mask the first patch's output would not move."""
    model, changed = make(), images.clone()
    changed[:, :, -4:, -4:] += 1
    before, after = (model(x, output_hidden_states=True) for x in (images, changed))
    assert (before - after).abs().amax(dim=(0, 2)).min() > 1e-6


def test_patch_embedding_is_one_linear_layer_for_every_patch(images):
    embed = PatchEmbedding(ViTConfig(**SMALL))
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 15, -1)
    by_hand = patches @ embed.projection.weight.flatten(1).T + embed.projection.bias
    torch.testing.assert_close(embed(images)[:, 1:], by_hand + embed.position_embedding[:, 1:], atol=1e-5, rtol=1e-5)


def test_sdpa_equals_explicit_attention_in_outputs_and_gradients(images):
    """In double precision: in single, on one CPU of several, a gradient was 1.6e-5 off, as far as rounding goes."""
    results = []
    for attention in ("sdpa", "explicit"):
        model = make(attention=attention).double()
        logits = model(images.double())
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [(12, 16), (20, 12), (8, 8), (24, 40)])
def test_a_wrong_image_size_is_an_error_never_a_silent_slice(size):
    """vit-pytorch takes a smaller image and gives its patches the wrong positions."""
    expected = f"[1, 3, {size[0]}, {size[1]}], the model reads ['B', 3, 12, 20]"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()(torch.zeros(1, 3, *size))


def test_wrong_channels_are_an_error():
    with pytest.raises(ValueError, match=re.escape("[1, 1, 12, 20], the model reads ['B', 3, 12, 20]")):
        make()(torch.zeros(1, 1, 12, 20))


def test_a_tower_is_resized_for_images_of_another_size():
    model = make()
    larger = resized_tower(model, (24, 40))
    assert larger.features(torch.zeros(1, 3, 24, 40)).shape == (1, 6 * 10, 32)
    assert model.grid == (3, 5) and torch.equal(larger.classifier.weight, model.classifier.weight)


def test_resized_positions_keep_a_smooth_field_smooth():
    """A straight ramp over the grid stays one on a finer grid: to 5 %, as torch's bicubic kernel (a = -0.75) has it."""
    rows = torch.arange(8.0).repeat_interleave(8)[:, None]
    fine = resize_positions(rows, (8, 8), (16, 16)).view(16, 16)
    torch.testing.assert_close(fine[4:12], ((torch.arange(4.0, 12) + 0.5) / 2 - 0.5)[:, None].expand(8, 16), atol=0.05, rtol=0)


def test_pooling_reads_what_it_says(images):
    for pooling, expected in (("cls", lambda h: h[:, 0]), ("mean", lambda h: h[:, 1:].mean(1))):
        model = make(pooling=pooling)
        hidden = model(images, output_hidden_states=True)
        torch.testing.assert_close(model(images), model.classifier(expected(hidden)))


def test_drop_path_skips_branches_in_training_only_and_keeps_the_mean(images):
    model = make(drop_path=0.5)
    torch.testing.assert_close(model(images), make()(images))
    drop = model.blocks[-1].drop_path.train()
    torch.manual_seed(0)
    x = drop(torch.ones(4000, 1, 1))
    assert set(x.unique().tolist()) == {0.0, 2.0} and x.mean().item() == pytest.approx(1, abs=0.05)
    assert [block.drop_path.p for block in model.blocks] == [0, 0.25, 0.5]


def test_sincos_positions_tell_every_place_apart():
    positions = sincos_positions((5, 7), 32)
    distance = torch.cdist(positions, positions) + torch.eye(35) * 9
    assert positions.shape == (35, 32) and distance.min() > 0.1
    with pytest.raises(AssertionError, match="divisible by 4, not 6"):
        sincos_positions((2, 2), 6)


@pytest.mark.parametrize("kind, layers", [("linear", 1), ("ffn", 2)])
def test_adapter(kind, layers):
    adapter = ViTAdapter(vit_d_out=32, llm_d_in=48, adapter_type=kind)
    assert adapter(torch.zeros(2, 16, 32)).shape == (2, 16, 48)
    assert sum(p.ndim == 2 for p in adapter.parameters()) == layers
    with pytest.raises(AssertionError, match="adapter_type is 'conv'"):
        ViTAdapter(32, 48, "conv")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 30}, "30x30 image cannot be cut into 4x4"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"position_init": "zeros"}, "position_init is 'zeros'"),
        ({"num_attention_heads": 5}, "32 cannot be split over 5"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        checked(ViTConfig, **{**SMALL, **change})


@pytest.mark.parametrize("preset, millions", [("vit-s16", 22.05), ("vit-b16", 86.57), ("tiny", 2.70), ("tiny-digits", 0.80)])
def test_presets(preset, millions):
    with torch.device("meta"):
        model = ViTModel(ViTConfig.preset(preset, position_init="normal"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.02)
