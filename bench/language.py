"""Language models: decoding against transformers' generate, the training loss in chunks, weights in 4 and 8 bits."""

import copy
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.measure import compare, median_seconds, transformers_class
from lib.checkpoint import from_pretrained, save_pretrained
from lib.fast_decode import fast_step
from lib.int8 import quantize_8bit_
from lib.loss import chunked_cross_entropy
from lib.memory import bytes_of
from lib.quant import Linear4bit, quantised_memory, quantize_
from lib.tokenizer import BPETokenizer
from model import Llama3ForCausalLM, LLAMA32Config

TEXT_LENGTH, WINDOW = 2048, 512  # tokens of a text that are read, at a time


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second at which one matrix-vector product too large for the caches reads its matrix."""
    matrix, vector = torch.randn(8192, 8192, device=device), torch.randn(8192, device=device)
    seconds = median_seconds({"read": lambda: matrix @ vector}, 7, device)["read"]
    return matrix.nbytes / seconds


@torch.no_grad()
def bench_decode(args, device: torch.device) -> list[dict]:
    """Greedy decoding of the same weights: ours against transformers' generate. Also the share of the bound that is reached:
    every weight must be read once a token, so no more than bandwidth / bytes tokens a second are possible at batch 1. --int8:
    ours in 8 bits; then also what that costs in perplexity, where --source is given."""
    if args.int8 and device.type != "cpu":
        raise ValueError(f"--int8 is for decoding on a CPU, not on {device}: leave it out, or give --device cpu")
    peer = transformers_class("LlamaForCausalLM")
    torch.manual_seed(args.seed)
    ours = from_pretrained(args.source) if args.source else Llama3ForCausalLM(LLAMA32Config.preset("smollm2-135m"))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = peer.from_pretrained(folder).eval().to(device)
    ours, facts = ours.eval().to(device), {}
    if args.int8:
        facts = quantise(ours, partial(quantize_8bit_, ours), text_to_read(args, device) if args.source else None)
    untied = set() if ours.config.tie_word_embeddings else {ours.model.embed_tokens.weight}  # of which a token reads one row
    bound = memory_bandwidth(device) / bytes_of({*ours.parameters(), *ours.buffers()} - untied)
    rows, new = [], args.new_tokens
    for batch in args.batch:
        ids = torch.randint(0, ours.config.vocab_size, (batch, 32), device=device)

        def run_theirs(ids=ids):
            mask = torch.ones_like(ids)
            out = theirs.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=new, max_new_tokens=new)
            return out[:, ids.shape[1] :].tolist()

        model = copy.deepcopy(ours) if batch == 1 else ours
        step = fast_step(model) if batch == 1 else None  # more rows do not gain from it
        steps = {"ours": partial(model.generate, ids, max_new_tokens=new, step=step), "transformers": run_theirs}
        first, second = (step() for step in steps.values())
        same = sum(a == b for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
        what = "decoding in 8 bits" if args.int8 else "decoding"
        row = compare(what, steps, batch * new, args.rounds, device, size="smollm2-135m", batch=batch)
        share = round(row["per_second"] / batch / bound, 3)
        rows.append({**row, "equal_tokens": same / (batch * new), "share_of_bound": share, **facts})
    return rows


def bench_loss(args, device: torch.device) -> list[dict]:
    """Forward and backward of the last layer and its loss, for SmolLM2's vocabulary: chunks of logits against all of them.
    The memory of the first does not grow with the text."""
    torch.manual_seed(args.seed)
    head = torch.randn(49152, 576, device=device, requires_grad=True)
    rows = []
    for tokens in (512, 2048):
        hidden = torch.randn(tokens, 576, device=device, requires_grad=True)
        targets = torch.randint(0, len(head), (tokens,), device=device)

        def plain(hidden=hidden, targets=targets):
            F.cross_entropy(hidden @ head.T, targets).backward()
            hidden.grad = head.grad = None

        def chunked(hidden=hidden, targets=targets):
            chunked_cross_entropy(partial(F.linear, weight=head), hidden, targets).backward()
            hidden.grad = head.grad = None

        steps = {"ours": chunked, "all logits at once": plain}
        rows.append(compare("loss, forward and backward", steps, tokens, args.rounds, device, size="V 49152", batch=tokens))
    return rows


# ---- four and eight bits a weight ------------------------------------------------------------------------------------


def bench_quant(args, device: torch.device) -> list[dict]:
    """Linear4bit against nn.Linear of SmolLM2-135M's MLP in forward and backward; and, where --source is given, that language
    model with all linear layers but the head in 4 bits against itself, reading a text."""
    torch.manual_seed(args.seed)
    floats = nn.Linear(576, 1536, bias=False, device=device).requires_grad_(False)
    ours, rows = Linear4bit.from_linear(floats), []
    for batch in args.batch:
        x = torch.randn(batch, 576, device=device, requires_grad=True)
        steps = {"ours": partial(input_gradient, ours, x), "nn.Linear": partial(input_gradient, floats, x)}
        rows.append(compare("linear, forward + backward", steps, batch, args.rounds, device, size="576x1536", batch=batch))
        steps = {"ours": partial(forward_only, ours, x), "nn.Linear": partial(forward_only, floats, x)}
        rows.append(compare("linear, forward", steps, batch, args.rounds, device, size="576x1536", batch=batch))
    return rows + ([bench_quantised_model(args, device)] if args.source else [])


def input_gradient(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(layer(x).sum(), x)[0]


@torch.no_grad()
def forward_only(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a language model on one text, ids [T], read in windows: exp of the mean loss of all tokens but each window's first."""
    windows = ids.split(WINDOW)
    losses = [model(window[None], labels=window[None])["loss"].item() * (len(window) - 1) for window in windows]
    return math.exp(sum(losses) / (len(ids) - len(windows)))


