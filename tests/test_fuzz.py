"""Laws of what reads files and flags that others wrote: whatever is in them, it is read right or refused in one line. Never
another exception, a wait without end, a huge allocation, a program run by a file, a path that leads out, or numbers that are
none. hypothesis draws the inputs: the same few at every run, and many others with

    HYPOTHESIS_EXAMPLES=1000 pytest tests/test_fuzz.py

A bug that it found has its own test, beside those of the module or in test_faults.py.
"""

import contextlib
import copy
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import generate
import train_vit
import train_vlm
from bench import peers as bench
from data import check
from data.image_cache import ImageCache
from data.images import decode_image, to_image
from data.llava import LlavaRows
from extras import train_llmvit, train_siglip
from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from gpt import GPT, GPTConfig
from lib import convert
from lib.chat import answer_prefix
from lib.checkpoint import from_pretrained, save_pretrained
from lib.cli import run_cli
from lib.run_state import load_state, save_state
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config, MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import IDEFICS3_AROUND, IMAGE_TOKEN, MllamaImageProcessor
from siglip import SiglipConfig, SiglipModel, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel

MORE = os.environ.get("HYPOTHESIS_EXAMPLES")
settings.register_profile(
    "fuzz", max_examples=int(MORE or 10), derandomize=not MORE, print_blob=bool(MORE), deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("fuzz")

SECONDS, MEBIBYTES = 20, 1024  # that one example may take, on a processor of its own and beyond what lies there before


class Hang(BaseException):
    """Nothing catches it on the way."""


@contextlib.contextmanager
def bounded():
    """Inside the block, time and memory are limited: what asks for more fails with an error that no law allows."""

    def too_long(number, frame):
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handlers = {which: signal.signal(which, too_long) for which in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEBIBYTES * 2**20, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # for what waits and does nothing
    try:
        yield
    except Hang:
        raise AssertionError(f"over {SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for which, handler in handlers.items():
            signal.signal(which, handler)


REFUSED = object()


def read_or_refused(call, *args):
    """What call(*args) returns, or REFUSED; any other exception than these two is a traceback for the user."""
    with bounded():
        try:
            return call(*args)
        except (ValueError, OSError) as error:
            assert str(error) and len(str(error)) < 2000
            return REFUSED


def said_by(main, *flags) -> tuple[int, str]:
    """Exit code and output of a script. A refusal is one line on standard error and exit code 2; 1 is the answer no."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded():
        try:
            run_cli(lambda: main(list(flags)))
        except SystemExit as ended:
            code = ended.code or 0
    lines = [line for line in err.getvalue().splitlines() if "error: " in line]
    assert "Traceback" not in err.getvalue() and (code, len(lines)) in ((0, 0), (1, 0), (2, 1)), (code, err.getvalue())
    return code, out.getvalue()


# ---- what is drawn ---------------------------------------------------------------------------------------------------

NASTY = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**9, -(10**18), 10**400, 0.5, -0.5, 1e-300, 1e308),
    *(math.nan, math.inf, -math.inf, "", "x", "0", "-1", "../../x", "\0", "\ud800", "<image>", "a" * 300),
    *([], [0], [None], [16, 16, 16], ["x"], [[[]]], {}, {"x": 1}, {"type": "x"}, {"rope_type": "linear"}),
]


def places(node, prefix=()):
    """The paths to all that lies in a JSON value."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys)[:40]:
        yield (*prefix, key)
        yield from places(node[key], (*prefix, key))


@st.composite
def spoiled(draw, whole):
    """A copy of a JSON value with one to three of its parts replaced, left out or doubled under another name."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(value))):
            break
        *way, last = draw(st.sampled_from(found))
        node = value
        for key in way:
            node = node[key]
        how = draw(st.sampled_from(["replace"] * 4 + ["leave out", "swap"]))
        if how == "replace":
            node[last] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif how == "leave out":
            del node[last]
        elif isinstance(node, dict):
            other = draw(st.sampled_from(list(node)))
            node[last], node[other] = node[other], node[last]
    return value


@st.composite
def damaged(draw, whole: bytes, beginning: int | None = None):
    """Bytes cut off, overwritten or inserted somewhere, in the first so many if given."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(len(data), beginning or len(data)) - 1)))
        how = draw(st.sampled_from(["byte", "number", "insert", "cut", "repeat"]))
        if how == "byte":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "number":  # sizes and offsets are such
            number = draw(st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
            size = draw(st.sampled_from([4, 8]))
            data[place : place + size] = (number % 256**size).to_bytes(size, draw(st.sampled_from(["little", "big"])))
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=16))
        elif how == "cut":
            del data[place:]
        else:
            data[place:place] = data[place : place + 64]
    return bytes(data)


# ---- images --------------------------------------------------------------------------------------------------------

SAVED = {  # what Pillow writes
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "ICO": ("L", "RGB", "RGBA"),
}
KINDS = [(kind, mode) for kind, modes in SAVED.items() for mode in modes]


def in_mode(mode: str, size=(24, 16)) -> Image.Image:
    """Noise. Pillow converts to some modes only by way of others."""
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3)).astype(np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", size, rgb.tobytes())
    return rgb.convert("I" if mode == "I;16" else mode).convert(mode)


def file_of(kind: str, mode: str, **options) -> bytes:
    buffer = io.BytesIO()
    in_mode(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def is_rgb(image) -> bool:
    return image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore:Saving I mode images as PNG")
@pytest.mark.parametrize("kind, mode", KINDS)
def test_every_mode_of_every_format_is_read_whatever_its_name_ends_in(tmp_path, kind, mode):
    for ending in ("jpg", "png", "txt"):
        (tmp_path / f"a.{ending}").write_bytes(file_of(kind, mode))
        found = decode_image(tmp_path / f"a.{ending}")
        assert is_rgb(found) and found.size == Image.open(tmp_path / f"a.{ending}").size


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_image_is_an_image_or_refused(data):
    kind, mode = data.draw(st.sampled_from(KINDS))
    found = read_or_refused(decode_image, data.draw(damaged(file_of(kind, mode))))
    assert found is REFUSED or is_rgb(found)


def png(width: int, height: int, depth: int, colour: int, rest: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rest) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    data = file_of("JPEG", "RGB")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height % 2**16, width % 2**16) + data[at + 4 :]


BOMBS = {
    "png": lambda w, h: png(w, h, 8, 2, zlib.compress(bytes(10**6))),
    "deep png": lambda w, h: png(w, h, 16, 0, zlib.compress(bytes(10**6))),
    "ppm": lambda w, h: b"P6 %d %d 255\n" % (w, h),
    "gif": lambda w, h: b"GIF89a" + struct.pack("<HH", w % 2**16, h % 2**16) + file_of("GIF", "L")[10:],
    "bmp": lambda w, h: file_of("BMP", "RGB")[:18] + struct.pack("<ii", w, h) + file_of("BMP", "RGB")[26:],
    "jpeg": jpeg,
}


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(list(BOMBS)), *(st.sampled_from([0, 1, 9000, 10**4, 65535, 10**6, 2**31 - 1]) for _ in "wh"))
def test_a_few_bytes_that_promise_a_huge_image_are_refused(kind, width, height):
    found = read_or_refused(decode_image, BOMBS[kind](width, height))
    assert found is REFUSED or is_rgb(found)


