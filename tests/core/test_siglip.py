"""The laws of siglip.py. The reference is transformers, at toy sizes, with random weights that went through safetensors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import siglip
from lib.checks import checked
from lib.positions import resized_tower
from lib.trace import first_difference, record
from lib.weights import read_safetensors
from siglip import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextTransformer,
    SiglipTwoTower,
    SiglipVisionConfig,
    SiglipVisionTransformer,
    sigmoid_loss,
)

TOL = 1e-5
# 3 heads of width 7; the second one cuts 30 pixels into 4 patches of 7 and leaves 2 over, as so400m-p14-384 does.
VISION = {"hidden_size": 21, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 3}
VISIONS = {"square": {**VISION, "image_size": 16, "patch_size": 4}, "rest": {**VISION, "image_size": 30, "patch_size": 7}}
TEXT = {"hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 9, "projection_size": 21}


def shaken(model, seed=0):
    """Random everything, norms and biases included: what starts at 0 or 1 would hide a part that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def ours_from(theirs, ours, folder, prefix=""):
    """Our module with the tensors of what transformers writes, each under the name it has in the file."""
    theirs.save_pretrained(folder)
    ours.load_state_dict({prefix + name: tensor for name, tensor in read_safetensors(folder).items()}, strict=True)
    return ours.eval()


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the reference for parity is transformers")


@pytest.fixture
def vision_pair(transformers, tmp_path, request):
    settings = VISIONS[getattr(request, "param", "square")]
    theirs = shaken(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings)))
    # Saved on its own, the tower has bare names today; files older than transformers 5 say "vision_model." before each.
    return theirs, ours_from(theirs, SiglipModel(SiglipVisionConfig(**settings)), tmp_path, "vision_model.")


