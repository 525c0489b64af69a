"""Laws of lib/image_settings.py: what published files say is read as it is meant, or refused in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_settings import ImageSettings
from data.tiles import find_tiling
from lib.checkpoint import read_config, save_pretrained
from lib.image_settings import count_image_tokens, image_settings, read_image_settings, write_image_settings
from lib.tokenizer import BPETokenizer
from processing_mllama import IDEFICS3_AROUND, MllamaImageProcessor, process_images
from siglip import SiglipVisionConfig
from toys import make_vlm
from vit_scratch import ViTConfig


@pytest.fixture
def tokenizer():
    return BPETokenizer.train("What is this?", vocab_size=260, special_tokens=["<|endoftext|>"])


CLIP_SCALE = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PUBLISHED = [  # preprocessor_config.json as published, made small; what the file leaves out is its processor's default
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 9, "width": 7}, "resample": 3},
    {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 20, "width": 20}, "image_mean": [0.2, 0.3, 0.4],
     "do_center_crop": None, "crop_size": None, "data_format": "channels_first", "disable_grouping": None, "device": None,
     "input_data_format": None, "return_tensors": None, "default_to_square": True, "do_pad": None, "pad_size": None},
    {"image_processor_type": "ViTImageProcessor", "size": 22, "resample": 2, "rescale_factor": 0.00392156862745098},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 22, "resample": 2, "image_mean": [0.5, 0.5, 0.5]},
    {"image_processor_type": "ViTImageProcessor", "size": [18, 24], "resample": 0, "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "rescale_factor": 1 / 127.5},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_rescale": False, "resample": 4},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "image_mean": 0.4, "image_std": [0.3] * 3},
    {"feature_extractor_type": "DeiTFeatureExtractor", "size": 30, "crop_size": 26, "do_center_crop": True, "resample": 3},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 24, **CLIP_SCALE, "resample": 3},
    {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 20}, "crop_size": {"height": 27, "width": 25}},
    {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": {"height": 27, "width": 25}},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28},
     "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True},
    {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 33}, "crop_size": 33, "do_pad": True},
    {"image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 33}, "crop_size": 33},
    {"image_processor_type": "LlavaImageProcessor", "size": {"height": 16, "width": 16}, "do_pad": True,
     "do_center_crop": False},
]  # fmt: skip
TILED = {"size": {"longest_edge": 60}, "max_image_size": {"longest_edge": 16}, "image_processor_type": "Idefics3ImageProcessor"}
PUBLISHED_TILES = [
    TILED,
    TILED | {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 64}, "video_sampling": {"fps": 1}},
    TILED | {"image_processor_type": "SmolVLMImageProcessorFast", "resample": 3, "size": {"longest_edge": 33}},
    TILED | {"do_image_splitting": False},
    TILED | {"do_image_splitting": False, "do_resize": False},
    TILED | {"do_resize": False},
    TILED | {"size": {"height": 20, "width": 40}, "do_pad": False},
    TILED | {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 1024}},
]
ODD_SIZES = [(40, 30), (30, 40), (16, 16), (17, 16), (97, 8), (8, 97), (1, 1), (3, 90), (65, 64), (33, 50), (61, 47)]


def noise(number, size):
    return Image.fromarray(np.random.RandomState(number).randint(0, 256, (*size[::-1], 3)).astype(np.uint8))


def reference(published, tmp_path):
    """transformers' own, as its loader makes it of such a file."""
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    return transformers.AutoImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("published", PUBLISHED)
def test_pixels_of_published_settings_are_those_of_transformers(published, tmp_path):
    """Bit for bit: CLIP's images were squeezed, a rescale_factor was refused, 0.5 stood for a mean that a file left out."""
    theirs, settings = reference(published, tmp_path), read_image_settings(tmp_path)
    images = [noise(k, size) for k, size in enumerate(ODD_SIZES)]
    expected = theirs(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(process_images(images, **settings), expected)
    again = tmp_path / "again"
    write_image_settings(again, ImageSettings(**settings), "ViT")
    assert ImageSettings(**read_image_settings(again)) == ImageSettings(**settings), "what is written is read as the same"
    if published.get("rescale_factor") != 1 / 127.5:
        found = reference(json.loads((again / "preprocessor_config.json").read_text()), again)(images, return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected)


@pytest.mark.parametrize("published", PUBLISHED_TILES)
def test_tiles_are_those_of_transformers(published, tmp_path):
    """Bit for bit, in rows and columns as its prompts name them: they were dropped without a word, and one resize stood for
    two."""
    theirs, settings = reference(published, tmp_path), ImageSettings(**read_image_settings(tmp_path))
    large = settings.image_size[0] > 100
    for k, size in enumerate([(40, 30), (9, 31)] if large else ODD_SIZES):
        found = theirs([noise(k, size)], return_tensors="pt", return_row_col_info=True)
        assert torch.equal(process_images([noise(k, size)], settings), found["pixel_values"][0]), size
        assert [list(find_tiling(noise(k, size), settings))] == [[found["rows"][0][0], found["cols"][0][0]]], size
    again = tmp_path / "again"
    write_image_settings(again, settings)
    assert ImageSettings(**read_image_settings(again)) == settings


def test_a_file_is_measured_as_it_stands_upright(tmp_path):
    """The header's width is the height of a photo that EXIF turns: the tiles would be counted the wrong way round."""
    settings, tags = ImageSettings((16, 16), size={"longest_edge": 64}, fit="tiles"), Image.Exif()
    tags[0x0112] = 6
    noise(0, (60, 20)).save(tmp_path / "turned.jpg", exif=tags)
    for form in (tmp_path / "turned.jpg", str(tmp_path / "turned.jpg"), (tmp_path / "turned.jpg").read_bytes()):
        rows, columns = find_tiling(form, settings)
        assert (rows, columns) == (4, 2) and len(process_images([form], settings)) == 9
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert find_tiling(opened, settings) == (4, 2)
    assert find_tiling(np.zeros((20, 60, 3), np.uint8), settings) == find_tiling(torch.zeros(3, 20, 60), settings) == (2, 4)
    with pytest.raises(ValueError, match="not an image"):
        find_tiling(b"hello", settings)


SIGLIP = {"image_processor_type": "SiglipImageProcessor"}


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor.*known are"),
        ({"size": 8}, "no image_processor_type"),
        (SIGLIP | {"crop_pct": 0.875}, "not known here: crop_pct"),
        (SIGLIP | {"rescale_offset": True}, "rescale_offset"),
        (SIGLIP | {"do_normalize": "no"}, "do_normalize is 'no'"),
        (SIGLIP | {"rescale_factor": 0}, "rescale_factor"),
        (SIGLIP | {"resample": 9}, "resample"),
        (SIGLIP | {"size": {"longest_edge": 512}}, "different sizes"),
        (SIGLIP | {"size": {"shortest_edge": 512}}, "different sizes"),
        (SIGLIP | {"size": 512}, "different sizes"),
        (SIGLIP | {"size": {"shortest_edge": 512, "longest_edge": 900}}, "alone"),
        (SIGLIP | {"size": {"height": 0, "width": 5}}, "numbers from 1"),
        (SIGLIP | {"size": {"height": True, "width": 5}}, "numbers from 1"),
        (SIGLIP | {"size": {"height": 10**12, "width": 5}}, "numbers from 1 to 8192"),
        (SIGLIP | {"image_std": [0, 1, 1]}, "above 0"),
        (SIGLIP | {"size": "big"}, "'big'"),
        (SIGLIP | {"do_center_crop": True}, "crop_size is None"),
        (SIGLIP | {"do_pad": True, "pad_size": 900}, "pad_size"),
        (SIGLIP | {"do_image_splitting": True}, "only Idefics3's"),
        (SIGLIP | {"data_format": "channels_last"}, "channels_last"),
        (TILED | {"max_image_size": {"height": 5, "width": 5}}, "max_image_size"),
        (TILED | {"do_center_crop": True, "crop_size": 5}, "not cropped"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False}, "do_pad is true"),
        ([1], "JSON list"),
    ],
)
def test_published_settings_that_are_not_done_here(tokenizer, tmp_path, published, reason):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=reason) as caught:
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer, num_image_token=4)
    assert "\n" not in str(caught.value) and str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_images_of_another_size_are_refused_where_nothing_resizes_them(tmp_path):
    settings = image_settings(SIGLIP | {"do_resize": False})
    assert process_images([noise(0, (7, 9))], **settings, image_size=(9, 7)).shape == (1, 3, 9, 7)
    with pytest.raises(ValueError, match="image 0: 7x9 is not resized, and the model reads 9x9"):
        process_images([noise(0, (7, 9))], **settings, image_size=9)


