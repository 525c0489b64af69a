"""The command line of lib/checkpoint.py: what a checkpoint holds, and the same checkpoint written another way.

python -m lib.checkpoint show SOURCE                # its tensors as a tree, parameters by part
python -m lib.checkpoint convert SOURCE FOLDER --dtype fp16
python -m lib.checkpoint merge-lora SOURCE FOLDER --adapter DIR   # default: the run's own adapter, SOURCE/lora
python -m lib.checkpoint push FOLDER user/name --dry-run          # upload it to the hub, with a model card: see push.py
"""

import itertools
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from lib.checkpoint import from_pretrained, is_published, open_source, save_pretrained
from lib.cli import Parser
from lib.devices import DTYPES
from lib.files import find_source, write_atomic
from lib.generation import write_generation_config
from lib.layouts.common import TOKEN_IDS
from lib.layouts.settings import GENERATION
from lib.weights import list_safetensors, safetensors_files, shorten

# What stands beside the weights and goes along when a folder is converted: tokenizer, templates, image and generation settings.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "encoder.json", "vocab.bpe"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json"),
)
KEPT = {*TOKEN_IDS, "id2label", "label2id", *GENERATION}  # entries of config.json that our configs do not hold


def convert(source: str, folder: str | Path, dtype: torch.dtype | None = None) -> tuple[str, list[str]]:
    """Read a checkpoint and write it as a folder; see write_folder for what is returned. Raises ValueError, before anything is
    written, for numbers that dtype cannot hold."""
    path = find_source(source)
    return write_folder(from_pretrained(path, dtype), path, Path(folder))


def companions(folder: Path) -> list[str]:
    """The names of those files of a folder that go along."""
    return sorted({file.relative_to(folder).as_posix() for pattern in COMPANIONS for file in folder.glob(pattern)})


def write_folder(model: nn.Module, path: Path, folder: Path) -> tuple[str, list[str]]:
    """A model that was read from `path`, with what stands beside it there. Returns the model_type written, and a line about
    each thing that was left. Raises ValueError for another folder than `path` that holds something already."""
    is_gguf, same = path.suffix == ".gguf", path.resolve() == folder.resolve()
    along = FROM_GGUF if is_gguf else companions(path)
    if not same and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name a new folder")
    published = open_source(path)[0]
    known = {**(published.get("text_config") or {}), **published}
    kind = save_pretrained(model, folder, **{key: known[key] for key in sorted(KEPT & known.keys())})
    if is_gguf:
        if model.generation_config:
            write_generation_config(folder, model.generation_config)
        return kind, write_gguf_tokenizer(path, folder)
    for name in along if not same else ():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomic(folder / name, partial(shutil.copyfile, path / name))
    weights = {"config.json", "model.safetensors.index.json", *(file.name for file in safetensors_files(path))}
    top = {name.partition("/")[0] for name in along} | weights
    left = [file.name for file in sorted(path.iterdir()) if file.name not in top and not file.name.startswith(".")]
    return kind, [f"left in {path}: {shorten(left)}"] if left and not same else []


# What a .gguf file has in its header.
FROM_GGUF = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def write_gguf_tokenizer(path: Path, folder: Path) -> list[str]:
    from lib.tokenizer import load_tokenizer

    try:
        load_tokenizer(path).save_pretrained(folder)
    except ValueError as error:
        return [f"left in the file: tokenizer and chat template ({error})"]
    return []


def merge_adapter(source: str, folder: str | Path, adapter: str | None = None) -> tuple[str, list[str]]:
    """Write a checkpoint with an adapter (a run's own unless given) merged into it. Returns what write_folder does, and first
    put_adapter's line."""
    from lib.adapters import put_adapter

    path = find_source(source)
    model = from_pretrained(path, dtype=None)
    about = put_adapter(model, path, adapter or path / "lora")
    kind, left = write_folder(model, path, Path(folder))
    return kind, [about, *left]