@given(
    st.sampled_from([np.uint8, np.int16, np.float32, np.float64, np.bool_, np.complex64]),
    st.lists(st.integers(0, 5), max_size=4), st.booleans(), st.sampled_from([0, 0.5, 1, -1, 300, math.nan, math.inf]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_an_array_is_an_image_or_refused(dtype, shape, as_tensor, value):
    array = np.full(shape, value).astype(dtype)
    found = read_or_refused(to_image, torch.from_numpy(array) if as_tensor else array)
    assert found is REFUSED or (is_rgb(found) and 0 not in found.size)


# ---- conversations ---------------------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
LONGER = [{"from": "system", "value": "Be short."}, *TURNS, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
ROWS = [
    {"id": 1, "image": "a.png", "conversations": TURNS},
    {"id": "x", "image": ["a.png"], "conversations": LONGER, "kinds": ["a", "b"]},
    {"conversations": [{"from": "human", "value": "Hello?"}, TURNS[1]]},
]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def small_tokenizer() -> BPETokenizer:
    tokenizer = BPETokenizer.train("What is this? A cat. It is a small cat, so there. " * 5, 300, CHAT, at_most=True)
    tokenizer.chat_template = "chatml"
    return tokenizer


def small_processor(**options) -> MllamaImageProcessor:
    return MllamaImageProcessor(small_tokenizer(), 4, 16, add_location_tokens=False, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    in_mode("RGB").save(folder / "images" / "a.png")
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    return folder


@given(st.data())
def test_rows_of_a_llava_file_are_usable_or_named(photos, data):
    """What is called usable can be encoded, and its images lie in their folder."""
    rows = data.draw(spoiled(ROWS) | spoiled([ROWS]) | spoiled({"rows": ROWS}))
    text = json.dumps(rows).encode()
    text = data.draw(st.just(text) | damaged(text))
    (photos / "rows.json").write_bytes(text)
    rows = read_or_refused(LlavaRows.read, photos / "rows.json", photos / "images")
    if rows is not REFUSED:
        rows.report().encode()
        processor, cache = small_processor(), ImageCache(16)
        for row in rows:
            ids, answers = processor.encode(row.messages, len(row.images))
            assert any(answers) and ids.count(processor.image_token_id) == 4 * len(row.images)
            for path in row.images:
                assert path.resolve().is_relative_to((photos / "images").resolve()) and cache[path] is not None


@given(st.data())
def test_no_name_in_a_llava_file_leads_out(photos, data):
    parts = st.sampled_from(["..", ".", "images", "a.png", "secret.png", "~", "", "/", "C:", "\\", "x"])
    name = "/".join(data.draw(st.lists(parts, max_size=6)))
    (photos / "names.json").write_text(json.dumps([{**ROWS[0], "image": name}, ROWS[2]]))
    for row in LlavaRows.read(photos / "names.json", photos / "images"):
        assert all(path.resolve().is_relative_to((photos / "images").resolve()) for path in row.images)


PIECES = [*CHAT, IMAGE_TOKEN, "<fake_token_around_image>", "<global-img>", "<loc0001>", "<|eot_id|>", "<imag", "e>", "user\n"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=8), st.integers(0, 2))
def test_special_token_text_in_a_question_stays_text(pieces, num_images):
    """Only the template writes <|im_end|>, and only images make placeholders; the rest comes back as it was written."""
    processor = small_processor(around_image=IDEFICS3_AROUND)
    tokenizer, text = processor.tokenizer, "".join(pieces)
    plain = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode(plain)) == plain
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "A cat."}]
    found = read_or_refused(processor.encode, messages, num_images)
    if found is REFUSED:
        assert text.count(IMAGE_TOKEN) not in (0, num_images)
        return
    ids, answers = found
    assert ids.count(processor.image_token_id) == 4 * num_images
    assert [ids.count(i) for i in tokenizer.convert_tokens_to_ids(CHAT)] == [0, 2, 2]
    said = tokenizer.decode([i for i, answer in zip(ids, answers, strict=True) if answer])
    assert said == "A cat.<|im_end|>"


