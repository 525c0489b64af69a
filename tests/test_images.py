"""Laws of data/images.py: every image is decoded rightly or named with a reason."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import images
from data.images import decode_image
from samples import encoded, noise


def palette_with_a_hole() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(image, transparency=1)


GOOD = {
    "rgb": (encoded(Image.new("RGB", (4, 4), (10, 20, 30))), (10, 20, 30)),
    "black and white": (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "grey": (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
    "palette": (encoded(Image.new("RGB", (4, 4), (10, 20, 30)).quantize()), (10, 20, 30)),
    "palette with a transparent colour": (palette_with_a_hole(), (255, 255, 255)),
    "clear": (encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0))), (255, 255, 255)),
    "half clear": (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), (127, 127, 127)),
    "grey, clear": (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
    "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    "16-bit grey png": (encoded(Image.fromarray(np.full((4, 4), 0x8000, np.uint16))), (128, 128, 128)),
    "16-bit grey tiff": (encoded(Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), "TIFF"), (255, 255, 255)),
    "16-bit grey, dim": (encoded(Image.fromarray(np.full((4, 4), 2570, np.uint16))), (10, 10, 10)),
    "32-bit float tiff": (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
    "animation": (
        encoded(
            Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
        ),
        (255, 0, 0),
    ),
    "webp": (encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
    "bmp": (encoded(Image.new("RGB", (4, 4), (10, 20, 30)), "BMP"), (10, 20, 30)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_usual_kind_of_image_becomes_rgb(kind):
    data, colour = GOOD[kind]
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1


def test_deep_grey_keeps_its_gradations():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    assert np.abs(np.asarray(decode_image(encoded(Image.fromarray(ramp))))[0, :, 0] - np.arange(256.0)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(16, 8), "JPEG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(wanted))
    assert decode_image(data).size == ((16, 8) if orientation < 5 else (8, 16))


def test_a_path_works_as_bytes_do(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(noise()))
    assert (
        decode_image(tmp_path / "x.png").tobytes()
        == decode_image(str(tmp_path / "x.png")).tobytes()
        == noise().tobytes()
    )
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "y.png")


def test_a_large_jpeg_may_decode_smaller_but_never_below_twice_the_need():
    data = encoded(noise(1024, 512), "JPEG")
    assert decode_image(data).size == (1024, 512)
    assert decode_image(data, at_least=64).size == (256, 128)


def broken_png() -> bytes:
    data = bytearray(encoded(noise()))
    data[60] ^= 255
    return bytes(data)


BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"hello, I am no image", "not an image"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "not an image"),
    "cut jpeg": (encoded(noise(64, 64), "JPEG")[:-500], "cannot be decoded.*truncated"),
    "only a jpeg's head": (encoded(noise(64, 64), "JPEG")[:30], "not an image|cannot be decoded"),
    "cut png": (encoded(noise(64, 64))[:-3000], "cannot be decoded"),
    "flipped bits": (broken_png(), "cannot be decoded"),
    "not a number": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not finite"),
    "postscript, which a program would have to run": (encoded(noise(), "EPS"), "not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_bad_image_is_a_value_error_with_the_reason(kind):
    data, words = BAD[kind]
    with pytest.raises(ValueError, match=words) as error:
        decode_image(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [IndexError("x"), KeyError("x"), SyntaxError("x"), MemoryError(), struct.error("x")])
def test_whatever_a_decoder_raises_is_a_value_error(monkeypatch, error):
    monkeypatch.setattr(images, "upright_rgb", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(encoded(noise()))


@pytest.mark.parametrize("limit", [64, 40], ids=["above the limit", "above twice the limit"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_named(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"more than {limit} pixels"):
        decode_image(encoded(noise(12, 8)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "ICO"])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_raises_anything_but_value_error(kind):
    """Forty files a format with random bytes changed or cut off: decoded, or a ValueError."""
    random = np.random.RandomState(0)
    whole = encoded(noise(32, 32), kind)
    for _ in range(40):
        data = bytearray(whole)
        for place in random.randint(0, len(data), 6):
            data[place] = random.randint(256)
        data = bytes(data[: random.randint(8, len(data) + 1)])
        try:
            assert decode_image(data).mode == "RGB"
        except ValueError:
            continue