def list_tensors(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, type) of every tensor of a folder or .gguf file."""
    if path.suffix == ".gguf":
        from lib.gguf_file import GGUFFile

        return GGUFFile(path).list_tensors()
    return list_safetensors(path)


def show(source: str) -> Iterator[str]:
    """The lines of a checkpoint's tree: parts with their parameters, tensors with shape and type, layers that are alike in
    one."""
    path = find_source(source)
    tensors = list_tensors(path)
    tree: dict = {}
    for name, shape, kind in sorted(tensors):
        *parents, leaf = name.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(f"{part}.", {})
        node[leaf] = (shape, kind)
    yield f"{source}: {count_parameters(tree):,} parameters in {len(tensors)} tensors"
    yield from tree_lines(tree, "  ")


def count_parameters(node) -> int:
    return sum(map(count_parameters, node.values())) if isinstance(node, dict) else math.prod(node[0])


def tree_lines(tree: dict, indent: str) -> Iterator[str]:
    """One line per part and per tensor. Parts called 0, 1, 2, ... that hold the same share a line, "0-29"; a part with a
    single thing in it shares that one's."""
    children = sorted(tree.items(), key=lambda child: int(child[0][:-1]) if child[0][:-1].isdigit() else -1)
    for _, group in itertools.groupby(children, lambda child: (child[0][:-1].isdigit() and repr(child[1])) or child[0]):
        (label, node), *others = group
        each, times = count_parameters(node), 1 + len(others)
        label = label.removesuffix(".") + (f"-{others[-1][0][:-1]}" if others else "")
        while isinstance(node, dict) and len(node) == 1:
            ((below, node),) = node.items()
            label += f".{below.removesuffix('.')}"
        label += f" ({times} x {each:,})" if others else ""
        if not isinstance(node, dict):
            label += f"  {list(node[0])} {node[1]}"
        yield f"{indent + label:<80}{times * each:>16,}"
        if isinstance(node, dict):
            yield from tree_lines(node, indent + "  ")


def main() -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    source = {"metavar": "SOURCE", "help": "a run folder, a Hugging Face folder, a .gguf file, or a hub name"}
    commands.add_parser("show", help="print the tree of tensors").add_argument("source", **source)
    to = commands.add_parser("convert", help="write it as a folder that transformers opens, tokenizer included")
    to.add_argument("source", **source)
    to.add_argument("folder", metavar="FOLDER", help="where to write config.json and the weights")
    to.add_argument("--dtype", choices=DTYPES, help="precision to write; default: as stored (quantised .gguf: fp32)")
    merge = commands.add_parser("merge-lora", help="write it with a LoRA adapter merged into its weights")
    merge.add_argument("source", **source)
    merge.add_argument("folder", metavar="FOLDER", help="where to write config.json and the weights")
    merge.add_argument("--adapter", metavar="DIR", help="PEFT's or ours; default: the run's own, its folder lora/")
    push = commands.add_parser("push", help="upload it to the hub, with a model card made from what the run left")
    push.add_argument("folder", metavar="FOLDER", type=Path, help="a run folder, or another that transformers opens")
    push.add_argument("name", metavar="USER/NAME", help="where on the hub")
    push.add_argument("--private", action="store_true", help="for you alone, if it is new")
    push.add_argument("--dry-run", action="store_true", help="write the card, list the files, upload nothing")
    args = parser.parse_args()
    if args.command == "push":
        from lib.push import push as upload

        print("\n".join(upload(args.folder, args.name, args.private, args.dry_run)))
    elif args.command == "show":
        print("\n".join(show(args.source)))
    elif args.command == "merge-lora":
        kind, lines = merge_adapter(args.source, args.folder, args.adapter)
        print("\n".join((*lines, f"{args.folder} is in the layout of {kind} now, without LoRA layers")))
    else:
        kind, lines = convert(args.source, args.folder, DTYPES.get(args.dtype))
        told = "" if is_published(kind) else ", which only this project opens"
        print("\n".join((*lines, f"{args.folder} is in the layout of {kind} now{told}")))