# ---- tokenizers ------------------------------------------------------------------------------------------------------

PATTERNS = ["", "(a+)+$", "(a|a)*b", "\\", "(?<=a*)b", "[\\d", "a{1,1000000}", "(?=x)", "(?P<x>a)", "\\p{Nope}", "^", "$|", "."]


@given(st.data())
def test_a_spoiled_tokenizer_reads_text_or_is_refused(tmp_path, data):
    folder = tmp_path / "tokenizer"
    if not folder.exists():
        small_tokenizer().save_pretrained(folder)
        shutil.copytree(folder, tmp_path / "whole")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        value = json.loads((tmp_path / "whole" / file).read_text())
        if file == "tokenizer.json" and data.draw(st.booleans()):
            split = {"type": "Split", "pattern": {"Regex": data.draw(st.sampled_from(PATTERNS) | st.text(max_size=6))}}
            split |= {"behavior": "Isolated", "invert": False}
            bytes_after = value["pre_tokenizer"] | {"use_regex": False}
            value["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_after]}
        else:
            value = data.draw(st.just(value) | spoiled(value))
        (folder / file).write_text(json.dumps(value))
    tokenizer = read_or_refused(BPETokenizer.from_pretrained, folder)
    if tokenizer is not REFUSED:
        for text in ("A cat, 12 é\n<|im_end|>", "a" * 40 + "b", ""):
            ids = read_or_refused(tokenizer.encode, text)
            assert ids is REFUSED or (all(0 <= i < len(tokenizer) for i in ids) and isinstance(tokenizer.decode(ids), str))
        read_or_refused(answer_prefix, tokenizer)
        read_or_refused(tokenizer.encode_chat, [{"role": "user", "content": "What?"}])


# ---- checkpoints -----------------------------------------------------------------------------------------------------

EYES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
EYES |= {"image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 300, "hidden_size": 32, "n_heads": 4, "n_kv_groups": 2, "n_layers": 1, "hidden_dim": 32}
WORDS |= {"max_position_embeddings": 64, "rope_base": 10000.0}
CAPTIONS = {key: EYES[key] for key in list(EYES)[:4]} | {"vocab_size": 300, "max_position_embeddings": 8}
IDS, PIXELS = torch.arange(6)[None], torch.linspace(-1, 1, 768).view(1, 3, 16, 16)


def vlm(**options) -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration(MLLAMAConfig({**EYES}, {**WORDS}, image_token_id=299, **options))


MODELS = {
    "gpt2": lambda: GPT(GPTConfig(300, 64, 32, 1, 2)),
    "vit": lambda: ViTModel(ViTConfig(**EYES, num_labels=3)),
    "vit_scratch": lambda: ViTModel(ViTConfig(**EYES, num_labels=3, pooling="mean")),
    "siglip": lambda: SiglipTwoTower(SiglipConfig(EYES, CAPTIONS)),
    "siglip_vision_model": lambda: SiglipModel(SiglipVisionConfig(**EYES)),
    "llama": lambda: Llama3ForCausalLM(LLAMA32Config(**WORDS)),
    "mistral": lambda: Llama3ForCausalLM(LLAMA32Config(**{**WORDS, "n_heads": 3, "n_kv_groups": 3, "head_dim": 10})),
    "llama_scratch": lambda: Llama3ForCausalLM(LLAMA32Config(**{**WORDS, "mlp_bias": True, "qk_norm": True})),
    "llava": lambda: vlm(vision_feature_layer=-2),
    "idefics3": lambda: vlm(projector_type="linear", pixel_shuffle=2),
    "mllama_scratch": lambda: CrossAttentionVLM(CrossAttentionConfig({**EYES}, {**WORDS}, image_token_id=299, cross_every=1)),
}


@torch.no_grad()
def numbers(model) -> torch.Tensor:
    """What the model makes of something small."""
    if isinstance(model, SiglipTwoTower):
        return model.logits(PIXELS, IDS)
    if isinstance(model, ViTModel | SiglipModel):
        return model(PIXELS)
    if not isinstance(model, MllamaForConditionalGeneration):
        return model(IDS)["logits"]
    config = model.config
    token = config.image_token_id if config.image_token_id is not None else config.text_config.vocab_size - 1
    ids = torch.cat([torch.full((1, config.text_config.num_image_tokens), token), IDS], dim=1)
    return model(input_ids=ids, pixel_values=PIXELS)["logits"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{model_type: folder}, each with a twin "scratch" whose files are to be spoiled."""
    found = {}
    for kind, make in MODELS.items():
        torch.manual_seed(0)
        found[kind] = tmp_path_factory.mktemp(kind)
        assert save_pretrained(make(), found[kind] / "whole") == kind
        shutil.copytree(found[kind] / "whole", found[kind] / "scratch")
    return found


def put_back(folder: Path) -> Path:
    for file in (folder / "whole").iterdir():
        shutil.copyfile(file, folder / "scratch" / file.name)
    return folder / "scratch"


@pytest.mark.parametrize("kind", MODELS)
@given(st.data())
def test_a_spoiled_config_is_refused_or_gives_finite_numbers(folders, kind, data):
    scratch = put_back(folders[kind])
    config = data.draw(spoiled(json.loads((scratch / "config.json").read_text())))
    (scratch / "config.json").write_text(json.dumps(config))
    model = read_or_refused(from_pretrained, scratch)
    if model is not REFUSED:
        found = read_or_refused(numbers, model)
        assert found is REFUSED or found.isfinite().all()


def with_header(file: Path, edit) -> None:
    """Rewrite a safetensors file with another header: its length in 8 bytes, JSON, then the numbers."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(edit(json.loads(raw[8 : 8 + length]))).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@given(st.data())
def test_a_lying_safetensors_header_is_refused_or_harmless(folders, data):
    """The header says of each tensor its type, its shape and where its bytes begin and end."""
    kind = data.draw(st.sampled_from(list(MODELS)))
    scratch, expected = put_back(folders[kind]), numbers(from_pretrained(folders[kind] / "whole"))

    def edit(header):
        tensors = [name for name in header if name != "__metadata__"]
        if data.draw(st.booleans()):
            return data.draw(spoiled(header))
        entry = header[data.draw(st.sampled_from(tensors))]
        key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key == "dtype":
            entry[key] = data.draw(st.sampled_from(["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "x"]))
        else:
            entry[key] = data.draw(st.lists(st.sampled_from([-1, 0, 1, 32, 1024, 2**62, 2**64, 0.5]), max_size=3))
        return header

    with_header(scratch / "model.safetensors", edit)
    model = read_or_refused(from_pretrained, scratch)
    if model is not REFUSED:
        torch.testing.assert_close(numbers(model), expected)
    read_or_refused(lambda: list(convert.show(scratch)))


@given(st.data())
def test_damaged_weights_files_are_refused_or_give_finite_numbers(folders, data):
    kind = data.draw(st.sampled_from(list(MODELS)))
    scratch = put_back(folders[kind])
    whole = (scratch / "model.safetensors").read_bytes()
    (scratch / "model.safetensors").write_bytes(data.draw(damaged(whole) | damaged(whole, 300)))
    model = read_or_refused(from_pretrained, scratch)
    if model is not REFUSED:
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", MODELS)
@given(st.data())
def test_weights_that_are_no_numbers_are_refused_by_name(folders, kind, data):
    from safetensors.torch import load_file, save_file

    scratch = put_back(folders[kind])
    tensors = load_file(scratch / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    place = data.draw(st.integers(0, tensors[name].numel() - 1))
    tensors[name].view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    save_file(tensors, scratch / "model.safetensors")
    with pytest.raises(ValueError, match="not finite") as error:
        from_pretrained(scratch)
    assert name in str(error.value)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    """A LLaMA with its tokenizer."""
    gguf = pytest.importorskip("gguf", reason="only the gguf package writes the files to be read")
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train("a cat, a cat", 263, CHAT)
    model = Llama3ForCausalLM(LLAMA32Config(**{**WORDS, "vocab_size": 263}))
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = tokenizer.convert_ids_to_tokens(range(263))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CHAT else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer._spec["model"]["merges"]])
    writer.add_eos_token_id(tokens.index(CHAT[0]))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.": "attn_"}
    names |= {"model.layers.": "blk.", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "_proj": ""}
    names |= {"mlp.": "ffn_", "attn_o.": "attn_output."}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(BPETokenizer.from_pretrained(path)) == 263 and numbers(from_pretrained(path)).isfinite().all()
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore")
@given(st.data())
def test_a_damaged_gguf_file_is_refused_or_gives_finite_numbers(tmp_path, gguf_bytes, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data.draw(damaged(gguf_bytes, 400) | damaged(gguf_bytes)))
    model = read_or_refused(from_pretrained, path)
    if model is not REFUSED:
        assert read_or_refused(numbers, model) is REFUSED or numbers(model).isfinite().all()
    read_or_refused(BPETokenizer.from_pretrained, path)
    read_or_refused(lambda: list(convert.show(path)))


# ---- the state of a run ----------------------------------------------------------------------------------------------


class Payload:
    """What an evil pickle does when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@given(st.data())
def test_a_damaged_state_is_refused_or_whole(tmp_path, data):
    """Also where nothing but a number in a tensor has changed."""
    state = {"model": {"w": torch.arange(64.0)}, "steps_done": 7, "settings": {"lr": 0.1}}
    save_state(tmp_path, state)
    (tmp_path / "state.pt").write_bytes(data.draw(damaged((tmp_path / "state.pt").read_bytes())))
    found = read_or_refused(load_state, tmp_path)
    assert found is REFUSED or (torch.equal(found["model"]["w"], state["model"]["w"]) and found["steps_done"] == 7)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_file_is_a_program(tmp_path, photos, folders, protocol):
    """Pickles in every place where some library might open one."""
    evil, done = pickle.dumps(Payload(tmp_path / "done"), protocol), tmp_path / "done"
    (tmp_path / "state.pt").write_bytes(evil)
    assert read_or_refused(load_state, tmp_path) is REFUSED
    torch.save({"settings": Payload(done)}, tmp_path / "state.pt")
    assert read_or_refused(load_state, tmp_path) is REFUSED
    scratch = shutil.copytree(folders["llama"] / "whole", tmp_path / "evil")
    for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"):
        (scratch / name).write_bytes(evil)
        assert read_or_refused(from_pretrained, scratch) is REFUSED
        assert read_or_refused(BPETokenizer.from_pretrained, scratch) is REFUSED
    assert read_or_refused(decode_image, evil) is REFUSED
    assert not done.exists()


# ---- scripts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, folders):
    """A folder as train_vlm.py leaves it, and a twin to be spoiled."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    processor = small_processor(around_image=IDEFICS3_AROUND)
    config = MLLAMAConfig(
        EYES, {**WORDS, "vocab_size": len(processor.tokenizer)}, image_token_id=processor.image_token_id,
        projector_type="linear", pixel_shuffle=1,
    )  # fmt: skip
    save_pretrained(MllamaForConditionalGeneration(config), folder / "whole")
    processor.save_pretrained(folder / "whole")
    (folder / "whole" / "settings.json").write_text(json.dumps({"dataset": "scenes", "data": None, "blind": False}))
    in_mode("RGB").save(folder / "a.png")
    shutil.copytree(folder / "whole", folder / "scratch")
    code, said = said_by(generate.main, str(folder / "whole"), "--image", str(folder / "a.png"), "What?")
    assert code == 0 and said
    return folder


@given(st.data())
def test_a_spoiled_file_of_a_run_is_one_line_for_generate_and_evaluate(run, data):
    scratch = put_back(run)
    file = data.draw(st.sampled_from(sorted(scratch.glob("*.json"))))
    file.write_text(json.dumps(data.draw(spoiled(json.loads(file.read_text())))))
    common = [str(scratch), "--device", "cpu", "--max-new-tokens", "2"]
    if data.draw(st.booleans()):
        said_by(generate.main, *common, "--image", str(run / "a.png"), "What?")
    else:
        said_by(evaluate.main, *common, "--dataset", "scenes", "--split", "test", "--count", "1", "--out", str(run / "out"))


def checkpoint_main(argv: list[str]) -> None:
    """It reads sys.argv itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["checkpoint.py", *argv])
        convert.main()


VALUES = ["", "0", "1", "-1", "nan", "inf", "-inf", "1e999", "1e-320", "0.5", "9" * 30, "1" + "0" * 9, "1" + "0" * 5000, "x"]
VALUES += ["\0", "\ud800", "🙂", "../../x", "/dev/null", "/proc/self/mem", "a" * 5000, "None", "True", "-", "%s{}", "[1]"]
TRAINED = ["--device", "cpu", "--workers", "1", "--dry-run"]
SCRIPTS = {
    "train_vit": (train_vit.main, [*TRAINED, "--hidden-size", "16", "--layers", "1", "--heads", "1", "--batch-size", "8"]),
    "train_vlm": (train_vlm.main, [*TRAINED, "--size", "tiny", "--batch-size", "2", "--per-scene", "2", "--eval-count", "1"]),
    "train_siglip": (train_siglip.main, [*TRAINED, "--size", "tiny", "--dataset", "digits", "--batch-size", "4"]),
    "train_llmvit": (train_llmvit.main, [*TRAINED, "--size", "tiny", "--batch-size", "4"]),
    "generate": (generate.main, ["RUN", "--image", "PHOTO", "What?", "--max-new-tokens", "2", "--device", "cpu"]),
    "evaluate": (evaluate.main, ["RUN", "--count", "1", "--split", "test", "--max-new-tokens", "2", "--device", "cpu"]),
    "check": (check.main, ["ROWS"]),
    "checkpoint": (checkpoint_main, ["convert", "RUN", "converted"]),
    "bench": (bench.main, ["vit", "--size", "tiny-digits", "--batch", "1", "--rounds", "1", "--device", "cpu"]),
}


def flags_of(main, command: list[str]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return sorted(set(re.findall(r"^ +(--[a-z-]+)", out.getvalue(), re.MULTILINE)) - {"--help"})


@pytest.mark.parametrize("script", SCRIPTS)
@given(st.data())
def test_any_value_of_any_flag_is_taken_or_refused_in_one_line(tmp_path, monkeypatch, run, photos, script, data):
    main, flags = SCRIPTS[script]
    (photos / "good.json").write_text(json.dumps(ROWS))
    known = {"RUN": str(run / "whole"), "PHOTO": str(run / "a.png"), "ROWS": str(photos / "good.json")}
    flags = [known.get(flag, flag) for flag in flags]
    known_flags = flags_of(main, flags[:1] if flags[0] in ("convert", "vit") else [])
    chosen = st.tuples(st.sampled_from(known_flags), st.sampled_from(VALUES) | st.text(max_size=4))
    for flag, value in data.draw(st.lists(chosen, min_size=1, max_size=2)):
        flags += [flag] if data.draw(st.integers(0, 9)) == 0 else [f"{flag}={value}"]
    (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "a" / "b")  # from where --out ../../x leads
    said_by(main, *flags)
