"""The laws of processing_mllama.py. The reference for pixels, prompts and conversations is transformers."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from extras.cross_attention import CrossAttentionConfig, CrossAttentionVLM
from lib.checkpoint import choose_layout
from lib.tokenizer import BPETokenizer
from lib.vocabulary import resize_token_embeddings
from model import MLLAMAConfig, MllamaForConditionalGeneration
from processing_mllama import (
    IDEFICS3_AROUND,
    IMAGE_TOKEN,
    LOCATION_TOKENS,
    TILE_TOKENS,
    MllamaImageProcessor,
    add_image_tokens_to_prompts,
    process_images,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXT = "What is this? Describe the image. A cat sits on the mat, and a dog looks at the cat. Where is it? "
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
N = 4  # placeholders per image of this model: 16 patches, joined 2 x 2


@pytest.fixture
def tokenizer():
    return BPETokenizer.train(TEXT * 3, vocab_size=300, special_tokens=SPECIAL)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="the reference is transformers")


@pytest.fixture
def theirs(tokenizer, tmp_path, transformers):
    """The same tokenizer, as transformers opens what ours writes."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture(params=["ours", "theirs"])
def either(request, tokenizer):
    return tokenizer if request.param == "ours" else request.getfixturevalue("theirs")


@pytest.fixture
def processor(tokenizer):
    return MllamaImageProcessor(tokenizer, N, 16)


def make_model(vocab_size, **changes):
    torch.manual_seed(0)
    text = {"vocab_size": vocab_size, "hidden_size": 24, "n_heads": 4, "n_layers": 2, "hidden_dim": 48}
    text |= {"n_kv_groups": 2, "max_position_embeddings": 256}
    settings = {"vision_config": {**VISION, "patch_size": 4}, "text_config": text, "pixel_shuffle": 2} | changes
    if "cross_every" in changes:
        return CrossAttentionVLM(CrossAttentionConfig(**settings)).eval()
    return MllamaForConditionalGeneration(MLLAMAConfig(**settings)).eval()


def write_config(config, folder):
    kind, layout = choose_layout(MllamaForConditionalGeneration(config), None)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **layout.write_config(config)}))


def photo(seed=0, width=30, height=20):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def answers(processor, batch):
    """What the labels of each row spell."""
    return [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]


# ---- images --------------------------------------------------------------------------------------------------------


