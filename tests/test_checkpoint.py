"""Laws of checkpoint.py: the published models' logits, both ways, through real files; and nothing wrong loads quietly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from gpt import GPTConfig
from lib.checkpoint import from_pretrained, save_pretrained
from lib.files import write_atomic
from lib.run_state import load_state, save_state
from vit_scratch import ViTConfig, ViTModel

transformers = pytest.importorskip("transformers", reason="parity is measured against transformers")


def gpt2(**changes):
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20}
    settings |= {"eos_token_id": 0, "bos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **changes}))


def vit(**changes):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    settings |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**settings, **changes}))


CASES = {
    "gpt2": (gpt2, {}),
    "gpt2 odd head width, exact GELU": (gpt2, {"n_embd": 36, "activation_function": "gelu", "n_inner": 50}),
    "gpt2 other epsilon": (gpt2, {"layer_norm_epsilon": 1e-2}),
    "vit": (vit, {}),
    "vit non-square, grey, two classes": (vit, {"image_size": (16, 40), "num_channels": 1, "num_labels": 2}),
    "vit without qkv bias": (vit, {"qkv_bias": False, "hidden_act": "gelu_new"}),
}


@pytest.fixture(params=CASES, scope="module")
def published(request, tmp_path_factory):
    """(their model, the folder that it saved, an input, how to get logits of theirs and ours)"""
    make, changes = CASES[request.param]
    torch.manual_seed(0)
    theirs = make(**changes).eval()
    with torch.no_grad():  # norms, biases and positions away from their starting values
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    if make is gpt2:
        return theirs, folder, torch.randint(0, 50, (2, 15)), lambda model, x: model(x)["logits"]
    size = theirs.config.image_size
    x = torch.randn(2, theirs.config.num_channels, *(size if isinstance(size, list | tuple) else (size, size)))
    return theirs, folder, x, lambda model, x: model(x) if isinstance(model, ViTModel) else model(x).logits


def close(a, b):
    assert (a - b).abs().max().item() <= 1e-5


@torch.no_grad()
def test_what_they_save_we_load_and_what_we_save_they_load(published, tmp_path):
    theirs, folder, x, logits = published
    ours = from_pretrained(folder)
    close(logits(ours, x), logits(theirs, x))
    save_pretrained(ours, tmp_path)
    again, info = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    close(logits(again.eval(), x), logits(theirs, x))
    close(logits(from_pretrained(tmp_path), x), logits(ours, x))


class Called(TorchFunctionMode):
    """The names of torch's functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


def test_loading_initialises_nothing(published):
    """On the meta device that imported torch's compiler, which took two seconds of every start."""
    with Called() as called:
        from_pretrained(published[1])
    assert called.names and not called.names & {"normal_", "uniform_", "trunc_normal_", "_no_grad_normal_"}


@torch.no_grad()
def test_positions_resize_as_theirs_do(tmp_path):
    theirs = vit().eval()
    theirs.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 48, 72)
    ours = from_pretrained(tmp_path, image_size=(48, 72))
    close(ours(x), theirs(x, interpolate_pos_encoding=True).logits)
    save_pretrained(ours, tmp_path / "larger")
    close(from_pretrained(tmp_path / "larger")(x), ours(x))
    gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="a GPT reads no images"):
        from_pretrained(tmp_path / "gpt2", image_size=64)


@torch.no_grad()
def test_gradients_flow_and_the_head_stays_tied_after_loading(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.token_embedding.weight
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_openais_own_file_layout(tmp_path):
    """Its names lack "transformer." and it carries the causal masks as tensors; some files repeat the tied head."""
    theirs = gpt2().eval()
    theirs.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 20, 20), "lm_head.weight": theirs.lm_head.weight.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    x = torch.randint(0, 50, (1, 9))
    close(from_pretrained(tmp_path)(x)["logits"], theirs(x).logits)


@torch.no_grad()
def test_sharded_files_and_half_precision(tmp_path):
    theirs = gpt2().half().eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    x = torch.randint(0, 50, (1, 9))
    close(from_pretrained(tmp_path)(x)["logits"], theirs.float()(x).logits)
    assert from_pretrained(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_a_mean_pooled_vit_comes_back_as_one_and_transformers_does_not_misread_it(tmp_path):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pooling="mean")
    model = ViTModel(config).eval()
    save_pretrained(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    close(from_pretrained(tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="vit_scratch"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path)


# ---- what must not load ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    gpt2().save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "DROP"}))


SPOILED = {
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("transformer.h.1.ln_1.weight")), "missing: .*h.1.ln_1.weight"),
    "left-over tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"transformer.h.0.extra": torch.ones(1)})),
        "left over: transformer.h.0.extra",
    ),
    "misshapen tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"transformer.wpe.weight": torch.ones(20, 31)})),
        r"transformer.wpe.weight is \[20, 31\], which does not make position_embedding.weight \[20, 32\]",
    ),
    "transposed square tensor's bias": (
        lambda f: edit_tensors(f, lambda t: t.update({"transformer.ln_f.bias": torch.ones(())})),
        "transformer.ln_f.bias",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:2000]),
        "not a valid safetensors file",
    ),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a valid safetensors file"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON list"),
    "config lacks a size": (lambda f: edit_config(f, n_embd="DROP"), "does not describe a gpt2: 'n_embd'"),
    "config size is text": (lambda f: edit_config(f, n_embd="wide"), "does not describe a gpt2"),
    "unknown model type": (lambda f: edit_config(f, model_type="mamba"), "model_type 'mamba': known are gpt2, bert"),
    "unknown activation": (lambda f: edit_config(f, activation_function="relu"), "activation 'relu' is not implemented"),
    "unsupported attention": (lambda f: edit_config(f, add_cross_attention=True), "add_cross_attention is True: only False"),
    "negative size": (lambda f: edit_config(f, n_layer=-3), "num_hidden_layers is -3"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_checkpoints_are_refused_by_name_in_one_line(folder, what):
    spoil, message = SPOILED[what]
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no folder openai-community/gpt2, and the hub did not give it"):
        from_pretrained("openai-community/gpt2")
    with pytest.raises(FileNotFoundError, match="there is no folder ./nowhere"):
        from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="is a file"):
        from_pretrained(__file__)


def test_a_hub_name_loads_what_the_hub_gives(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert isinstance(from_pretrained("someone/gpt2").config, GPTConfig)


# ---- files ---------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(tmp):
        tmp.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_begin_names_its_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/file cannot be written \(No such file or directory\)$"):
        write_atomic(tmp_path / "nowhere" / "file", lambda tmp: tmp.write_text("new"))


def test_state_round_trip_and_damage(tmp_path):
    state = {"model": {"w": torch.arange(3)}, "steps_done": 7}
    save_state(tmp_path, state)
    assert torch.equal(load_state(tmp_path)["model"]["w"], torch.arange(3))
    with pytest.raises(FileNotFoundError, match="no state.pt to resume from"):
        load_state(tmp_path / "other")
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="state.pt is damaged"):
        load_state(tmp_path)
