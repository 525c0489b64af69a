"""Laws of lib/weights.py and of the names in lib/layouts: however a file spells a model's tensors, splits them and rounds them,
our logits are those of transformers, or one line says why not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.checkpoint import from_pretrained, save_pretrained
from toys import make

tf = pytest.importorskip("transformers", reason="parity is measured against transformers")
from their_models import DECODER, KINDS, LLAVA, TOWER, as_json, compare, save, small_config, their_model  # noqa: E402

DECODERS = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model", "gpt2": "GPT2Model"}
VLMS = {"llava": "LlavaModel", "idefics3": "Idefics3Model", "smolvlm": "SmolVLMModel"}


def rewrite(folder, change) -> None:
    """change(tensors) instead of the tensors of a folder."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def model_in(folder, kind, **changes):
    config = {**small_config(kind), **changes}
    theirs = their_model(kind, config)
    save(theirs, config, folder)
    return theirs


def tied(kind) -> dict:
    """Settings with which the head of this kind is its embedding, as both versions of transformers spell them."""
    text = {**DECODER, "model_type": "llama", "tie_word_embeddings": True}
    return {"tie_word_embeddings": True, **({"text_config": text} if kind in VLMS else {})}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_or_wrapped_model_is_read_by_its_own_names(tmp_path, kind):
    theirs = model_in(tmp_path, kind)
    for prefix in ("_orig_mod.", "module._orig_mod."):
        plain = load_file(tmp_path / "model.safetensors")
        rewrite(tmp_path, lambda tensors, prefix=prefix: {prefix + name: tensor for name, tensor in tensors.items()})
        compare(theirs, kind, tmp_path)
        save_file(plain, tmp_path / "model.safetensors")
    inner = {name.replace("layers.1.", "layers.1._orig_mod.").replace(".h.1.", ".h.1.module."): t for name, t in plain.items()}
    save_file(inner, tmp_path / "model.safetensors")  # a single block that was compiled
    compare(theirs, kind, tmp_path)


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path):
    model_in(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors | {"_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()})
    with pytest.raises(ValueError, match="lm_head.weight .*two spellings of one parameter"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", DECODERS | VLMS)
def test_a_base_model_has_its_embedding_for_a_head_or_none(tmp_path, kind):
    """transformers saves LlamaModel without the prefix "model.", Idefics3Model likewise: nothing of either was found."""
    theirs = model_in(tmp_path, kind, **tied(kind))
    config = json.loads((tmp_path / "config.json").read_text())
    (theirs.transformer if kind == "gpt2" else theirs.model).save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    compare(theirs, kind, tmp_path)
    untied = {"tie_word_embeddings": False}
    text = {"text_config": {**config["text_config"], **untied}} if kind in VLMS else {}
    (tmp_path / "config.json").write_text(json.dumps({**config, **untied, **text}))
    with pytest.raises(ValueError, match="missing: .*lm_head.weight: it is a base model, and config.json does not say"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("named", [True, False])
def test_a_vit_without_a_classifier_is_a_tower(tmp_path, kind, named):
    """With `architectures` in its config.json or, as others write it, without."""
    config_class, _, small = KINDS[kind]
    name = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}[kind]
    theirs = getattr(tf, name)(config_class(**small)).eval()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("architectures") == [name]
    if not named:
        (tmp_path / "config.json").write_text(json.dumps(config))
    x, ours = torch.randn(1, 3, 16, 16), from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(x).last_hidden_state[:, 1 + ours.config.num_registers :]
        torch.testing.assert_close(ours.features(x), expected, atol=1e-5, rtol=1e-5)


CLIP_TOWER = {**TOWER, "model_type": "clip_vision_model"}


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."])
def test_clip_inside_llava_in_every_spelling(tmp_path, prefix):
    config = {**LLAVA, "model_type": "llava", "vision_config": CLIP_TOWER, "vision_feature_select_strategy": "default"}
    theirs = their_model("llava", config)
    save(theirs, config, tmp_path)
    rewrite(tmp_path, lambda tensors: {name.replace("vision_tower.", prefix): tensor for name, tensor in tensors.items()})
    compare(theirs, "llava", tmp_path)


def test_gpt2_with_a_head_of_its_own(tmp_path):
    """config.json may say so; where it says that the head is the embedding, another head in the file is an error."""
    theirs = model_in(tmp_path, "gpt2", tie_word_embeddings=False)
    assert not torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight)
    compare(theirs, "gpt2", tmp_path)
    ours = from_pretrained(tmp_path)
    save_pretrained(ours, tmp_path / "again")
    compare(type(theirs).from_pretrained(tmp_path / "again").eval(), "gpt2", tmp_path / "again")
    (tmp_path / "config.json").write_text(json.dumps(small_config("gpt2")))
    with pytest.raises(ValueError, match="lm_head.weight differs from transformer.wte.weight, though config.json says"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind, embedding", [("gpt2", "transformer.wte.weight"), ("llama", "model.embed_tokens.weight")])
def test_of_a_tied_pair_the_file_may_keep_either(tmp_path, kind, embedding):
    theirs = model_in(tmp_path, kind, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: {("lm_head.weight" if name == embedding else name): t for name, t in tensors.items()})
    compare(theirs, kind, tmp_path)


# ---- precisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [["float16"], ["bfloat16"], ["float64"], ["bfloat16", "float32", "float16", "float64"]])
def test_weights_of_any_precision_and_of_several(tmp_path, dtypes):
    theirs, kinds = model_in(tmp_path, "llama"), [getattr(torch, name) for name in dtypes]
    rewrite(tmp_path, lambda tensors: {name: t.to(kinds[i % len(kinds)]) for i, (name, t) in enumerate(tensors.items())})
    rounded = {name: tensor.float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    theirs.load_state_dict(rounded)
    compare(theirs, "llama", tmp_path)
    stored = from_pretrained(tmp_path, dtype=None)
    assert {parameter.dtype for parameter in stored.parameters()} == set(kinds)
    save_pretrained(stored, tmp_path / "again")
    widest = max(kinds, key=lambda kind: kind.itemsize)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(widest).removeprefix("torch.")


def test_what_a_precision_cannot_hold_is_named_when_it_is_read_and_before_it_is_written(tmp_path):
    """convert --dtype fp16 wrote inf, which was refused when it was read again."""
    model_in(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].abs() + 1e5})
    line = r"model.norm.weight holds 1e\+05, more than the 6.55e\+04 of torch.float16: choose another precision"
    with pytest.raises(ValueError, match=line):
        from_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match=line):
        save_pretrained(from_pretrained(tmp_path), tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half" / "model.safetensors").exists()
    assert from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight.max() > 9e4
    rewrite(tmp_path, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e5m2)})
    with pytest.raises(ValueError, match="model.norm.weight is torch.float8_e5m2, which is no weight"):
        from_pretrained(tmp_path)


