"""The law of published folders: what generate.py makes of one (pixel_values, input_ids, the greedy answer) is what
transformers' AutoProcessor and generate make of it, for every family, as transformers 5 and 4 spell it, its weights in one
file or more."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the law is about transformers' own processors")

import finetune_vlm  # noqa: E402
import published  # noqa: E402
from calls import printed  # noqa: E402
from lib.checkpoint import save_pretrained  # noqa: E402
from lib.vlm_parts import assemble, train_tokenizer  # noqa: E402
from model import LLAMA32Config  # noqa: E402
from samples import image_bytes  # noqa: E402
from siglip import SiglipVisionConfig  # noqa: E402
from toys import TEXT, VISION  # noqa: E402

SPELLINGS = {
    "5": (),
    "4": (published.as_version_4,),
    "5 sharded": (published.sharded,),
    "4 sharded": (published.as_version_4, published.sharded),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Noise with structure, of odd proportions."""
    path = tmp_path_factory.mktemp("image") / "photo.png"
    noise = np.random.RandomState(0).randint(0, 256, (9, 15, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((75, 41), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, image):
    """(family, spelling) -> (theirs, ours), each made once; ours may be the error that it ended in."""
    folders, expected, found = {}, {}, {}

    def get(family, spelling):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "5"
            published.make(family, folders[family])
            expected[family] = published.theirs(family, folders[family], image)
        if (family, spelling) not in found:
            folder = folders[family].with_name(spelling)
            if not folder.exists():
                shutil.copytree(folders[family], folder)
            for change in SPELLINGS[spelling]:
                change(folder)
            try:
                found[family, spelling] = published.ours(family, folder, image)
            except (ValueError, OSError) as error:
                found[family, spelling] = error
        return expected[family], found[family, spelling]

    return get


def cases(*kinds: str) -> list[tuple[str, str]]:
    families = [family for family, about in published.FAMILIES.items() if about.kind in kinds]
    return [(family, spelling) for family in families for spelling in SPELLINGS]


def both(outcome, family, spelling):
    theirs, ours = outcome(family, spelling)
    if isinstance(ours, Exception):
        raise ours
    return theirs, ours


@pytest.mark.parametrize("family, spelling", cases("vlm", "zero-shot", "classes", "tower"))
def test_pixel_values(outcome, family, spelling):
    theirs, ours = both(outcome, family, spelling)
    assert ours.pixel_values.shape == theirs.pixel_values.shape
    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family, spelling", cases("chat", "continue", "vlm", "zero-shot", "tower"))
def test_input_ids(outcome, family, spelling):
    theirs, ours = both(outcome, family, spelling)
    assert ours.input_ids == theirs.input_ids


@pytest.mark.parametrize("family, spelling", cases("chat", "continue", "vlm", "zero-shot", "classes", "tower"))
def test_answer(outcome, family, spelling):
    theirs, ours = both(outcome, family, spelling)
    if isinstance(theirs.answer, list):
        assert len(set(theirs.answer)) > 1 or family == "gpt2", "an answer of one token over and over would prove little"
        assert ours.answer == theirs.answer
    else:
        torch.testing.assert_close(ours.answer, theirs.answer, atol=1e-5, rtol=1e-5)


# ---- there and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, join", [("llava", {"vision_feature_layer": -2}), ("idefics3", {"projector_type": "linear"})])
def test_our_folder_opened_and_saved_by_transformers_is_still_ours(tmp_path, image, layout, join):
    """It was refused: transformers' Idefics3Processor adds a token, for which the model has no row, and never says it."""
    tokenizer = train_tokenizer(["What is this? a red dog."], 300)
    text = LLAMA32Config(**TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": 128})
    model, processor = assemble(SiglipVisionConfig(**VISION), text, tokenizer, {}, **join)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert save_pretrained(published.lively(model), ours) == layout
    processor.save_pretrained(ours, layout)
    published.tf.AutoProcessor.from_pretrained(ours).save_pretrained(theirs)
    again = published.tf.AutoModelForImageTextToText.from_pretrained(ours)
    again.save_pretrained(theirs)
    before, after = (published.ours(layout, folder, image) for folder in (ours, theirs))
    assert len(set(before.answer)) > 1
    assert (after.input_ids, after.answer) == (before.input_ids, before.answer)
    torch.testing.assert_close(after.pixel_values, before.pixel_values, atol=1e-5, rtol=0)
    pixels = before.pixel_values if layout == "llava" else before.pixel_values[:, None]
    ids = again.generate(torch.tensor([before.input_ids]), pixel_values=pixels, max_new_tokens=published.NEW_TOKENS)
    assert ids[0, len(before.input_ids) :].tolist()[: len(before.answer)] == before.answer


def test_a_published_model_learns_from_five_rows_and_transformers_opens_it_again(tmp_path, image, undrawn):
    """finetune_vlm.py --model SMOLVLM --lora 8: its tiles, template and end of turn are kept, and both give the same answer."""
    source, run, rows = tmp_path / "smolvlm", tmp_path / "run", []
    published.make("smolvlm", source)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i, (50, 30)))
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"It is {i}."}]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--data", tmp_path / "rows.json", "--model", source, "--lora", 8, "--steps", 2, "--out", run]
    printed(finetune_vlm.main, *flags)
    theirs, ours = published.theirs("smolvlm", run, image), published.ours("smolvlm", run, image)
    assert ours.input_ids == theirs.input_ids == published.ours("smolvlm", source, image).input_ids
    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, atol=1e-5, rtol=0)
    assert ours.answer == theirs.answer
    learned, before = (load_file(folder / "model.safetensors") for folder in (run, source))
    changed = {name for name in before if not torch.equal(learned[name], before[name])}
    trained = {name for name in before if "connector" in name or ("text_model.layers" in name and "norm" not in name)}
    assert changed == trained