def test_both_files_are_read(tmp_path):
    assert read_image_settings(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SIGLIP | {"size": {"height": 8, "width": 8}}))
    assert read_image_settings(tmp_path)["image_size"] == (8, 8)
    nested = {"image_processor": SIGLIP | {"size": {"height": 32, "width": 16}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_image_settings(tmp_path)["image_size"] == (32, 16), "where transformers 5 writes them, and looks first"
    (tmp_path / "preprocessor_config.json").unlink()
    del nested["image_processor"]["image_processor_type"]
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    assert read_image_settings(tmp_path)["image_size"] == (32, 16), "config.json says whose settings they are"


def test_a_folder_that_does_not_say_how_images_are_prepared_is_named(tmp_path, capsys):
    """Where its preprocessor_config.json was lost, SigLIP's settings stood for CLIP's without a word."""
    (tmp_path / "config.json").write_text("{}")
    assert read_image_settings(tmp_path) == {}
    assert f"{tmp_path} does not say how its images are prepared" in capsys.readouterr().err


def test_placeholders_per_image():
    """Patches, over pixel shuffle's factor squared; one where the decoder looks at images by cross-attention."""
    config = make_vlm().config
    assert count_image_tokens(config, (16, 16)) == config.text_config.num_image_tokens == 16
    assert count_image_tokens(config, (32, 16)) == 32
    assert count_image_tokens(replace(config, pixel_shuffle=2), (16, 16)) == 4
    assert count_image_tokens(make_vlm(cross=True).config, (16, 16)) == 1
    assert count_image_tokens(SiglipVisionConfig(image_size=224, patch_size=14), (384, 384)) == 27**2
    assert count_image_tokens(ViTConfig(image_size=32, patch_size=8), (32, 64)) == 32
    with pytest.raises(ValueError, match="cannot be cut into"):  # it was a traceback
        count_image_tokens(ViTConfig(image_size=32, patch_size=8), (33, 33))


def test_opening_folders(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json"):
        MllamaImageProcessor.from_pretrained(tmp_path, tokenizer)
    nested = {"image_processor": SIGLIP | {"size": {"height": 32, "width": 32}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
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
