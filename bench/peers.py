"""Time and memory of this code against its peers: same weights, outputs compared first, both in one process by turns.

    python bench.py vit                    our ViT against transformers' (S/16 at 224): inference and training
    python bench.py vit --batch 8 64 --json
    python bench.py vit --size tiny-digits --rounds 20
    python bench.py decode --source model.gguf     one token after another, against transformers' generate
    python bench.py decode --int8 --source model.gguf     ours with its matrices in 8 bits, against transformers in fp32
    python bench.py loss                           memory of the training loss: chunks against all logits at once
    python bench.py vlm                            training SigLIP-B/16 + SmolLM2-135M, whole or in part, against Idefics3
    python bench.py questions                      twelve questions a picture, packed, against a padded row for each
    python bench.py pictures --source DIR          JPEGs to pixel_values, against transformers' image processor
    python bench.py bpe                            our tokenizer against the tokenizers library
    python bench.py start                          from `python` to the first gradient
    python bench.py quant --source model.gguf      4-bit layers against floats: time, memory, perplexity on --text FILE

Every figure is a ratio to the peer in the same run, since a machine's own speed drifts. Time: the median over rounds in
which the two take turns. Memory: the peak of what torch allocates in one step, beyond what lay there before, counted
from the allocator's own record, on a CPU too (so it is exact and the same every time). Needs transformers, and peft for a
peer that trains LoRA.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import train_vlm
from data import scenes
from data.scene_batches import SceneBatches, scene_pixels
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.cli import not_negative_int, positive_int, run_cli
from lib.devices import find_device, find_dtype
from lib.fast_decode import fast_step
from lib.int8 import quantize_8bit_
from lib.loss import chunked_cross_entropy
from lib.memory import peak_bytes
from lib.quant import Linear4bit, bytes_of, quantised_memory, quantize_
from lib.tokenizer import BPETokenizer
from lib.vocabulary import resize_token_embeddings
from lib.weights import DTYPES
from model import (
    Llama3ForCausalLM,
    LLAMA32Config,
    MLLAMAConfig,
    MllamaForConditionalGeneration,
    convert_linears_to_lora,
)
from processing_mllama import process_images
from siglip import SiglipVisionConfig
from vit_scratch import ViTConfig, ViTModel, pair


def from_transformers(name: str) -> type:
    """The class of this name. Raises ValueError where transformers is not installed."""
    try:
        import transformers

        return getattr(transformers, name)
    except ImportError:
        raise ValueError("bench.py compares with transformers: pip install -r requirements-dev.txt") from None


def median_seconds(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Each step's median time; the steps take turns, so that what disturbs the machine disturbs all of them."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    what: str, steps: dict[str, Callable], items: int, rounds: int, device: torch.device, tensors: bool = True, **facts
) -> dict:
    """One row: steps is {"ours": ..., PEER: ...}; items: pictures or tokens per step. tensors: whether these are what
    takes the memory, so that it can be counted."""
    peer = next(name for name in steps if name != "ours")
    memory = {name: peak_bytes(step, device) for name, step in steps.items()} if tensors else None
    seconds = median_seconds(steps, rounds, device)
    return {
        "what": what,
        **facts,
        "peer": peer,
        "per_second": round(items / seconds["ours"], 2),
        "speed_ratio": round(seconds[peer] / seconds["ours"], 3),
        "peak_mib": round(memory["ours"] / 2**20, 1) if memory else None,
        "memory_ratio": round(memory["ours"] / max(1, memory[peer]), 3) if memory else None,
    }


def training_step(model: nn.Module, loss: Callable, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    """Forward, loss(model), backward, AdamW on what is not frozen: the same optimiser for everyone. dtype: of
    the matrix products. What is returned calls for one such step, and gives the loss before it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, kind = torch.optim.AdamW(trained, fused=True), trained[0].device.type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    def step():
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            value = loss(model)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return value.detach()

    return step


def precisions(args, device: torch.device) -> dict[str, torch.dtype]:
    """Of the matrix products of a training step: "ours" and "peer"."""
    return {"ours": find_dtype(args.dtype, device), "peer": find_dtype(args.peer_dtype or args.dtype, device)}