@pytest.mark.parametrize("place", ["processor_config", "tokenizer_config", "config"])
def test_the_image_token_is_spelled_as_the_files_say(tmp_path, image, place):
    """Texts call an image <image>; a model whose placeholder is another token got a new token of that name."""
    published.make("llava", tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        text = (tmp_path / file).read_text().replace("<image>", "<|picture|>")
        if file.startswith(("tokenizer_c", "processor")) and not file.startswith(place):
            text = json.dumps({key: value for key, value in json.loads(text).items() if key != "image_token"})
        (tmp_path / file).write_text(text)
    ours = published.ours("llava", tmp_path, image)
    if place == "config":  # transformers looks in the other two places only
        published.write(tmp_path / "processor_config.json", published.read(tmp_path / "processor_config.json") | {
            "image_token": "<|picture|>"})  # fmt: skip
    theirs = published.theirs("llava", tmp_path, image)
    assert (ours.input_ids, ours.answer) == (theirs.input_ids, theirs.answer)


def test_a_smolvlm_folder_that_learned_more_keeps_its_tiles(tmp_path, image):
    """do_image_splitting: false was saved, and transformers answered about one tile of seven."""
    published.make("smolvlm", tmp_path / "smolvlm")
    said = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": "It is red"}]
    rows = [{"id": str(number), "image": str(image), "conversations": said} for number in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"--data": tmp_path / "rows.json", "--model": tmp_path / "smolvlm", "--lora": 8, "--steps": 2, "--batch-size": 2}
    flags |= {"--images": image.parent, "--test-part": 0, "--out": tmp_path / "run"}
    printed(finetune_vlm.main, *(word for flag in flags.items() for word in flag))
    theirs, ours = (ask("smolvlm", tmp_path / "run", image) for ask in (published.theirs, published.ours))
    assert torch.equal(ours.pixel_values, theirs.pixel_values) and len(ours.pixel_values) == 7
    assert (ours.input_ids, ours.answer) == (theirs.input_ids, theirs.answer)
