"""lib/vlm_parts.py: what a tower or a decoder knew before they were joined, it knows after."""

import pytest
import torch

from data.scenes import corpus
from gpt import GPT, GPTConfig
from lib.checkpoint import from_pretrained, load_vlm, save_pretrained
from lib.vlm_parts import as_tower, assemble, find_part, parts_after, train_tokenizer
from model import Llama3ForCausalLM, LLAMA32Config
from siglip import SiglipModel, SiglipVisionConfig
from toys import TEXT, close, shaken
from vit_scratch import ViTConfig, ViTModel

VIT = {"image_size": 16, "patch_size": 4, "num_labels": 3, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus()[:300], 330)


def vit(**changes):
    torch.manual_seed(0)
    return shaken(ViTModel(ViTConfig(**{**VIT, **changes})))


def decoder(kind, vocabulary):
    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return shaken(GPT(GPTConfig(vocab_size=vocabulary, context_length=128, **size)))
    return shaken(Llama3ForCausalLM(LLAMA32Config(**{**TEXT, "vocab_size": vocabulary})))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifier_becomes_a_tower_with_the_same_features(tmp_path, channels):
    """A run of train_vit.py on grey digits: the same features of the same image, which now comes as RGB."""
    model, x = vit(num_channels=channels), torch.rand(2, channels, 16, 16)
    save_pretrained(model, tmp_path)
    tower = find_part(tmp_path, "vision")
    assert tower.config.num_labels == 0 and tower.config.num_channels == 3
    close(tower.features(x.expand(-1, 3, -1, -1)), model.features(x))


def test_a_tower_reads_images_of_another_size(tmp_path):
    """Its positions are resized, as from_pretrained resizes them; a size that its patches do not divide gets a line."""
    save_pretrained(vit(), tmp_path)
    x = torch.rand(2, 3, 24, 24)
    close(find_part(tmp_path, "vision", 24).features(x), from_pretrained(tmp_path, image_size=24).features(x))
    with pytest.raises(ValueError, match="18x18 image cannot be cut into 4x4 patches"):
        find_part(tmp_path, "vision", 18)


@pytest.mark.parametrize("siglip", [False, True])
def test_a_tower_of_its_first_blocks(tmp_path, siglip):
    """What --vision-layers takes: the output of so many blocks, and the last norm after it."""
    size = {key: value for key, value in VIT.items() if key != "num_labels"}
    whole = SiglipModel(SiglipVisionConfig(**size, intermediate_size=64)) if siglip else vit()
    save_pretrained(whole, tmp_path)
    tower, x, depth = find_part(tmp_path, "vision", None, 1), torch.rand(2, 3, 16, 16), whole.config.num_hidden_layers
    norm = whole.vision_model.post_layernorm if siglip else whole.norm
    close(tower.features(x), norm(whole.features(x, 1)))
    assert tower.config.num_hidden_layers == 1 < depth
    save_pretrained(tower, tmp_path / "first")
    close(find_part(tmp_path / "first", "vision").features(x), tower.features(x))
    with pytest.raises(ValueError, match=f"--vision-layers {depth + 1}: the tower has {depth}"):
        find_part(tmp_path, "vision", None, depth + 1)


@pytest.mark.parametrize("channels, siglip", [(4, False), (1, True)])
def test_images_of_other_channels_are_refused(tmp_path, channels, siglip):
    size = {key: value for key, value in VIT.items() if key != "num_labels"}
    config = SiglipVisionConfig(**size, intermediate_size=64, num_channels=channels)
    save_pretrained(SiglipModel(config) if siglip else vit(num_channels=channels), tmp_path)
    with pytest.raises(ValueError, match=f"--vision .* reads images of {channels} channels: it must be 3, RGB"):
        find_part(tmp_path, "vision")