def named(dtypes: dict[str, torch.dtype]) -> str:
    """", bfloat16" or ", bfloat16 / float32", for a row; nothing where all is fp32."""
    names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes.values())]
    return "" if names == ["float32"] else f", {' / '.join(names)}"


def bench_vit(args, device: torch.device) -> list[dict]:
    """Our ViT against transformers' ViTForImageClassification with the same weights and the same attention kernel."""
    peer = from_transformers("ViTForImageClassification")
    dtypes = precisions(args, device)
    torch.manual_seed(args.seed)
    ours = ViTModel(ViTConfig.preset(args.size, pooling="cls")).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = peer.from_pretrained(folder, attn_implementation="sdpa").to(device)
    size = ours.config.image_size
    rows = []
    for batch in args.batch:
        pixels = torch.randn(batch, ours.config.num_channels, size, size, device=device)
        labels = torch.randint(0, ours.config.num_labels, (batch,), device=device)
        with torch.no_grad():
            difference = (ours.eval()(pixels) - theirs.eval()(pixels).logits).abs().max().item()
            if difference > 1e-3:
                raise ValueError(f"the two models differ by {difference:g}: there is nothing to compare")
            infer = {"ours": lambda x=pixels: ours(x), "transformers": lambda x=pixels: theirs(x)}
            rows.append(compare("ViT inference", infer, batch, args.rounds, device, size=args.size, batch=batch))

        def loss(model, x=pixels, labels=labels):
            out = model(x)
            return F.cross_entropy(out if isinstance(out, torch.Tensor) else out.logits, labels)

        models = {"ours": ours, "transformers": theirs}
        train = {
            name: training_step(copy.deepcopy(model).train(), loss, dtypes.get(name, dtypes["peer"]))
            for name, model in models.items()
        }
        for step in train.values():
            step()  # AdamW makes its state in the first step: not part of what a step costs
        what = f"ViT training step{named(dtypes)}"
        rows.append(compare(what, train, batch, args.rounds, device, size=args.size, batch=batch))
    return rows


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
    peer = from_transformers("LlamaForCausalLM")
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

TEXT_LENGTH, WINDOW = 2048, 512  # tokens of a text that are read, at a time


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


# ---- a training step of a VLM ----------------------------------------------------------------------------------------

VLM_SIZES = {"222m": ("base-p16-224", "smollm2-135m"), "tiny": ("tiny", "tiny")}  # presets of the tower and of the decoder
VLM_MODES = ("full", "frozen tower", "frozen tower, LoRA", "frozen tower, features given")
TEXT_TOKENS, LORA_RANK = 64, 8


def equal_vlms(size: str) -> tuple[nn.Module, nn.Module]:
    """Ours with random weights, 2 x 2 patches to a token, and transformers' Idefics3 with the same; both on the CPU.
    Raises ValueError for an unknown size."""
    peer = from_transformers("Idefics3ForConditionalGeneration")
    tower, decoder = VLM_SIZES[size]
    text = LLAMA32Config.preset(decoder)
    config = MLLAMAConfig(
        SiglipVisionConfig.preset(tower, vision_use_head=False), text, projector_type="linear", pixel_shuffle=2,
        image_token_id=text.vocab_size - 1,
    )  # fmt: skip
    ours = MllamaForConditionalGeneration(config)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder, layout="idefics3")
        return ours, peer.from_pretrained(folder, attn_implementation="sdpa")