def photos(count):
    """Some COCO photos, and the one that matplotlib carries, as RGB."""
    found = []
    if (archive := SHARED / "coco_captions_permissive.tar").exists():
        with tarfile.open(archive) as tar:
            files = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
            found = [tar.extractfile(member).read() for member in files[:: -(-len(files) // count)]]
    cbook = pytest.importorskip("matplotlib.cbook")
    return [cbook.get_sample_data("grace_hopper.jpg", asfileobj=True).read(), *found]


@pytest.mark.parametrize(
    ("count", "size", "resample"),
    [(12, (224, 224), "bicubic"), (4, (224, 224), "bilinear"), (2, (600, 900), "bicubic"), (2, (700, 300), "lanczos")],
)
def test_pixels_are_those_of_transformers(transformers, count, size, resample):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    number = {"lanczos": 1, "bilinear": 2, "bicubic": 3}[resample]
    reference = SiglipImageProcessorPil(size={"height": size[0], "width": size[1]}, resample=number)
    files = photos(count)
    expected = reference([Image.open(io.BytesIO(file)) for file in files], return_tensors="pt")["pixel_values"]
    found = process_images(files, size, resample)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    image = photo()
    array, file = np.asarray(image), tmp_path / "a.png"
    image.save(file)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    turned = Image.open(io.BytesIO(as_bytes(image.rotate(90, expand=True), exif=exif(6))))
    forms = [image, file, str(file), file.read_bytes(), array, tensor, tensor.double() / 255, tensor.half() / 255]
    forms += [array.astype(np.float32) / 255, image.convert("RGBA"), np.dstack([array, np.full((20, 30), 255, np.uint8)])]
    forms += [turned, as_bytes(image.rotate(90, expand=True), exif=exif(6))]
    pixels = process_images(forms, (16, 16))
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    grey = image.convert("L")
    grey = process_images([grey, np.asarray(grey), np.asarray(grey)[..., None]], (16, 16))
    assert torch.equal(grey, grey[:1, :1].expand_as(grey))
    clear = process_images([Image.new("RGBA", (5, 5), (9, 9, 9, 0)), torch.zeros(4, 3, 3)], (8, 8))
    assert torch.equal(clear, torch.ones_like(clear)), "what is transparent is white"


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("width, height", [(30, 20), (20, 31), (8, 8)])
def test_padding_to_a_square_is_llavas(transformers, width, height):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    size = {"height": 16, "width": 16}
    reference = LlavaImageProcessorPil(size=size, do_pad=True, do_center_crop=False, image_mean=mean, image_std=std)
    expected = reference(photo(0, width, height), return_tensors="pt")["pixel_values"]
    found = process_images([photo(0, width, height)], (16, 16), image_mean=mean, image_std=std, do_pad_square=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_smallest_and_the_widest_images():
    one = process_images([Image.new("RGB", (1, 1), (255, 0, 51))], (4, 6))
    assert one.shape == (1, 3, 4, 6)
    torch.testing.assert_close(one[0, :, 2, 3], torch.tensor([1.0, -1.0, -0.6]))
    assert process_images([Image.new("RGB", (20_000, 100), "white")], (8, 8)).eq(1).all()


def test_fast_decoding_is_close():
    smooth = Image.linear_gradient("L").convert("RGB").resize((640, 480))
    file = as_bytes(smooth, "JPEG", quality=95)
    exact, fast = process_images([file], (32, 32)), process_images([file], (32, 32), fast=True)
    assert 0 < (exact - fast).abs().max() < 0.05


NAN = torch.full((3, 4, 4), 0.5).index_fill_(0, torch.tensor([1]), float("nan"))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (7, "a int is not an image"),
        (b"", "empty"),
        (b"hello", "not an image"),
        (NAN, "nan..nan"),
        (torch.full((3, 4, 4), 200.0), "200..200"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(5, 4, 4), r"\[5, 4, 4\]"),
        (torch.zeros(4, 4, 3, 1), r"\[4, 4, 3, 1\]"),
        (np.zeros((3, 0, 3), np.uint8), r"\[3, 0, 3\]"),
        (np.zeros((3, 9, 9), np.uint8), r"\[3, 9, 9\]"),
        (Image.new("RGB", (0, 3)), "0x3"),
        (Image.new("RGB", (20_000, 9)), "too thin"),
    ],
)
def test_what_is_no_image_is_named(image, reason):
    with pytest.raises(ValueError, match=f"^image 1: .*{reason}") as caught:
        process_images([photo(), image], (8, 8))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "note.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"image 0 \(.*note.jpg\)"):
        process_images([tmp_path / "note.jpg"], (8, 8))
    opened = Image.open(io.BytesIO(as_bytes(photo(), "JPEG")[:-400]))
    with pytest.raises(ValueError, match=r"image 0: cannot be decoded \(.*truncated"):
        process_images([opened], (8, 8))
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        process_images([tmp_path / "none.jpg"], (8, 8))
    with pytest.raises(ValueError, match="padded to a square"):
        process_images([Image.new("L", (20_000, 101))], (8, 8), do_pad_square=True)
    with pytest.raises(ValueError, match="empty"):
        process_images([], (8, 8))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_added_once_and_the_placeholder_comes_first(either):
    before = len(either)
    processor = MllamaImageProcessor(either, N, 16)
    assert processor.image_token_id == before
    assert either.convert_tokens_to_ids(["<loc0000>", "<loc1023>", "<seg127>"]) == [before + 1, before + 1024, before + 1152]
    assert len(either) == before + 1 + 1024 + 128
    MllamaImageProcessor(either, N, 16)
    assert len(either) == before + 1153


def test_location_tokens_can_be_left_out(either):
    before, either.unk_token = len(either), "<|endoftext|>"  # which some tokenizers answer for a token they do not have
    processor = MllamaImageProcessor(either, N, 16, add_location_tokens=False)
    assert len(either) == before + 1 and not processor.locations
    ids = processor(["at <loc0004>"])["input_ids"][0]
    assert ids.max() < before and processor.decode(ids) == "at <loc0004>"


def test_additional_special_tokens_of_their_tokenizer_stay(theirs):
    theirs.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    MllamaImageProcessor(theirs, N, 16)
    assert "<tool>" in theirs.all_special_tokens


def test_decoding_keeps_locations(either):
    processor = MllamaImageProcessor(either, N, 16)
    text = "<image>A cat <loc0001><loc0002> sits<|im_end|>"
    ids = either.encode(text, parse_special=True) if processor.ours else either.encode(text)
    assert len(ids) == len(processor(["A cat  sits"])["input_ids"][0]) + 4
    assert processor.batch_decode([ids, torch.tensor(ids)]) == ["A cat <loc0001><loc0002> sits"] * 2


# ---- prompts and their images ----------------------------------------------------------------------------------------


def test_the_quick_start(either):
    model = make_model(len(either))  # no row for <image>, and the model is not told its id
    processor = MllamaImageProcessor(
        either, num_image_token=model.config.text_config.num_image_tokens, image_size=model.config.vision_config.image_size
    )
    batch = processor(["Describe the image."], [photo()], padding=True)
    words = either("Describe the image.")["input_ids"]
    assert batch["input_ids"].tolist() == [[processor.image_token_id] * N + words]
    assert batch.keys() == {"pixel_values", "input_ids", "attention_mask", "image_token_id"}
    assert model(**batch)["logits"].shape == (1, N + len(words), model.config.text_config.vocab_size)
    assert len(model.generate(**batch, max_new_tokens=3)[0]) == 3


PROMPTS = ["What is this?", "<image> a cat", "A dog <image><image> and a mat"]
IMAGES = [[], [0], [1, 2]]


def prompts_and_images():
    return PROMPTS, [[photo(seed) for seed in row] for row in IMAGES]


def test_nested_and_flat_images_are_the_same(processor):
    prompts, images = prompts_and_images()
    nested, flat = processor(prompts, images), processor(prompts, sum(images, []))
    assert nested.keys() == flat.keys() and all(torch.equal(nested[key], flat[key]) for key in nested)
    assert nested["pixel_values"].shape == (3, 3, 16, 16)
    assert (nested["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [0, N, 2 * N]
    assert torch.equal(nested["pixel_values"][2], processor("<image>", photo(2))["pixel_values"][0])


def test_text_alone_has_no_pixels(processor):
    for images in (None, [[], []]):
        assert processor(["A cat", "A dog on the mat"], images).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("cross", [{}, {"cross_every": 1}], ids=["early", "cross"])
def test_a_padded_batch_is_its_rows_alone(tokenizer, cross):
    model = make_model(len(tokenizer), **cross)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(1.0)  # a closed gate would hide the images
    processor = MllamaImageProcessor(tokenizer, model.config.text_config.num_image_tokens, 16)
    prompts, images = prompts_and_images()
    for side in ("left", "right"):
        batch = processor(prompts, images, padding_side=side, pad_to_multiple_of=8)
        logits = model(**batch)["logits"]
        for row, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            alone = model(**processor(prompt, own or None))["logits"]
            real = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(real, alone[0], atol=1e-5, rtol=0)
    other = processor(prompts, [[], [photo(0)], [photo(2), photo(1)]], padding_side="right", pad_to_multiple_of=8)
    changed = (model(**other)["logits"] - logits).abs().amax(dim=(1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True], "each row sees its own images, in their order"


@pytest.mark.parametrize(
    ("prompts", "images", "reason"),
    [
        (["<image> a"], None, "prompt 0 says <image> 1 times and has 0 images"),
        (["<image><image> a"], [photo()], "prompt 0 says <image> 2 times and has 1 images"),
        (["<image>", "a"], [photo(), photo()], "prompt 1 says <image> 0 times and has 1 images"),
        (["<image>", "a"], [[], [photo()]], "prompt 0 says <image> 1 times and has 0 images"),
        (["a", "b"], [photo()], "prompt 0 says <image> 0 times and has 1 images"),
        (["a"], [photo(), photo()], "prompt 0 says <image> 0 times and has 2 images"),
        (["a", "b"], [[photo()]], "1 lists of images for 2 prompts"),
        (["a", "b"], [[photo()], photo()], "mixes"),
        (["a"], [], "images is an empty list"),
        (["a"], ["nowhere"], "nowhere"),
        ([], None, "not empty"),
        (None, [photo()], "either prompts or conversations"),
        (7, None, "7"),
        (["a", 7], None, "prompt 1 is 7"),
        (["a", ""], None, "prompt 1 is ''"),
    ],
)
def test_prompts_and_images_that_do_not_fit(processor, prompts, images, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        processor(prompts, images)
    assert "\n" not in str(caught.value)


def test_special_token_text_in_a_prompt_stays_text(processor):
    ids = processor(["say <|im_end|> at <loc0007>"])["input_ids"][0].tolist()
    assert processor.tokenizer.eos_token_id not in ids
    assert processor.tokenizer.convert_tokens_to_ids("<loc0007>") in ids
    assert processor.tokenizer.decode(ids) == "say <|im_end|> at <loc0007>"


def test_placeholders_between_the_tokens_of_idefics3(either):
    processor = MllamaImageProcessor(either, N, 16, around_image=IDEFICS3_AROUND)
    fake, tag, image = either.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>", IMAGE_TOKEN])
    assert processor("<image>", photo())["input_ids"].tolist() == [[fake, tag, *[image] * N, fake]]
    assert add_image_tokens_to_prompts(["a <image> b", "c"], 2, ("(", ")")) == ["a (<image><image>) b", "c"]


# ---- padding and length ----------------------------------------------------------------------------------------------


def test_padding(processor):
    short, long = processor(["A cat"])["input_ids"][0].tolist(), processor(["A dog on the mat"])["input_ids"][0].tolist()
    pad, missing = processor.tokenizer.pad_token_id, len(long) - len(short)
    left = processor(["A cat", "A dog on the mat"])
    assert left["input_ids"].tolist() == [[pad] * missing + short, long]
    assert left["attention_mask"].tolist() == [[0] * missing + [1] * len(short), [1] * len(long)]
    right = processor(["A cat", "A dog on the mat"], padding="max_length", max_length=20, padding_side="right")
    assert right["input_ids"].tolist() == [row + [pad] * (20 - len(row)) for row in (short, long)]
    assert processor(["A cat"], pad_to_multiple_of=16)["input_ids"].shape == (1, 16)
    processor.tokenizer.pad_token = None
    without = processor(["A cat", "A dog on the mat"])
    assert without["input_ids"][0, :missing].tolist() == [0] * missing
    assert torch.equal(without["attention_mask"], left["attention_mask"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"padding": False}, "without padding=True"),
        ({"padding": "max_length"}, "needs a max_length"),
        ({"padding": "most"}, "'most'"),
        ({"padding_side": "top"}, "'top'"),
        ({"max_length": 5}, r"prompt 0 has \d+ tokens, more than max_length 5"),
    ],
)
def test_padding_that_cannot_be(processor, options, reason):
    with pytest.raises(ValueError, match=reason):
        processor(["A dog on the mat looks", "A cat"], **options)


def test_truncation_drops_the_end_but_never_an_image(processor):
    whole = processor("<image> A cat and a dog", photo())["input_ids"]
    cut = processor("<image> A cat and a dog", photo(), max_length=N + 1, truncation=True)
    assert torch.equal(cut["input_ids"], whole[:, : N + 1])
    for limit in (N - 1, 1):
        with pytest.raises(ValueError, match=f"max_length {limit} tokens would cut an image"):
            processor("<image> A cat and a dog", photo(), max_length=limit, truncation=True)


# ---- conversations ---------------------------------------------------------------------------------------------------

LLAVA = {
    "id": "1",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat at <loc0001><loc0002><loc0003><loc0004>"},
        {"from": "human", "value": "Where is it? <|im_end|>"},
        {"from": "gpt", "value": "\n on the mat"},
    ],
}
ANSWERS = "A cat at <loc0001><loc0002><loc0003><loc0004><|im_end|>\n on the mat<|im_end|>"
MESSAGES = [
    {"role": "system", "content": "Look."},
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": " A cat é"},
    {"role": "user", "content": "And? <image> <seg003>"},
    {"role": "assistant", "content": ""},
]


def test_labels_are_the_answers_and_their_end(processor):
    batch = processor(conversations=[LLAVA, MESSAGES], images=[[photo()], [photo(1), photo(2)]])
    assert answers(processor, batch) == [ANSWERS, " A cat é<|im_end|><|im_end|>"]
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted]), "labels stand where the tokens stand"
    assert (batch["attention_mask"][:, 0] == 1).all(), "training pads on the right"
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [N, 2 * N]
    one = processor.conversation(LLAVA, photo())
    assert torch.equal(one["labels"][0], batch["labels"][0][: one["labels"].shape[1]])
    assert torch.equal(processor.conversation(LLAVA["conversations"], [photo()])["input_ids"], one["input_ids"])


def test_labels_are_where_the_model_finds_answers(processor):
    batch = processor.conversation(MESSAGES, [photo(), photo()])
    tokenizer = processor.tokenizer
    header = tokenizer.encode("<|im_start|>assistant\n", parse_special=["<|im_start|>"])
    mask = MllamaForConditionalGeneration._create_conversation_mask(batch["input_ids"], header, tokenizer.eos_token_id)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~mask, -100))


