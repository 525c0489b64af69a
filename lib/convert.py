"""The command line of lib/checkpoint.py: what a checkpoint holds, and the same checkpoint written another way.

python -m lib.checkpoint show SOURCE                # its tensors as a tree, parameters by part
python -m lib.checkpoint convert SOURCE FOLDER --dtype fp16
python -m lib.checkpoint merge-lora SOURCE FOLDER --adapter DIR   # default: the run's own adapter, SOURCE/lora
"""

import argparse
import itertools
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from lib.checkpoint import from_pretrained, is_published, open_source, save_pretrained
from lib.files import find_source, write_atomic
from lib.layouts.common import TOKEN_IDS
from lib.weights import DTYPES, list_safetensors

# What stands beside the weights and goes along when a folder is converted.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.model", "spiece.model"),
    *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
)
KEPT = (*TOKEN_IDS, "id2label", "label2id")  # entries of config.json that our configs do not hold


def convert(source: str, folder: str | Path, dtype: torch.dtype | None = None) -> str:
    """Read a checkpoint and write it as a folder, with its tokenizer; the model_type written is returned."""
    path = find_source(source)
    return write_folder(from_pretrained(path, dtype), path, Path(folder))


def write_folder(model: nn.Module, path: Path, folder: Path) -> str:
    """A model that was read from `path`, with what stands beside it there; the model_type written is returned."""
    if path.suffix == ".gguf":
        from lib.tokenizer import BPETokenizer

        BPETokenizer.from_pretrained(path).save_pretrained(folder)
    published = open_source(path)[0]
    known = {**(published.get("text_config") or {}), **published}
    kind = save_pretrained(model, folder, **{key: known[key] for key in KEPT if key in known})
    for name in COMPANIONS:
        if (path / name).is_file() and path.resolve() != folder.resolve():
            write_atomic(folder / name, partial(shutil.copyfile, path / name))
    return kind


def merge_adapter(source: str, folder: str | Path, adapter: str | None = None) -> tuple[str, str]:
    """Write a checkpoint with an adapter (a run's own unless given) merged into it; the model_type written and put_adapter's
    line are returned."""
    from lib.adapters import put_adapter

    path = find_source(source)
    model = from_pretrained(path, dtype=None)
    about = put_adapter(model, path, adapter or path / "lora")
    return write_folder(model, path, Path(folder)), about


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    args = parser.parse_args()
    if args.command == "show":
        print("\n".join(show(args.source)))
    elif args.command == "merge-lora":
        kind, about = merge_adapter(args.source, args.folder, args.adapter)
        print(f"{about}\n{args.folder} holds a {kind} now, without LoRA layers")
    else:
        kind = convert(args.source, args.folder, DTYPES.get(args.dtype))
        print(f"{args.folder} holds a {kind} now" + ("" if is_published(kind) else ", which only this project opens"))