def vlm_batch(config: MLLAMAConfig, batch: int) -> dict[str, torch.Tensor]:
    """Random pictures, each followed by TEXT_TOKENS random tokens; the second half of them is to be learned."""
    image_token, per_image = config.image_token_id, config.text_config.num_image_tokens
    text = torch.randint(0, image_token, (batch, TEXT_TOKENS))
    ids = torch.cat([torch.full((batch, per_image), image_token), text], dim=1)
    labels = ids.clone()
    labels[:, : -(TEXT_TOKENS // 2)] = -100
    return {"pixel_values": torch.randn(batch, 3, *pair(config.vision_config.image_size)), "input_ids": ids, "labels": labels}


def idefics3(model, input_ids, labels, pixel_values=None, vision_features=None):
    """Transformers' forward for the inputs of ours. It takes no features of a tower, so these go through its connector here."""
    if vision_features is None:
        return model(input_ids, pixel_values=pixel_values[:, None], labels=labels, use_cache=False)
    words, images = model.get_input_embeddings()(input_ids), model.model.connector(vision_features)
    embeds = model.model.inputs_merger(input_ids, words, images)
    return model(inputs_embeds=embeds, labels=labels, use_cache=False)


def freeze(model: nn.Module, mode: str) -> nn.Module:
    """Leave to training what the mode trains, in our model or theirs. LoRA comes with the projector."""
    own = isinstance(model, MllamaForConditionalGeneration)
    if mode != "full":
        (model.vision_tower if own else model.model.vision_model).requires_grad_(False)
    if "LoRA" in mode:
        model.requires_grad_(False)
        if own:
            convert_linears_to_lora(model.language_model, LORA_RANK, alpha=2 * LORA_RANK)
        elif has_peft():
            from peft import LoraConfig, inject_adapter_in_model

            targets = r".*text_model\..*_proj"
            inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets), model)
        (model.multi_modal_projector if own else model.model.connector).requires_grad_(True)
    return model


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def vlm_peer(mode: str) -> str:
    if "LoRA" not in mode:
        return "transformers"
    return "transformers with peft" if has_peft() else "transformers, projector only (no peft)"


def vlm_row(mode: str, sides: dict[str, tuple], inputs: dict, dtypes: dict, rounds: int, device, **facts) -> dict:
    """sides: {name: (model on the CPU, its loss from itself and the inputs)}. Beside compare's figures the peak in all: with
    weights, optimiser state and batch, from a copy of the model to the end of its second step."""
    gc.collect()
    inputs = {name: x.to(device) for name, x in inputs.items()}
    steps, total, models, first = {}, {}, {}, {}

    def begin(name, model, loss):
        models[name] = freeze(copy.deepcopy(model).to(device), mode).train()
        steps[name] = training_step(models[name], lambda m: loss(m, **inputs), dtypes.get(name, dtypes["peer"]))
        first[name] = float(steps[name]())  # AdamW makes its state at the end of it; the second step is like all others
        steps[name]()

    batch_bytes = sum(x.nbytes for x in inputs.values())
    for name, side in sides.items():
        total[name] = batch_bytes + peak_bytes(partial(begin, name, *side), device)
    peer = next(name for name in sides if name != "ours")
    if abs(first["ours"] - first[peer]) > (5e-2 if named(dtypes) else 1e-3):
        raise ValueError(f"{mode}: the losses are {first['ours']:g} and {first[peer]:g}: there is nothing to compare")
    parameters = list(models["ours"].parameters())
    row = compare(f"VLM training step, {mode}{named(dtypes)}", steps, len(inputs["labels"]), rounds, device, **facts)
    return {
        **row,
        "dtype": str(dtypes["ours"]).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "peak_total_mib": round(total["ours"] / 2**20, 1),
        "peer_peak_total_mib": round(total[peer] / 2**20, 1),
    }


def bench_vlm(args, device: torch.device) -> list[dict]:
    """Our VLM against transformers' Idefics3: the same weights and optimiser. With features given, as --cache-features trains,
    the idle tower's weights are still counted on both sides."""
    dtypes = precisions(args, device)
    torch.manual_seed(args.seed)
    ours, theirs = equal_vlms(args.size)
    rows = []
    for batch in args.batch:
        inputs = vlm_batch(ours.config, batch)
        with torch.no_grad():
            one = {name: x[:1] for name, x in inputs.items()}
            difference = (ours(**one)["logits"] - idefics3(theirs, **one).logits).abs().max().item()
            if difference > 1e-3:
                raise ValueError(f"the two models differ by {difference:g}: there is nothing to compare")
            features = ours.vision_features(inputs["pixel_values"])
        for mode in VLM_MODES:
            given = dict(inputs)
            if "features" in mode:
                given["vision_features"] = features
                del given["pixel_values"]
            sides = {
                "ours": (ours, lambda model, **inputs: model(**inputs)["loss"]),
                vlm_peer(mode): (theirs, lambda model, **inputs: idefics3(model, **inputs).loss),
            }
            rows.append(vlm_row(mode, sides, given, dtypes, args.rounds, device, size=args.size, batch=batch))
    return rows


# ---- many questions about a picture ----------------------------------------------------------------------------------