def test_a_conversation_is_learned_end_to_end(processor):
    model = make_model(len(processor.tokenizer), image_token_id=processor.image_token_id)
    batch = processor(conversations=[LLAVA, MESSAGES], images=[[photo()], [photo(1), photo(2)]])
    out = model(**batch)
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(out["logits"][:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out["loss"], expected)
    small = make_model(300)
    with pytest.raises(IndexError):
        small(**batch)
    resize_token_embeddings(small, len(processor.tokenizer))
    assert small(**batch)["loss"].isfinite()


def test_placeholders_are_never_learned(processor):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <image> c"}]
    batch = processor.conversation(turns, photo())
    assert answers(processor, batch) == ["b  c<|im_end|>"]


def test_an_image_that_no_turn_names_stands_before_the_first_question(processor):
    turns = [message | {"content": message["content"].replace("<image>", "")} for message in MESSAGES[:3]]
    named = [dict(message) for message in turns]
    named[1]["content"] = "<image>" + named[1]["content"]
    found, expected = (processor.conversation(row, photo()) for row in (turns, named))
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert "<image>" not in turns[1]["content"], "the caller's messages stay as they are"


def test_the_next_answer_can_be_asked_for(either):
    processor = MllamaImageProcessor(either, N, 16)
    batch = processor(conversations=[MESSAGES[:2], MESSAGES[:1]], images=[[photo()], []], add_generation_prompt=True)
    assert "labels" not in batch and batch["attention_mask"][1, 0] == 0, "generation pads on the left"
    for row in batch["input_ids"]:
        assert either.decode(row).endswith("<|im_start|>assistant\n")


TEMPLATES = {
    "chatml": None,
    "default system": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("ask", [False, True])
def test_conversations_are_the_same_with_their_tokenizer(tokenizer, tmp_path, transformers, template, ask):
    tokenizer.chat_template = TEMPLATES[template] or tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    processors = [MllamaImageProcessor(t, N, 16) for t in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path))]
    safe = {"conversations": [{**turn, "value": turn["value"].replace("<|im_end|>", "")} for turn in LLAVA["conversations"]]}
    rows = [safe, MESSAGES, MESSAGES[1:3]]
    images = [[photo()], [photo(1), photo(2)], [photo(3)]]
    ours, theirs = (p(conversations=rows, images=images, add_generation_prompt=ask) for p in processors)
    assert ours.keys() == theirs.keys() and ("labels" in ours) == (not ask)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