def text_to_read(args, device: torch.device) -> torch.Tensor:
    """The ids [T] of --text's first tokens. Raises ValueError where they are too few to predict one from another."""
    file = Path(args.text or Path(__file__).parents[1] / "README.md")
    ids = BPETokenizer.from_pretrained(args.source).encode(file.read_text(encoding="utf-8", errors="replace"))
    if len(ids) < 2:
        raise ValueError(f"{file} holds {len(ids)} tokens: give a --text of some hundred words")
    return torch.tensor(ids[:TEXT_LENGTH], device=device)


def quantise(model: nn.Module, in_place: Callable[[], object], ids: torch.Tensor | None) -> dict:
    """Call in_place, which quantises the model: what it did to its memory and, where there is a text, to its perplexity."""

    def figures_of(ending: str) -> dict:
        memory = {f"weights{ending}_mib": round(bytes_of([*model.parameters(), *model.buffers()]) / 2**20, 1)}
        return memory if ids is None else {**memory, f"perplexity{ending}": round(perplexity(model, ids), 3)}

    before, start = figures_of("_floats"), time.perf_counter()
    in_place()
    found = {"quantising_seconds": round(time.perf_counter() - start, 2), **quantised_memory(model)}
    return {**({} if ids is None else {"tokens": len(ids)}), **before, **figures_of(""), **found}


def bench_quantised_model(args, device: torch.device) -> dict:
    floats = from_pretrained(args.source, device=device)
    if not isinstance(floats, Llama3ForCausalLM):
        raise ValueError(f"--source {args.source} is a {type(floats).__name__}: quant reads a text with a language model")
    ids, ours = text_to_read(args, device), copy.deepcopy(floats)
    facts = quantise(ours, partial(quantize_, ours), ids)
    steps = {"ours": partial(perplexity, ours, ids[:WINDOW]), "floats": partial(perplexity, floats, ids[:WINDOW])}
    row = compare("reading a text", steps, len(ids[:WINDOW]), args.rounds, device, size=Path(args.source).name, batch=1)
    return {**row, **facts}