def bench_questions(args, device: torch.device) -> list[dict]:
    """A step of train_vlm.py's language stage, scenes with twelve questions each: packed rows, in which the questions share the
    picture, against transformers' Idefics3 with a padded row and the picture for each. Same weights, answers and loss. --size
    smol: 2x2 pixel shuffle, as in bench_vlm, and as many words as SmolLM2 has."""
    flags = ["--seed", str(args.seed), "--size", args.size, "--pixel-shuffle", "2" if args.size == "smol" else "1"]
    model, processor = train_vlm.build(train_vlm.parse_args(flags), scenes.corpus(), [0.5] * 3, [0.5] * 3)
    if args.size == "smol":
        resize_token_embeddings(model, LLAMA32Config.PRESETS["smollm2-135m"]["vocab_size"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, layout="idefics3")
        theirs = from_transformers("Idefics3ForConditionalGeneration").from_pretrained(folder, attn_implementation="sdpa")
    models = {"ours": model.to(device), "transformers": theirs.to(device)}
    for each in models.values():
        freeze(each, "frozen tower").train()
    for batch in args.batch:
        batches = SceneBatches(processor, batch, args.seed)
        pictures = scenes.make_scenes("train", batch, args.seed)
        inputs = {"ours": batches.batch(pictures), "transformers": padded_rows(batches, pictures)}
        inputs = {name: {key: value.to(device) for key, value in given.items()} for name, given in inputs.items()}
        losses = {"ours": lambda m, given: m(**given)["loss"],
                  "transformers": lambda m, given: m(**given, use_cache=False).loss}  # fmt: skip
        with torch.no_grad():
            ours, others = (losses[name](models[name], inputs[name]).item() for name in models)
        if abs(ours - others) > 1e-3:
            raise ValueError(f"the two losses are {ours:g} and {others:g}: there is nothing to compare")
        steps = {name: training_step(m, partial(losses[name], given=inputs[name])) for name, m in models.items()}
        for step in steps.values():
            step()
        count = len(inputs["transformers"]["input_ids"])
        rows.append(compare("questions, training step", steps, count, args.rounds, device, size=args.size, batch=count))
    return rows


def padded_rows(batches: SceneBatches, pictures: scenes.Scenes) -> dict[str, torch.Tensor]:
    """The batch of these pictures, each question in a row of its own, as transformers takes them."""
    asked = scenes.questions(pictures, batches.seed, batches.per_scene, batches.mix)
    found = [batches.encoded(turn) for turns in asked for turn in turns]
    longest, pad = max(len(ids) for ids, _ in found), batches.processor.tokenizer.pad_token_id or 0
    columns = zip(*((ids + [pad] * (n := longest - len(ids)), labels + [-100] * n, [1] * len(ids) + [0] * n)
                    for ids, labels in found), strict=True)  # fmt: skip
    rows = dict(zip(("input_ids", "labels", "attention_mask"), map(torch.tensor, columns), strict=True))
    pixels = scene_pixels(batches.processor, pictures).repeat_interleave(torch.tensor([*map(len, asked)]), dim=0)
    return {**rows, "pixel_values": pixels[:, None]}


# ---- what a model is fed with ----------------------------------------------------------------------------------------


def bench_pictures(args, device: torch.device) -> list[dict]:
    """JPEGs from disk to pixel_values of 224 x 224: ours, exact and decoded at a fraction of their size, against transformers'
    SigLIP processor. --source: a folder of JPEGs; without it, 16 photo-like ones of 640 x 480 are made."""
    from_transformers("SiglipModel")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    reference = SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=3)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(Path(args.source).glob("*.jpg"))[:64] if args.source else make_photos(Path(folder), 16, args.seed)
        if not files:
            raise ValueError(f"--source {args.source} holds no .jpg files")

        def theirs():
            return reference([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]

        difference = (process_images(files, (224, 224)) - theirs()).abs().max().item()
        if difference > 1e-3:
            raise ValueError(f"the pixels differ by {difference:g}: there is nothing to compare")
        rows = []
        for fast in (False, True):
            steps = {"ours": partial(process_images, files, (224, 224), fast=fast), "transformers": theirs}
            what = "pictures, decoded at a fraction" if fast else "pictures, the same pixels"
            rows.append(compare(what, steps, len(files), args.rounds, device, tensors=False, size="224",
                                batch=len(files)))  # fmt: skip
    return rows


def make_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """JPEGs of smooth colours with some grain, which compress about as photos do."""
    random = torch.Generator().manual_seed(seed)
    for i in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 12, 16, generator=random), (480, 640), mode="bicubic")
        grain = 0.06 * torch.randn(1, 3, 480, 640, generator=random)
        pixels = ((smooth + grain).clamp(0, 1) * 255).byte()[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def bench_bpe(args, device: torch.device) -> list[dict]:
    """Byte-level BPE against the tokenizers library: learning 2,000 tokens from a text, and encoding it, in bytes a second. The
    text: --text FILE, or this project's own files."""
    from_transformers("PreTrainedTokenizerFast")
    import tokenizers

    here = Path(__file__).parents[1]
    files = [Path(args.text)] if args.text else [here / "README.md", *sorted(here.glob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def learn():
        their = tokenizers.Tokenizer(tokenizers.models.BPE())
        their.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=2000, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
        their.train_from_iterator([text], trainer)

    ours = BPETokenizer.train(text, 2000)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    if ours.encode(text) != theirs.encode(text).ids:
        raise ValueError("the two give different ids: there is nothing to compare")
    size, facts = len(text.encode()), {"size": "2000 tokens", "batch": 1, "tensors": False}
    learning = {"ours": partial(BPETokenizer.train, text, 2000), "tokenizers": learn}
    encoding = {"ours": partial(ours.encode, text), "tokenizers": partial(theirs.encode, text)}
    return [
        compare("BPE, learning (bytes)", learning, size, args.rounds, device, **facts),
        compare("BPE, encoding (bytes)", encoding, size, args.rounds, device, **facts),
    ]


FIRST_STEPS = {
    "ours": """
import torch
from model import MLLAMAConfig, MllamaForConditionalGeneration as Model
vision = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
text = {"vocab_size": 450, "hidden_size": 128, "n_heads": 4, "n_kv_groups": 2, "n_layers": 4, "hidden_dim": 384}
model = Model(MLLAMAConfig(vision, {**text, "max_position_embeddings": 512}, projector_type="linear", image_token_id=449))
ids = torch.cat([torch.full((2, 16), 449), torch.randint(0, 400, (2, 32))], dim=1)
model(ids, torch.randn(2, 3, 64, 64), labels=ids)["loss"].backward()
""",
    "transformers": """
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration as Model
vision = {"image_size": 64, "patch_size": 16, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
          "intermediate_size": 768}
text = {"model_type": "llama", "vocab_size": 450, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 4, "intermediate_size": 384, "pad_token_id": 0}
model = Model(Idefics3Config(vision_config=vision, text_config=text, scale_factor=1, image_token_id=449, pad_token_id=0))
ids = torch.cat([torch.full((2, 16), 449), torch.randint(0, 400, (2, 32))], dim=1)
model(input_ids=ids, pixel_values=torch.randn(2, 1, 3, 64, 64), labels=ids).loss.backward()
""",
}


def bench_start(args, device: torch.device) -> list[dict]:
    """From a fresh Python to the end of the first forward and backward pass of a tiny VLM, by the same few lines."""
    from_transformers("Idefics3ForConditionalGeneration")
    run = {name: partial(subprocess.run, [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1],
                         stderr=subprocess.DEVNULL) for name, code in FIRST_STEPS.items()}  # fmt: skip
    return [compare("a first step, from nothing", run, 1, args.rounds, device, tensors=False, size="tiny", batch=2)]


# ---- command line ----------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    print("| what | size | batch | per second | speed, ours / peer | peak MiB | memory, ours / peer |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        memory = (row["peak_mib"], f"{row['memory_ratio']:.2f}x") if row["peak_mib"] is not None else ("", "")
        cells = (row["what"], row["size"], row["batch"], row["per_second"], f"{row['speed_ratio']:.2f}x", *memory)
        print("| " + " | ".join(map(str, cells)) + " |")


def notes(row: dict) -> list[str]:
    """What the table has no column for."""
    lines = []
    if "share_of_bound" in row:
        equal, share = row["equal_tokens"], row["share_of_bound"]
        lines += [f"batch {row['batch']}: {equal:.1%} of the tokens are equal; {share:.0%} of the bound (see bench_decode)"]
    if "perplexity" in row:
        before, after = row["perplexity_floats"], row["perplexity"]
        change = f"{before:.2f} in floats, {after:.2f} quantised ({after / before - 1:+.1%})"
        lines += [f"perplexity on {row['tokens']} tokens: {change}"]
    if "bytes_per_weight" in row:
        each = f"{row['layers']} layers of {row['weights'] / 1e6:.1f}M weights, {row['bytes_per_weight']:.4f} bytes each"
        whole = f"{row['weights_floats_mib']} -> {row['weights_mib']} MiB in {row['quantising_seconds']} s"
        lines += [f"{each}; the whole model: {whole}"]
    if "peak_total_mib" in row:
        size, ours, theirs = row["parameters"] / 1e6, row["peak_total_mib"], row["peer_peak_total_mib"]
        trained = f"{row['what']}, batch {row['batch']}: {row['trained'] / 1e6:.1f}M of {size:.1f}M parameters"
        lines += [f"{trained}; {ours:,.0f} MiB at the peak in all, {row['peer']} {theirs:,.0f}"]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*WORK, "all"], help="what to measure")
    sizes = {"vit": ViTConfig.PRESETS, "vlm": VLM_SIZES, "questions": train_vlm.SIZES}
    sizes = "; ".join(f"{work}: {', '.join(names)}" for work, names in sizes.items()) + "; default: vit-s16, 222m, tiny"
    parser.add_argument("--size", help=sizes)
    parser.add_argument("--source", help="decode, quant: a LLaMA checkpoint, decode's default: SmolLM2-135M's shape, random; "
        "pictures: a folder of JPEGs")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="quant, decode --int8: what --source reads, its first 2,048 tokens, "
        "default README.md; bpe: what it learns")  # fmt: skip
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="decode: tokens per prompt")
    parser.add_argument("--int8", action="store_true", help="decode: ours in 8 bits, so that not all tokens are equal")
    parser.add_argument(
        "--batch", type=positive_int, nargs="+", help="default: vit 8 64, decode 1 16, vlm 2, questions 16, quant 1 256"
    )
    parser.add_argument("--rounds", type=positive_int, default=7, help="turns of each; their median counts")
    parser.add_argument("--device", help="cpu, cuda, mps; default: the best there is")
    parser.add_argument("--dtype", choices=DTYPES, help="vlm, vit (training): default fp16 on CUDA, else fp32")
    parser.add_argument("--peer-dtype", choices=DTYPES, help="vlm, vit (training): the peer's, where it is not ours")
    parser.add_argument("--seed", type=not_negative_int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    parser.add_argument("--picture", metavar="FILE", help="draw the ratios")
    args = parser.parse_args(argv)
    if args.int8 and args.work != "decode":
        parser.error("--int8 is for decode")
    device, rows = find_device(args.device), []
    for work in WORK if args.work == "all" else [args.work]:
        batch = {"vit": [8, 64], "vlm": [2], "questions": [16], "quant": [1, 256]}.get(work, [1, 16])
        size = {"vit": "vit-s16", "vlm": "222m", "questions": "tiny"}.get(work)
        chosen = {**vars(args), "batch": args.batch or batch, "size": args.size or size}
        rows += WORK[work](argparse.Namespace(**chosen), device)
    where = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "seed": args.seed}
    if args.json:
        for row in rows:
            print(json.dumps({**row, **where}))
    else:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
        print_table(rows)
        for line in [line for row in rows for line in notes(row)]:
            print(line)
    if args.picture:
        columns = {"speed, ours / peer": "speed_ratio", "memory, ours / peer": "memory_ratio"}
        groups = {name: [row[key] or float("nan") for row in rows] for name, key in columns.items()}
        labels = [f"{row['what']}, {row['size']}, {row['batch']}, against {row['peer']}" for row in rows]
        figures.bar_chart(groups, labels, args.picture, form="{:.2f}x")


WORK = {
    "vit": bench_vit, "decode": bench_decode, "loss": bench_loss, "vlm": bench_vlm, "questions": bench_questions,
    "quant": bench_quant, "pictures": bench_pictures, "bpe": bench_bpe, "start": bench_start,
}  # fmt: skip

if __name__ == "__main__":
    run_cli(main)