ASKING = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASKING
STRANGE = {
    "writes message 2": CHATML.replace("m.content", "m.content if loop.last else '.'"),  # as some drop what a model thought
    "changes": CHATML + "{{ messages | length }}",
    "special token": CHATML.replace("<|im_start|>", "").replace("<|im_end|>", ""),
    "cannot write this conversation .no systems": "{{ raise_exception('no systems') }}",
    "no chat_template": None,
}


@pytest.mark.parametrize(("template", "reason"), [(template, reason) for reason, template in STRANGE.items()])
def test_their_templates_that_hide_the_answers(theirs, template, reason):
    theirs.chat_template, theirs.eos_token = template, None  # which else ends answers that the template does not end
    processor = MllamaImageProcessor(theirs, N, 16)
    with pytest.raises(ValueError, match=reason):
        processor(conversations=[MESSAGES], images=[photo(), photo()])


def test_their_templates_that_want_parts(theirs):
    processor = MllamaImageProcessor(theirs, N, 16)
    expected = processor(conversations=[MESSAGES], images=[photo(), photo()])
    text = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    theirs.chat_template = CHATML.replace("{{ m.content }}", text)
    found = processor(conversations=[MESSAGES], images=[photo(), photo()])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "not a conversation"),
        ({"id": "1"}, "not a conversation"),
        ("hello", "not a conversation"),
        ([{"from": "robot", "value": "a"}], "robot"),
        ([{"from": "human", "value": None}], "not a conversation"),
        ([{"role": "user"}], "not a conversation"),
        (MESSAGES[:1], "conversation 0 has no answer"),
    ],
)
def test_conversations_that_are_none(processor, conversation, reason):
    with pytest.raises(ValueError, match=reason):
        processor.conversation(conversation)
    with pytest.raises(ValueError, match="not empty"):
        processor(conversations=[])


