"""What a training run of a vision-language model says about itself: figures at evaluations, and at its end a folder.

found = {split: ask(model, processor, items, blind) for split, items in tests.items()}
run.log(**logged(found))
leave_behind(run, model, processor, tests, found, "scenes")       # -> what the script prints last
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.images import to_image
from data.tiles import global_tiles
from lib import figures
from lib.answers import MOST_NEW_TOKENS, Item, answer, image_key, mean_answer_loss
from lib.chat import with_end_of_turn
from lib.checkpoint import choose_layout, from_pretrained, is_published, layout_line, save_pretrained
from lib.files import read_json, write_json
from lib.generation import stop_tokens, write_generation_config
from lib.image_settings import layout_misfit
from lib.lora import lora_layers
from lib.scores import is_right, score
from processing_mllama import IMAGE_TOKEN


def ask(model, processor, items: list[Item], blind: bool, before_batch: Callable[[], None] = lambda: None) -> dict:
    """Answers by greedy decoding, scored, with the loss of the true ones. before_batch: see lib/answers.py."""
    options = {"blind": blind, "before_batch": before_batch, "encoded": {}}  # the tower looks once, for answers and losses
    said = answer(model, processor, items, **options)
    loss, _ = mean_answer_loss(model, processor, items, **options)
    return {"said": said, "answer_loss": round(loss, 4) if items else None, **score(items, said)}


def logged(found: dict[str, dict]) -> dict[str, float]:
    """For metrics.jsonl, from what `ask` found of each split."""
    keys = "exact_match", "answer_loss"
    return {f"{split}_{key}": facts[key] for split, facts in found.items() for key in keys if facts["n"]}


def memorised(found: dict[str, dict]) -> str:
    """How held-out answers ("test") compare with those to rows it was trained on ("seen", absent where nothing is held out)."""
    test, seen = found["test"], found.get("seen")
    if seen is None or not (seen["n"] and test["n"]):
        return f"answers as in the data: {test['right']} of {test['n']}"
    words = f"answers as in the data: {seen['right']} of {seen['n']} about training rows, {test['right']} of {test['n']} held "
    words += f"out; their loss {seen['answer_loss']:.2f} and {test['answer_loss']:.2f}"
    overfit = test["answer_loss"] > 2 * seen["answer_loss"]
    return words + (": it knows its rows by heart (overfit), and guesses about others; more rows help" if overfit else "")


def leave_behind(run, model, processor, tests: dict[str, list[Item]], found: dict[str, dict], dataset: str, **more) -> None:
    """Save the model, draw, write result.json, and print it. more: further entries of it, before the last ones."""
    args = run.args
    run.print(save_run(run.folder, model, processor, {"dataset": dataset, **vars(args)}))
    draw(run.folder, model, processor, tests["test"], found["test"], run.metrics.read(), args.blind)
    result = {"blind": args.blind}
    for split, facts in found.items():
        before = "" if split == "test" else f"{split}_"
        result |= {f"{before}{key}": facts[key] for key in ("exact_match", "low", "high", "n", "answer_loss")}
        result[f"{before}by_kind"] = {kind: each["exact_match"] for kind, each in facts["by_kind"].items()}
    twin = Path(f"{run.folder}-blind") / "result.json"
    if not args.blind and twin.exists():
        blind = read_json(twin)
        shared = {"exact_match", "compositional_exact_match", "answer_loss"} & blind.keys()
        result |= {f"blind_{key}": blind[key] for key in sorted(shared)}
    result |= more | {"seconds": round(run.seconds, 1), "steps": run.steps_done, "seed": args.seed, "run": str(run.folder)}
    write_json(run.folder / "result.json", result)
    print(json.dumps(result))


def save_run(folder: Path, model, processor, settings: dict) -> str:
    """The model as a published checkpoint folder with its processor and what its answers end with; the LoRA corrections by
    themselves as well. Returns a line that says which layout it is."""
    generation = with_end_of_turn(getattr(model, "generation_config", {}), processor.tokenizer)
    ends = {"eos_token_id": generation["eos_token_id"], "pad_token_id": processor.tokenizer.pad_token_id}
    kind = choose_layout(model, None)[0]
    misfit = layout_misfit(processor.image_settings, kind)
    kind = save_pretrained(model, folder, "mllama_scratch" if misfit else None, **ends)
    write_generation_config(folder, {**ends, **generation})
    processor.save_pretrained(folder, kind if is_published(kind) else None)
    shutil.rmtree(folder / "lora", ignore_errors=True)  # an earlier run's would be taken for this one's
    if lora_layers(model):
        from lib.adapters import save_lora

        save_lora(model, folder / "lora")
    write_json(folder / "settings.json", settings)
    from_pretrained(folder)  # what was written can be read
    return layout_line(model, folder, kind, misfit)


def draw(folder: Path, model, processor, items: list[Item], found: dict, rows: list[dict], blind: bool) -> None:
    """curves.png; samples.png: one question about each of 24 images; attention.png: where its longest answer comes from."""
    figures.curves(rows, folder / "curves.png")
    first = {}
    for number, item in enumerate(items):  # about each image another kind of question, where there is one
        if item.images:
            first.setdefault(image_key(item.images[0]), []).append(number)
    chosen = [numbers[i % len(numbers)] for i, numbers in enumerate(list(first.values())[:24])]
    if not chosen:
        return
    images = [image_tensor(items[i].images[0]) for i in chosen]
    words = [items[i].messages[-1]["content"].replace(IMAGE_TOKEN, "").strip() for i in chosen]
    said, truths = [found["said"][i] for i in chosen], [items[i].answer for i in chosen]
    title, good = "what it saw, what it was asked, what it said", [is_right(items[i], found["said"][i]) for i in chosen]
    figures.answer_sheet(images, words, said, truths, folder / "samples.png", title, good=good)
    if blind:
        return
    longest = max(range(len(chosen)), key=lambda i: len(said[i].split()) * (said[i] == truths[i]))
    draw_attention(folder / "attention.png", model, processor, items[chosen[longest]])


def draw_attention(path: Path, model, processor, item: Item) -> None:
    """What the model attends to for each word that it says to this item."""
    from extras.attention_maps import attention_over_image_tokens, group_into_words

    batch = processor(None, [item.images], [item.messages], add_generation_prompt=True)
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    most = min(MOST_NEW_TOKENS, model.config.text_config.context_length - batch["input_ids"].shape[1])
    (ids,) = model.generate(**batch, max_new_tokens=most, stop_tokens=stop_tokens(model, processor.tokenizer))
    if not ids:
        return
    maps = attention_over_image_tokens(model, ids, batch["input_ids"], batch["pixel_values"])
    words, maps = group_into_words(ids, maps[:, global_tiles(processor.tilings(item.images))], processor.decode)
    question = item.messages[-1]["content"].replace(IMAGE_TOKEN, "").strip()
    figures.attention_overlay([image_tensor(image) for image in item.images], words, maps, path, title=question)


def image_tensor(image) -> torch.Tensor:
    """uint8 [3, h, w], for drawing."""
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(to_image(image))).permute(2, 0, 1)