# ---- shards ------------------------------------------------------------------------------------------------------------


def edit_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def shards(folder) -> list:
    return sorted(folder.glob("model-*.safetensors"))


def listed(folder, change) -> None:
    edit_index(folder, lambda index: {"weight_map": change(index["weight_map"])})


BAD_SHARDS = {
    "a shard twice": (lambda f: shards(f)[2].write_bytes(shards(f)[1].read_bytes()), "-00003-.* holds .*another shard holds"),
    "a shard that is not listed": (
        lambda f: listed(f, lambda table: {name: file for name, file in table.items() if "-00003-" not in file}),
        "does not fit its config.json: missing",
    ),
    "a tensor that is nowhere": (
        lambda f: save_file(dict(list(load_file(shards(f)[1]).items())[1:]), shards(f)[1]),
        "does not fit its config.json: missing",
    ),
    "no table": (lambda f: listed(f, lambda table: []), "lists no usable shards"),
    "a path": (lambda f: listed(f, lambda table: {"x": "../x.safetensors"}), "lists no usable shards"),
    "a shard cut": (lambda f: shards(f)[1].write_bytes(b"cut"), "model-00002-.* is not a valid safetensors file"),
    "a shard gone": (lambda f: shards(f)[1].unlink(), "lacks model-00002-.*, which its index lists"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_shards_that_do_not_belong_together_are_refused_by_name(tmp_path, case):
    spoil, message = BAD_SHARDS[case]
    save_pretrained(make(), tmp_path, max_shard_bytes=2e4)
    assert len(shards(tmp_path)) > 3
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_that_names_another_shard_for_a_tensor_misleads_nobody(tmp_path):
    """transformers, too, takes what the shards hold."""
    ours = make()
    save_pretrained(ours, tmp_path, max_shard_bytes=2e4)
    first, second, *_ = (file.name for file in shards(tmp_path))
    listed(tmp_path, lambda table: {name: second if file == first else file for name, file in table.items()} | {"x": first})
    for name, tensor in from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_pickled_weights_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_json(small_config("llama"))))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no model.safetensors: pytorch_model.bin is pickled, not read"):
        from_pretrained(tmp_path)