# ---- files -----------------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"resample": "bilinear", "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.25)},
    {"do_pad_square": True, "image_mean": (0.4, 0.5, 0.6), "add_location_tokens": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layout", [None, "llava", "idefics3"])
def test_what_is_saved_opens_in_transformers_and_here(tokenizer, tmp_path, transformers, settings, layout):
    processor = MllamaImageProcessor(tokenizer, N, 16, **settings)
    if layout == "idefics3" and processor.image_settings.do_pad_square:
        with pytest.raises(ValueError, match="Idefics3 knows"):
            processor.save_pretrained(tmp_path, layout)
        return
    processor.save_pretrained(tmp_path, layout)
    images = [photo(), photo(1, 9, 40)]
    expected = processor(["a", "b"], images)
    reference = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    found = reference(images, return_tensors="pt")["pixel_values"].reshape(2, 3, 16, 16)
    torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)
    write_config(make_model(300).config, tmp_path)
    again = MllamaImageProcessor.from_pretrained(tmp_path)
    assert len(again.tokenizer) == len(tokenizer) and again.recognised == processor.recognised
    back = again(["a", "b"], images)
    assert all(torch.equal(back[key], expected[key]) for key in expected)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


TILES = {"resample": "lanczos", "size": {"longest_edge": 40}, "fit": "tiles"}