def their_text_config(transformers):
    return transformers.SiglipTextConfig(**TEXT, bos_token_id=0, eos_token_id=1)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sentences(batch, length=9, seed=0):
    return torch.randint(2, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def two_towers(seed=0, **vision):
    return shaken(SiglipTwoTower(SiglipConfig({**VISIONS["square"], **vision}, TEXT)), seed)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_all_close(ours: dict, theirs: dict, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision_pair", VISIONS, indirect=True)
@torch.no_grad()
def test_vision_tower_is_the_published_one(vision_pair):
    theirs, ours = vision_pair
    size = ours.config.image_size
    x = images(2, 3, size, size)
    reference = theirs(x, output_hidden_states=True)
    assert len(reference.hidden_states) == 4
    torch.testing.assert_close(ours(x), reference.last_hidden_state, atol=TOL, rtol=0)
    with record(ours) as seen:
        torch.testing.assert_close(ours.pooled(x), reference.pooler_output, atol=TOL, rtol=0)
    for i in range(-4, 4):
        torch.testing.assert_close(ours.features(x, layer=i), reference.hidden_states[i], atol=TOL, rtol=0)
    for name, state in zip(["embeddings", *(f"encoder.layers.{i}" for i in range(3))], reference.hidden_states, strict=True):
        torch.testing.assert_close(seen[f"vision_model.{name}"], state, atol=TOL, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (16, 24), (8, 32), (19, 30)], ids=str)
@torch.no_grad()
def test_other_sizes_get_the_published_positions(vision_pair, size):
    """8x32 has as many patches as 16x16, but not in the same places; 19x30 leaves a rest."""
    theirs, ours = vision_pair
    x, ours = images(2, 3, *size), resized_tower(ours, size)
    reference = theirs(x, interpolate_pos_encoding=True)
    torch.testing.assert_close(ours(x), reference.last_hidden_state, atol=TOL, rtol=0)
    torch.testing.assert_close(ours.pooled(x), reference.pooler_output, atol=TOL, rtol=0)


MASKS = {
    "none": None,
    "full": [[1] * 9] * 3,
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@torch.no_grad()
def test_text_tower_is_the_published_one(transformers, tmp_path, mask):
    theirs = shaken(transformers.SiglipTextModel(their_text_config(transformers)))
    ours = ours_from(theirs, SiglipTextTransformer(SiglipTextConfig(**TEXT)), tmp_path)
    ids, mask = sentences(3), None if mask is None else torch.tensor(mask)
    reference = theirs(ids, attention_mask=mask)
    torch.testing.assert_close(ours(ids, mask), reference.last_hidden_state, atol=TOL, rtol=0)
    torch.testing.assert_close(ours.pooled(ids, mask), reference.pooler_output, atol=TOL, rtol=0)


@torch.no_grad()
def test_two_towers_are_the_published_ones(transformers, tmp_path):
    settings = {"vision_config": VISIONS["square"], "text_config": their_text_config(transformers).to_dict()}
    theirs = shaken(transformers.SiglipModel(transformers.SiglipConfig(**settings)))
    ours = ours_from(theirs, two_towers(), tmp_path)
    x, ids = images(3, 3, 16, 16), sentences(3, length=6)
    reference, out = theirs(ids, x, return_loss=True), ours(x, ids, return_loss=True)
    for name in ("logits_per_image", "loss"):
        torch.testing.assert_close(out[name], reference[name], atol=TOL, rtol=0)
    torch.testing.assert_close(out["image_embeddings"], reference.image_embeds, atol=TOL, rtol=0)
    torch.testing.assert_close(out["text_embeddings"], reference.text_embeds, atol=TOL, rtol=0)
    torch.testing.assert_close(ours.logits(x[:2], ids), reference.logits_per_image[:2], atol=TOL, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("base-p16-224", 203_155_970), ("so400m-p14-224", 877_360_306), ("so400m-p14-384", 877_960_498)],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = SiglipTwoTower(SiglipConfig.preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# ---- the loss --------------------------------------------------------------------------------------------------------


def random_pairs(B, seed=0):
    image_emb, texts = F.normalize(images(2, B, 12, seed=seed), dim=-1).requires_grad_().unbind()
    scale, bias = torch.tensor([2.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)
    return image_emb, texts, scale, bias


def test_loss_is_one_question_per_pair():
    image_emb, texts, scale, bias = random_pairs(5)
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = sum(a * b for a, b in zip(image_emb[i].tolist(), texts[j].tolist(), strict=True)) * scale.item() + bias.item()
            total -= math.log(1 / (1 + math.exp(-z if i == j else z)))
    assert sigmoid_loss(image_emb, texts, scale, bias).item() == pytest.approx(total / 5, rel=1e-5)


def test_loss_is_computed_in_fp32_under_autocast():
    image_emb, texts, _, bias = random_pairs(6)
    exact = sigmoid_loss(image_emb, texts, 100.0, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sigmoid_loss(image_emb, texts, 100.0, bias), exact, atol=0, rtol=1e-6)


# ---- one computation, several ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_attention_changes_nothing(masked):
    """The plain two towers against softmax(QK^T)V spelled out: loss and every gradient."""
    x, ids = images(4, 3, 16, 16), sentences(4)
    mask = (torch.arange(9) < torch.tensor([[9], [3], [1], [7]])).long() if masked else None
    reference = two_towers()
    loss = reference(x, ids, mask, return_loss=True)["loss"]
    expected = gradients(loss, reference)
    explicit = {"attention": "explicit"}
    model = SiglipTwoTower(SiglipConfig({**VISIONS["square"], **explicit}, {**TEXT, **explicit})).eval()
    model.load_state_dict(reference.state_dict())
    other = model(x, ids, mask, return_loss=True)["loss"]
    torch.testing.assert_close(other, loss, atol=1e-6, rtol=1e-6)
    assert_all_close(gradients(other, model), expected, TOL)


def test_in_bf16_on_a_cpu_attention_is_two_products():
    x, ids, mask = images(4, 3, 16, 16), sentences(4), (torch.arange(9) < torch.tensor([[9], [3], [1], [7]])).long()
    found = []
    for attention in ("sdpa", "explicit"):
        torch.manual_seed(0)
        config = SiglipConfig({**VISIONS["square"], "attention": attention}, {**TEXT, "attention": attention})
        with torch.autocast("cpu", torch.bfloat16):
            found.append(shaken(SiglipTwoTower(config))(x, ids, mask)["logits_per_image"])
    assert torch.equal(*found)


def calls(module):
    """A list that grows by one at every forward pass of a module."""
    counted = []
    module.register_forward_pre_hook(lambda *_: counted.append(1))
    return counted


@torch.no_grad()
def test_what_is_not_asked_for_is_not_computed():
    model = shaken(SiglipModel(SiglipVisionConfig(**VISIONS["square"])))
    tower, x = model.vision_model, images(1, 3, 16, 16)
    counted = [calls(part) for part in (*tower.encoder.layers, tower.post_layernorm, tower.head)]
    for ask, expected in (
        (lambda: model.features(x, layer=0), [0, 0, 0, 0, 0]),
        (lambda: model.features(x, layer=-2), [1, 1, 0, 0, 0]),
        (lambda: model.features(x, layer=-1), [1, 1, 1, 0, 0]),
        (lambda: model(x), [1, 1, 1, 1, 0]),
        (lambda: model.pooled(x), [1, 1, 1, 1, 1]),
    ):
        for c in counted:
            c.clear()
        ask()
        assert [len(c) for c in counted] == expected


@torch.no_grad()
def test_a_tower_without_its_head_sees_the_same():
    full = shaken(SiglipModel(SiglipVisionConfig(**VISIONS["square"])))
    bare = SiglipModel(SiglipVisionConfig(**VISIONS["square"], vision_use_head=False)).eval()
    bare.load_state_dict({name: t for name, t in full.state_dict().items() if ".head." not in name})
    x = images(2, 3, 16, 16)
    assert torch.equal(bare(x), full(x))
    with pytest.raises(AssertionError, match="no pooling head"):
        bare.pooled(x)


@torch.no_grad()
def test_a_batch_is_its_rows():
    model, x, ids = two_towers(), images(3, 3, 16, 16), sentences(3)
    mask = (torch.arange(9) < torch.tensor([[9], [3], [6]])).long()
    for together, alone in (
        (model.image_embeddings(x), [model.image_embeddings(row[None]) for row in x]),
        (model.text_embeddings(ids), [model.text_embeddings(row[None]) for row in ids]),
        (model.text_embeddings(ids, mask), [model.text_embeddings(i[None], m[None]) for i, m in zip(ids, mask, strict=True)]),
    ):
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_tokens_are_not_seen():
    model = shaken(SiglipTextTransformer(SiglipTextConfig(**TEXT)))
    ids = sentences(2)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    other = torch.where(mask.bool(), ids, 49 - ids)
    alone = model(ids[:1, :6])
    torch.testing.assert_close(model(ids, mask)[:1, :6], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(other, mask)[:1, :6], alone, atol=1e-5, rtol=0)
    assert (model(other)[:1, :6] - alone).abs().max() > 0.01  # and without the mask they are


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@torch.no_grad()
def test_half_precision_is_close(dtype, tolerance):
    model, x, ids = two_towers(), images(3, 3, 16, 16), sentences(3)
    exact = model(x, ids, return_loss=True)
    exact = {name: exact[name].clone() for name in exact}
    half = model.to(dtype)(x, ids, return_loss=True)  # fp32 images, as the processor makes them
    for name, value in exact.items():
        assert half[name].dtype == (torch.float32 if name == "loss" else dtype)
        torch.testing.assert_close(half[name].float(), value, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_record_names_everything_and_changes_nothing():
    model, x, ids = two_towers(), images(2, 3, 16, 16), sentences(2)
    plain = model(x, ids)["logits_per_image"]
    with record(model) as seen:
        torch.testing.assert_close(model(x, ids)["logits_per_image"], plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, shape in (
        ("vision_model.encoder.layers.2.self_attn.weights", (2, 3, 16, 16)),
        ("vision_model.head.attention.weights", (2, 3, 1, 16)),
        ("text_model.encoder.layers.1.self_attn.weights", (2, 4, 9, 9)),
    ):
        assert seen[name].shape == shape
        torch.testing.assert_close(seen[name].sum(dim=-1), torch.ones(shape[:-1]))
    with record(model, "*.layers.1") as few:
        model(x, ids)
    assert list(few) == ["vision_model.encoder.layers.1", "text_model.encoder.layers.1"]


@torch.no_grad()
def test_first_difference_names_where_two_models_part():
    one, x = two_towers(), images(2, 3, 16, 16)
    other = copy.deepcopy(one)
    other.vision_model.encoder.layers[1].mlp.fc2.bias += 1
    found = []
    for model in (one, other):
        with record(model.vision_model) as seen:
            model.vision_model(x)
        found.append(seen)
    assert first_difference(found[0], found[0]) is None
    assert first_difference(*found) == "encoder.layers.1.mlp.fc2"


def test_attention_dropout_is_for_training_only():
    model = shaken(SiglipModel(SiglipVisionConfig(**VISIONS["square"], attention_dropout=0.5)))
    x = images(1, 3, 16, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# ---- construction ----------------------------------------------------------------------------------------------------


def test_initialisation_is_that_of_the_original():
    config = SiglipConfig.preset("tiny", text={"vocab_size": 500})
    torch.manual_seed(0)
    model = SiglipTwoTower(config)
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias.item() == -10
    D, patch = 128, 3 * 8 * 8
    for name, std in {
        "vision_model.embeddings.position_embedding.weight": D**-0.5,
        "vision_model.embeddings.patch_embedding.weight": patch**-0.5,
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": D**-0.5,  # Xavier: sqrt(2 / (in + out))
        "vision_model.encoder.layers.3.mlp.fc2.weight": (2 / (5 * D)) ** 0.5,
        "vision_model.head.attention.in_proj_weight": D**-0.5,
        "vision_model.head.probe": D**-0.5,
        "text_model.embeddings.token_embedding.weight": D**-0.5,
        "text_model.head.weight": D**-0.5,
    }.items():
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx(std, rel=0.15 if name.endswith("probe") else 0.03), name
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias") and name != "logit_bias":
            assert parameter.abs().max() < 1e-5, name


def see(*shape):
    return SiglipModel(SiglipVisionConfig(**VISIONS["square"]))(images(*shape))


def read(ids, mask=None):
    return SiglipTextTransformer(SiglipTextConfig(**TEXT))(ids, mask)


BAD = {
    "another size": (r"\[1, 3, 16, 24\], the model reads \['B', 3, 16, 16\]", lambda: see(1, 3, 16, 24)),
    "one channel": (r"\[1, 1, 16, 16\], the model reads \['B', 3", lambda: see(1, 1, 16, 16)),
    "no batch": (r"\[3, 16, 16\]", lambda: see(3, 16, 16)),
    "long text": ("text of 10 tokens.* 9", lambda: read(sentences(1, 10))),
    "all padding": ("nothing but padding", lambda: read(sentences(2), torch.tensor([[1] * 9, [0] * 9]))),
    "a text too many": ("do not pair up", lambda: two_towers()(images(2, 3, 16, 16), sentences(3), return_loss=True)),
    "widths differ": ("21 wide and texts 20", lambda: SiglipConfig(VISION, {**TEXT, "projection_size": None})),
    "no head": ("vision_use_head is False", lambda: SiglipConfig({**VISION, "vision_use_head": False}, TEXT)),
    "heads": ("hidden_size 768 cannot be split over 7", lambda: SiglipVisionConfig(num_attention_heads=7)),
    "activation": ("hidden_act is 'relu'", lambda: checked(SiglipTextConfig, hidden_act="relu")),
    "empty vocabulary": ("vocab_size is 0", lambda: checked(SiglipTextConfig, vocab_size=0)),
    "patch too large": ("16x16 image holds no 32x32 patch", lambda: checked(SiglipVisionConfig, image_size=16, patch_size=32)),
}


@pytest.mark.parametrize(("message", "do"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line(message, do):
    with pytest.raises((ValueError, AssertionError), match=message) as error:
        do()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [SiglipVisionConfig, SiglipTextConfig, lambda **k: SiglipConfig(vision_config=k)])
def test_unknown_settings_raise(make):
    with pytest.raises(TypeError, match="hiden_size"):
        make(hiden_size=64)


def test_configs_leave_the_callers_dicts_alone_and_fill_in_the_rest():
    vision, text = dict(VISIONS["rest"]), {**TEXT, "intermediate_size": None}
    config = SiglipConfig(vision, text)
    assert vision == VISIONS["rest"] and text["intermediate_size"] is None
    assert config.text_config.intermediate_size == 80 and config.vision_config.grid == (4, 4)
    assert SiglipConfig() == SiglipConfig.preset("base-p16-224")
    so400m = SiglipVisionConfig.preset("so400m-p14-384", vision_use_head=False)
    assert so400m.grid == (27, 27) and SiglipVisionConfig(image_size=[32, 48]).grid == (2, 3)
    assert isinstance(SiglipVisionTransformer(SiglipVisionConfig(**VISION)).head, siglip.SiglipMultiheadAttentionPoolingHead)