@pytest.mark.parametrize("layer", [None, -1, -2, 1])
@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_what_comes_after_the_features_of_a_layer_has_no_gradient(kind, layer):
    """Of LLaVA-1.5, which takes the layer before the last, a block was said to train, and had no gradient."""
    size = {key: value for key, value in VIT.items() if key != "num_labels"}
    tower = as_tower(vit()) if kind == "vit" else SiglipModel(SiglipVisionConfig(**size, vision_use_head=False))
    tower.features(torch.rand(1, 3, 16, 16), layer).square().sum().backward()
    after = {id(p) for part in parts_after(tower, layer) for p in part.parameters()}
    assert {name for name, p in tower.named_parameters() if p.grad is None} == {
        name for name, p in tower.named_parameters() if id(p) in after
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pair_takes_over_both_parts_is_asked_saved_and_opened_again(tmp_path, tokenizer, kind):
    tower, text = as_tower(vit(pooling="mean")), decoder(kind, len(tokenizer))  # as train_vit.py pools: no tower does
    ids = torch.arange(5, 17)[None]
    words = text(ids)["logits"]
    model, processor = assemble(tower, text, tokenizer, MEAN, projector_type="mlp", vision_feature_layer=-2)
    x = torch.rand(1, 3, 16, 16)
    close(model.vision_features(x), tower.features(x, -2))
    close(model.language_model(ids)["logits"][..., : words.shape[-1]], words)

    batch = processor(["What is this?"], [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)])
    answer = model.generate(**batch, max_new_tokens=4)
    assert save_pretrained(model, tmp_path) == "llava"
    assert from_pretrained(tmp_path).generate(**batch, max_new_tokens=4) == answer


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_a_processor_read_again_writes_the_same_prompt(tmp_path, tokenizer, projector):
    """In our own layout the tokens around an image were forgotten: a model was asked otherwise than it had been trained."""
    layer = -1 if projector == "mlp" else None
    model, processor = assemble(
        as_tower(vit()), decoder("llama", len(tokenizer)), tokenizer, MEAN, projector_type=projector, vision_feature_layer=layer
    )
    kind = save_pretrained(model, tmp_path)
    processor.save_pretrained(tmp_path)
    assert (kind == "mllama_scratch") == (projector == "linear")
    asked = [{"role": "user", "content": "<image>What is this?"}]
    assert load_vlm(tmp_path)[1].encode(asked, 1) == processor.encode(asked, 1)


def test_what_is_no_part_is_one_line(tmp_path):
    save_pretrained(vit(), tmp_path / "vit")
    with pytest.raises(ValueError, match="--lm .*holds a ViTModel: it must be a decoder"):
        find_part(tmp_path / "vit", "lm")
    save_pretrained(decoder("gpt2", 50), tmp_path / "gpt2")
    with pytest.raises(ValueError, match="--vision .*holds a GPT: it must be a vision tower"):
        find_part(tmp_path / "gpt2", "vision")


@torch.no_grad()
def test_a_gpt2_with_layers_between_its_blocks_starts_as_the_gpt2_it_was(tmp_path, tokenizer):
    text = decoder("gpt2", len(tokenizer))
    model, processor = assemble(as_tower(vit()), text, tokenizer, MEAN, fusion="cross", cross_every=1)
    batch = processor(["What is this?"], [torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8)])
    close(model(**batch)["logits"], model.language_model(batch["input_ids"])["logits"])
    shaken(model)
    assert (model(**batch)["logits"] - model.language_model(batch["input_ids"])["logits"]).abs().max() > 0.01
    answer = model.generate(**batch, max_new_tokens=4)
    assert answer == collect_without_cache(model, batch, 4)
    save_pretrained(model, tmp_path)
    assert find_part(tmp_path, "lm").config.cross_every == 1
    again, _ = assemble(find_part(tmp_path, "vision"), find_part(tmp_path, "lm"), tokenizer, MEAN)
    close(again.language_model(batch["input_ids"])["logits"], model.language_model(batch["input_ids"])["logits"])


def collect_without_cache(model, batch, count):
    ids = batch["input_ids"]
    for _ in range(count):
        row = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, model(**row)["logits"][:, -1:].argmax(-1)], dim=1)
    return ids[:, -count:].tolist()