@pytest.mark.parametrize(
    ("layout", "around", "settings"),
    [("llava", ("", ""), {}), ("idefics3", IDEFICS3_AROUND, {}), ("idefics3", IDEFICS3_AROUND, TILES)],
)
@pytest.mark.parametrize("known", [TILE_TOKENS, []])
def test_whole_batches_are_those_of_their_processors(tokenizer, tmp_path, transformers, layout, around, settings, known):
    """known: of the tokens that stand before tiles; others are plain text, there as here."""
    tokenizer.add_special_tokens([IMAGE_TOKEN, *known])
    processor = MllamaImageProcessor(tokenizer, N, 16, around_image=around, **settings)
    processor.save_pretrained(tmp_path, layout)
    reference = transformers.AutoProcessor.from_pretrained(tmp_path)
    prompts, images = ["<image>\nWhat is this?", "A dog <image> and <image> a cat"], [[photo()], [photo(1), photo(2)]]
    found = processor(prompts, images, padding_side="right")
    expected = reference(text=prompts, images=images, padding=True, return_tensors="pt", padding_side="right")
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(found[key], expected[key]), key
    assert (found["input_ids"] == processor.image_token_id).sum() == N * len(found["pixel_values"])
    pixels = expected["pixel_values"].reshape(-1, 3, 16, 16)
    pixels = pixels[pixels.flatten(1).any(dim=1)]  # Idefics3 pads rows with black images
    torch.testing.assert_close(found["pixel_values"], pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"num_image_token": 0}, {"image_size": 0}, {"resample": "sharp"}, {"image_mean": (0, 0)}])
def test_settings_that_make_no_sense(tokenizer, settings):
    with pytest.raises(ValueError):
        MllamaImageProcessor(tokenizer, **{"num_image_token": 4, "image_size": 8} | settings)


def test_location_tokens_are_paligemmas():
    assert len(LOCATION_TOKENS) == 1152 and LOCATION_TOKENS[1023:1025] == ["<loc1023>", "<seg000>"]


def test_images_are_split_or_not_as_asked(tokenizer):
    processor = MllamaImageProcessor(tokenizer, N, 16, around_image=IDEFICS3_AROUND)
    whole = processor(["<image>"], [photo()])
    processor.split_images(True)  # its longer side is four tiles: 30 x 20 become 64 x 48
    assert processor.tilings([photo()]) == [(3, 4)] and len(processor(["<image>"], [photo()])["pixel_values"]) == 13
    processor.split_images(False)
    again = processor(["<image>"], [photo()])
    assert torch.equal(again["input_ids"], whole["input_ids"]) and len(again["pixel_values"]) == 1
    with pytest.raises(ValueError, match="leave out --split-images"):
        MllamaImageProcessor(tokenizer, N, 16).split_images(True)
    with pytest.raises(ValueError, match="image 1: .*not an image"):
        processor.split_images(True)
        processor(["<image><image>"], [photo(), b"no"])
