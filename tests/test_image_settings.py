"""Laws of lib/image_settings.py: what published files say is read as it is meant, or refused in one line."""

import json
from dataclasses import replace

import pytest

from lib.checkpoint import read_config, save_pretrained
from lib.image_settings import count_image_tokens, image_settings, read_image_settings
from lib.tokenizer import BPETokenizer
from processing_mllama import IDEFICS3_AROUND, MllamaImageProcessor
from siglip import SiglipVisionConfig
from toys import make_vlm
from vit_scratch import ViTConfig


@pytest.fixture
def tokenizer():
    return BPETokenizer.train("What is this?", vocab_size=260, special_tokens=["<|endoftext|>"])


PUBLISHED = [  # preprocessor_config.json as published, and what it means here
    ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 9, "width": 7}, "resample": 3}, (9, 7), "bicubic"),
    ({"size": 224, "resample": 2, "rescale_factor": 0.00392156862745098}, 224, "bilinear"),
    (
        {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 2048}, "resample": 1, "do_resize": True,
         "max_image_size": {"longest_edge": 512}, "do_image_splitting": True, "do_pad": True},
        512,
        "lanczos",
    ),
    (
        {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 336}, "do_pad": True, "do_center_crop": True},
        336,
        "bicubic",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("published", "size", "resample"), PUBLISHED)
def test_published_image_settings(published, size, resample):
    settings = image_settings(published)
    size = (size, size) if isinstance(size, int) else size
    assert (settings["image_size"], settings["resample"]) == (size, resample)
    assert settings["do_pad_square"] == (size == (336, 336))


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        ({"do_center_crop": True, "size": {"shortest_edge": 336}}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 4}, "resample"),
        ({"size": {"longest_edge": 512}}, "height"),
        ({"size": {"height": 0, "width": 5}}, "numbers from 1"),
        ({"image_std": [0, 1, 1]}, "above 0"),
        ({"size": "big"}, "'big'"),
    ],
)
def test_published_settings_that_are_not_done_here(tokenizer, tmp_path, published, reason):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=reason) as caught:
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer, num_image_token=4)
    assert "\n" not in str(caught.value)


def test_both_files_are_read(tmp_path):
    assert read_image_settings(tmp_path) == {}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": {"height": 32, "width": 16}}}))
    assert read_image_settings(tmp_path)["image_size"] == (32, 16), "where transformers 5 writes them"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 8}))
    assert read_image_settings(tmp_path)["image_size"] == (8, 8)


def test_placeholders_per_image():
    """Patches, over pixel shuffle's factor squared; one where the decoder looks at images by cross-attention."""
    config = make_vlm().config
    assert count_image_tokens(config, (16, 16)) == config.text_config.num_image_tokens == 16
    assert count_image_tokens(config, (32, 16)) == 32
    assert count_image_tokens(replace(config, pixel_shuffle=2), (16, 16)) == 4
    assert count_image_tokens(make_vlm(cross=True).config, (16, 16)) == 1
    assert count_image_tokens(SiglipVisionConfig(image_size=224, patch_size=14), (384, 384)) == 27**2
    assert count_image_tokens(ViTConfig(image_size=32, patch_size=8), (32, 64)) == 32


def test_opening_folders(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json"):
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": {"height": 32, "width": 32}}}))
    with pytest.raises(ValueError, match="give num_image_token"):
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
    assert MllamaImageProcessor.from_pretrained(tmp_path, tokenizer, num_image_token=4).image_size == (32, 32)
    model = make_vlm(projector_type="linear", projector_bias=False, pixel_shuffle=2, image_token_id=60)
    assert save_pretrained(model, tmp_path) == "idefics3"
    processor = MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
    assert (processor.num_image_token, processor.image_size, processor.around_image) == (16, (32, 32), ("", ""))
    (tmp_path / "processor_config.json").unlink()
    processor = MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
    assert (processor.num_image_token, processor.image_size) == (4, (16, 16)), "the model's own, where no other file says"
    assert MllamaImageProcessor.from_pretrained(tmp_path, tokenizer, image_size=64).num_image_token == 64
    tokenizer.add_special_tokens(["<fake_token_around_image>", "<global-img>"])
    assert MllamaImageProcessor.from_pretrained(tmp_path, tokenizer).around_image == IDEFICS3_AROUND
    assert processor.num_image_token == read_config(tmp_path).text_config.num_image_tokens
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)


def test_what_takes_no_images_is_named(tokenizer, tmp_path):
    save_pretrained(make_vlm().language_model, tmp_path)
    with pytest.raises(ValueError, match="takes no images"):
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
