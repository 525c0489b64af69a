"""Train two towers (siglip.py) to tell which caption belongs to which image: sight that is learned from words alone.

    python -m extras.train_siglip                                 scenes of handwritten digits, in five minutes
    python -m extras.train_siglip --dataset llava --data train.json --images DIR    captions, or each row's first answer
    python -m extras.train_siglip --dataset llava --data 'OUT/shard-*.tar' --test-data test.json      see data/shards.py
    python -m extras.train_siglip --dataset llava --data train.json --vision DINOV2     a tower that comes trained
    python -m extras.train_siglip --dataset cifar10 --size small  "a photo of a {class}": a classifier made of captions
    python -m extras.train_siglip --dataset folder --data photos.tar.gz
    python -m extras.train_siglip --batch-size 2048 --chunk 128   a large batch in little memory, with the same gradients
    torchrun --nproc-per-node 8 -m extras.train_siglip ...        on 8 GPUs; every image still meets every caption
    python -m extras.train_siglip --resume                        go on after Ctrl-C, exactly

Mirrors: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al. 2023), with gradient caching (Gao et al. 2021). A pair
counts as right wherever the caption is true of the image, and not only where the two were drawn together. Of a row with several
captions each step draws one. --vision: extras/tower_pairs.py.

Writes runs/siglip-DATASET/, which transformers opens as a SiglipModel (with --vision it is in our own layout): config.json,
model.safetensors, the tokenizer, preprocessor_config.json; metrics.jsonl, curves.png, samples.png, result.json. The last line
printed is JSON. Then
`python generate.py RUN --image x.png --zero-shot "a red 3" "a blue 7"`, and `python train_vlm.py --vision RUN`.
Axes: B images of the batch, of all processes; N of a test; M captions; P width of the shared space.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.augment import PRESETS as AUGMENTATIONS
from data.datasets import evenly
from data.features import IN_OUT, FrozenFeatures, features_for_run, keep_for_run
from data.image_settings import ImageSettings
from data.rows import streams
from extras.caption_pairs import ClassPairs, RowPairs, ScenePairs, ShardPairs, Test, true_pairs
from extras.tower_pairs import tower_pair
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.checks import checked_flags
from lib.classification import default_patch
from lib.cli import argument_parser, fraction, not_negative_float, not_negative_int, positive_float, positive_int, run_cli
from lib.distributed import all_gather
from lib.files import write_json
from lib.image_settings import write_image_settings
from lib.optim import cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.run import Run
from lib.tokenizer import BPETokenizer
from lib.vlm_parts import find_part, tower_image_settings
from lib.vocabulary import caption_ids
from siglip import SiglipConfig, SiglipTextConfig, SiglipTwoTower, SiglipVisionConfig
from vit_scratch import sincos_positions

# ---- settings --------------------------------------------------------------------------------------------------------

# The one dial: (vision tower, text tower, vocabulary of the tokenizer that is trained here). "mini" sees like train_vlm.py's
# "small", the larger ones like train_vit.py's of the same name.
SIZES = {
    "tiny": (  # for tests: it learns next to nothing
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        400,
    ),
    "mini": (
        {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        2048,
    ),
    "small": (
        {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6},
        {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6},
        4096,
    ),
    "medium": (
        {"hidden_size": 384, "num_hidden_layers": 7, "num_attention_heads": 6},
        {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6},
        8192,
    ),
    "base": ({}, {}, 32000),
}
# Per data set. Every value has a flag that replaces it. Of scenes, which never end, 10,000 are called an epoch. With Muon at
# 0.03 in place of 0.01, 936 steps taught it half as many of the scenes' digits (14.6 % for 28.4); elsewhere it was not tried.
RECIPES = {
    "scenes": {"image_size": 64, "patch_size": 16, "epochs": 8, "batch_size": 64, "muon_lr": 0.01},
    "llava": {"image_size": 64, "patch_size": 8, "epochs": 30, "batch_size": 64},
    "digits": {"image_size": 16, "patch_size": 4, "epochs": 30, "batch_size": 64},
    "mnist": {"image_size": 28, "patch_size": 7, "epochs": 2, "batch_size": 64},
    "fashion-mnist": {"image_size": 28, "patch_size": 7, "epochs": 4, "batch_size": 64},
    "cifar10": {"image_size": 32, "patch_size": 4, "epochs": 100, "batch_size": 128},
    "folder": {"image_size": None, "patch_size": None, "epochs": 30, "batch_size": 128},
}
CHOICES = 100  # captions that one is chosen from, the true one among them
RECALLS = (1, 5, 10)  # of so many that are ranked first, whether one is true
MOST_TOKENS = 64  # the length of all texts of the published models
END = "<|endoftext|>"  # fills every text up to the text tower's length, as in the published models


def parse_args(argv=None):
    parser = argument_parser(__doc__, batch_size=None, lr=2e-3, eval_every=400)
    add = parser.add_argument
    add("--dataset", choices=list(RECIPES), default="scenes")
    add("--images", metavar="DIR", help="where the images of --data FILE.json are; default: beside it")
    add("--test-data", metavar="FILE.json", help="held-out rows; default: --test-part of --data, split by image")
    add("--test-part", type=fraction, default=0.1, help="held out, where there is no --test-data; 0: train on all rows")
    add("--split-seed", type=not_negative_int, default=0, help="another test part, where a folder or digits come without")
    add("--size", choices=list(SIZES), default="mini", help="width and depth of both towers; tiny: for tests")
    add("--vision", metavar="SOURCE", help="take the vision tower of a run, or of a folder or hub name: SigLIP, ViT, CLIP, "
        "DINOv2, LLaVA, Idefics3; the head on top of it starts untrained")  # fmt: skip
    add("--vision-layers", type=positive_int, help="take only the first so many blocks of --vision, and its last norm")
    add("--freeze", choices=["vision", "none"], help="what never trains; default: the tower of --vision")
    add("--lr-pretrained", type=positive_float, help="peak learning rate of a tower of --vision that trains; default: 1e-4")
    add("--cache-features", nargs="?", const=IN_OUT, metavar="FILE", help="keep a frozen tower's features; default in --out; "
        "the file may be one that finetune_vlm.py made of the same rows")  # fmt: skip
    add("--image-size", type=positive_int, help="pixels; default depends on the data set, with --vision the tower's")
    add("--patch-size", type=positive_int, help="pixels; default depends on the data set")
    add("--tokens", type=positive_int, help="to which every caption is filled up or cut; default: what the longest needs, at "
        f"most {MOST_TOKENS}; transformers' zero-shot pipeline wants {MOST_TOKENS}")  # fmt: skip
    add("--caption", default="a photo of a {}", help="what is said of an image of a class, {} being the class")
    add("--augment", choices=list(AUGMENTATIONS), help="of images with classes; default: made for the data set")
    add("--dropout", type=fraction, default=0.0, help="of attention weights, in both towers; with --vision in that of texts")
    add("--muon-lr", type=not_negative_float, help="Muon's: default 0.03, scenes 0.01; 0: AdamW for all (far slower)")
    add("--steps", type=positive_int, help="in place of --epochs")
    add("--chunk", type=positive_int, metavar="N", help="hold the activations of N pairs at a time (of each process); same "
        "gradients, half as much time again")  # fmt: skip
    add("--eval-count", type=positive_int, default=500, help="test scenes of one digit, with the 80 prompts")
    args = parser.parse_args(argv)
    settle(args, parser)
    return args


def settle(args, parser: argparse.ArgumentParser) -> None:
    """Fill in what flags say of others; end with a line where they contradict each other."""
    if args.steps and args.epochs:
        parser.error("--steps and --epochs: choose one")
    settle_vision(args, parser)
    for key, value in {"muon_lr": 0.03, **RECIPES[args.dataset]}.items():
        if getattr(args, key) is None and not (args.vision and key in ("image_size", "patch_size")):
            setattr(args, key, value)
    if args.dataset == "llava" and not args.data:
        parser.error("--dataset llava needs --data FILE.json, or shards: 'DIR/shard-*.tar'")
    if args.caption.count("{}") != 1 or "{" in args.caption.replace("{}", ""):
        parser.error(f"--caption {args.caption!r} must hold {{}} once, where the class stands")
    if args.chunk:  # for a contrastive loss the same thing: all negatives stay in it
        size = int(os.environ.get("WORLD_SIZE", 1)) * args.chunk
        if args.grad_accum > 1 or args.batch_size % size:
            parser.error(f"--chunk {args.chunk}: choose a part of --batch-size {args.batch_size}, and no --grad-accum")
        args.grad_accum = args.batch_size // size
    args.augment = args.augment or (args.dataset if args.dataset in AUGMENTATIONS else None)
    args.out = args.out or f"runs/siglip-{args.dataset}"


def settle_vision(args, parser: argparse.ArgumentParser) -> None:
    """The flags about --vision."""
    trained = {"vision_layers": args.vision_layers, "freeze": args.freeze == "vision", "lr_pretrained": args.lr_pretrained}
    trained["cache_features"] = args.cache_features is not None
    if not args.vision and (given := [f"--{name.replace('_', '-')}" for name, value in trained.items() if value]):
        parser.error(f"{given[0]} is of --vision, a tower that comes trained: name one")
    if args.vision and args.dataset != "llava":
        parser.error(f"--vision goes with --dataset llava, images of your own; --dataset is {args.dataset}")
    if args.vision and args.patch_size:
        parser.error("--patch-size cannot be chosen with --vision: the tower has its own")
    args.freeze = args.freeze or ("vision" if args.vision else "none")
    if args.freeze == "vision" and args.lr_pretrained:
        parser.error("--lr-pretrained is of a tower that trains: add --freeze none")
    args.lr_pretrained = args.lr_pretrained or 1e-4
    if args.cache_features is not None:
        if args.freeze == "none":
            parser.error("--cache-features: the vision tower is trained, so its features change: leave out --freeze none")
        if streams(args):
            parser.error(f"--data {args.data} with --test-data is read from front to back: leave out --cache-features")
        if args.fsdp:
            parser.error("--cache-features needs a whole vision tower in each process: leave out --fsdp")


# ---- model and loss --------------------------------------------------------------------------------------------------


def trained_tower(args) -> tuple[torch.nn.Module, ImageSettings]:
    """That of --vision, and how it wants its images."""
    tower = find_part(args.vision, "vision", args.image_size, args.vision_layers)
    return tower, ImageSettings(**tower_image_settings(args.vision, tower))


def build(args, pairs, tower: torch.nn.Module | None = None) -> tuple[SiglipTwoTower, BPETokenizer]:
    """The towers, and the tokenizer, whose model_max_length is that of all texts. tower: of --vision."""
    vision, text, vocabulary = SIZES[args.size]
    texts = pairs.texts()
    tokenizer = BPETokenizer.train(texts, vocabulary, (END,), at_most=True)
    longest = 1 + max(map(len, tokenizer.encode_batch(texts)))  # and the token that ends it
    most = max(MOST_TOKENS, longest)
    if args.tokens and args.tokens > most:
        raise ValueError(f"--tokens {args.tokens}: the longest caption has {longest} of them: choose at most {most}")
    tokenizer.model_max_length = args.tokens or min(MOST_TOKENS, longest)
    if tower is None:
        height, width = size = pairs.settings.image_size
        vision = vision | {"image_size": height if height == width else size, "attention_dropout": args.dropout}
        vision = checked_flags(args, SiglipVisionConfig, **vision, patch_size=args.patch_size or default_patch(size))
    else:
        vision = tower.config
    text = text | {"max_position_embeddings": tokenizer.model_max_length, "attention_dropout": args.dropout}
    text = checked_flags(args, SiglipTextConfig, **text, vocab_size=len(tokenizer), projection_size=vision.hidden_size)
    torch.manual_seed(args.seed)
    model = tower_pair(tower, text) if tower else SiglipTwoTower(SiglipConfig(vision, text))
    with torch.no_grad():
        if tower is None:  # positions that say from the first step what is near what
            model.vision_model.embeddings.position_embedding.weight.copy_(sincos_positions(vision.grid, vision.hidden_size))
        model.logit_bias.fill_(-math.log(args.batch_size))  # one caption in so many is true; SigLIP's -10 is for 32,768
    if args.freeze == "vision":
        model.vision_tower.requires_grad_(False)
    return model, tokenizer


def groups_of(model: SiglipTwoTower, args) -> list[dict]:
    """What trains, for the optimizers. A tower that comes trained has a learning rate of its own, and no Muon."""
    if not args.vision or args.freeze == "vision":
        return parameter_groups(model, args.weight_decay, args.lr, args.muon_lr)
    tower = model.vision_tower.requires_grad_(False)
    groups = parameter_groups(model, args.weight_decay, args.lr, args.muon_lr)
    return groups + parameter_groups(tower.requires_grad_(True), args.weight_decay, args.lr_pretrained)


def pair_loss(images, texts, scale, bias, true: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    """sigmoid_loss of siglip.py for images [B, P] and captions [M, P] of which any may be true of any: `true` [B, M].

    Every pair is a question of its own, so one that is true is labelled so: where captions come again, as with ten classes,
    masking would leave out what is to be learned, and a wrong label teach the contrary. chunk_size: images at a time.
    """

    def some(images, true):
        logits = images @ texts.T * scale + bias
        return -F.logsigmoid(torch.where(true, logits, -logits)).sum()

    size = chunk_size or len(images)
    parts = zip(images.split(size), true.split(size), strict=True)
    again = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(some, *part, **again) if chunk_size else some(*part) for part in parts) / len(images)


def part_losses(run: Run, pixels, ids, true) -> Callable[[int], torch.Tensor]:
    """A function that computes the loss of the batch of all processes from one of its --grad-accum parts: each has the value of
    the whole, and the mean of their gradients is its gradient. pixels (as in Pairs), ids [M, T]: of this process; true: of all.

    The loss of any pair needs all embeddings and nothing else: they are computed without a graph, then the gradients of the
    loss with respect to them; and a part at a time, computed once more, takes its own of these through its tower (GradCache,
    Gao et al. 2021). With dropout both times draw the same random numbers.
    """
    towers, parts, seed = run.raw, run.args.grad_accum, torch.initial_seed()
    pixels, ids, true = pixels.to(run.device).tensor_split(parts), ids.to(run.device).tensor_split(parts), true.to(run.device)

    def embed(k: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + k)
        different, which = ids[k].unique(dim=0, return_inverse=True)  # a caption that comes again is read once
        with run.autocast():
            out = run.model(pixels[k], different)
        return [out["image_embeddings"].float(), out["text_embeddings"].float()[which]]

    if parts == run.world_size == 1:
        return lambda k: pair_loss(*embed(k), towers.logit_scale.exp(), towers.logit_bias, true)
    with torch.no_grad():
        own = [torch.cat(rows) for rows in zip(*map(embed, range(parts)), strict=True)]
        leaves = [all_gather(x) for x in own] + [towers.logit_scale.clone(), towers.logit_bias.clone()]
    images, texts, scale, bias = (x.requires_grad_() for x in leaves)
    loss = pair_loss(images, texts, scale.exp(), bias, true, len(pixels[0]) if parts > 1 else None)
    gradients = torch.autograd.grad(loss, leaves)
    # Several processes average their gradients: of embeddings each has its own, of scale and bias all have the same.
    mine = [g.chunk(run.world_size)[run.rank] * run.world_size for g in gradients[:2]]
    rows = [g.tensor_split(parts) for g in mine]

    def part_loss(k: int) -> torch.Tensor:
        slope = sum((x * g[k]).sum() for x, g in zip(embed(k), rows, strict=True)) * parts
        slope = slope + (towers.logit_scale * gradients[2] + towers.logit_bias * gradients[3]).sum()
        return loss.detach() + (slope - slope.detach())  # the loss's value with this part's gradient

    return part_loss


# ---- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(model: SiglipTwoTower, tokenizer: BPETokenizer, test: Test, pairs, run: Run):
    """[N images, M captions], on the CPU."""
    images, texts, some = [], [], 250  # at a time
    with run.autocast():
        for start in range(0, len(test.images), some):
            inputs = test.inputs(slice(start, start + some), pairs.settings)
            images.append(model.image_embeddings(inputs.to(run.device)).float())
            run.stop_if_asked()
        for part in caption_ids(tokenizer, test.captions, model.config.text_config).split(some):
            texts.append(model.text_embeddings(part.to(run.device)).float())
    return (torch.cat(images) @ torch.cat(texts).T * model.logit_scale.exp() + model.logit_bias).cpu()


def best_ranks(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Of each row of logits [N, M], the rank of the best true one, int64 [N], from 1 on. A tie counts against it: what is not
    true and has the same logit stands before it."""
    best = logits.masked_fill(~true, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + (~(logits < best) & ~true).sum(dim=1)


def measure(test: Test, logits: torch.Tensor) -> dict[str, float]:
    """Figures of logits [N, M]. Classes: how often the likeliest caption is true. A gallery: recall at 1, 5 and 10 and the
    median rank, of all captions that are ranked for each image and all images for each caption; what guessing would give at 1;
    and how often an image's first caption is chosen among CHOICES of as many images, the others of which are not true of it
    (chance: one in CHOICES)."""
    true, N = true_pairs(test.true, test.captions), len(test.true)
    if test.classes:
        said, found = logits.argmax(dim=1), {}
        found["zero_shot_accuracy"] = true[torch.arange(N), said]
        for k, word in enumerate(test.words, start=1):
            same = [test.captions[choice].split()[k] == test.own(i).split()[k] for i, choice in enumerate(said.tolist())]
            found[f"zero_shot_{word}"] = torch.tensor(same)
    else:
        ranks = {"image_to_text": best_ranks(logits, true), "text_to_image": best_ranks(logits.T, true.T)}
        found = {f"{way}_recall_at_{k}": rank <= k for way, rank in ranks.items() for k in RECALLS}
        found |= {f"{way}_median_rank": rank.float().quantile(0.5) for way, rank in ranks.items()}
        found["recall_by_chance"] = true
        others = logits[:, test.first].masked_fill(true[:, test.first] & ~torch.eye(N, dtype=torch.bool), -torch.inf)
        choices = (torch.arange(N)[:, None] + torch.arange(min(CHOICES, N))) % N
        found[f"caption_among_{choices.shape[1]}"] = others.gather(1, choices).argmax(dim=1) == 0
    return {name: values.float().mean().item() for name, values in found.items()}


def evaluate(model, tokenizer, tests: dict[str, Test], pairs, run: Run) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(figures of all tests, logits of each)."""
    logits = {name: logits_of(model, tokenizer, test, pairs, run) for name, test in tests.items()}
    found = [(name, figure, value) for name in tests for figure, value in measure(tests[name], logits[name]).items()]
    return {f"{name}{figure}": value for name, figure, value in found}, logits


# ---- what the run leaves ---------------------------------------------------------------------------------------------


def draw(folder: Path, test: Test, logits: torch.Tensor, rows: list[dict]) -> None:
    """curves.png; samples.png: images with the caption that the model finds likeliest of all, and a true one."""
    figures.curves(rows, folder / "curves.png")
    chosen = evenly(len(test.images), 24).tolist()
    best, said = logits[chosen].sigmoid().max(dim=1)
    answers = [test.captions[i] for i in said.tolist()]
    good = [answer in test.true[i] for i, answer in zip(chosen, answers, strict=True)]
    title = f"which of {len(test.captions)} captions it finds likeliest, and how likely"
    images, likely = [test.images[i].cpu().expand(3, -1, -1) for i in chosen], [f"{p:.0%}" for p in best.tolist()]
    figures.answer_sheet(images, likely, answers, list(map(test.own, chosen)), folder / "samples.png", title, good=good)


def use_features(model: SiglipTwoTower, pairs: RowPairs, args, run: Run) -> None:
    """Let images come as features of the frozen tower: those of test images made once, and those of training images where that
    is asked for, or the tower is what takes the time."""
    pairs.test_features = FrozenFeatures(model, pairs.images, most_bytes=sys.maxsize)
    if not streams(args) and (run.device.type == "cpu" or args.cache_features is not None):
        pairs.features = features_for_run(model, pairs.images, pairs.rows, args, run)
    keep_for_run(pairs.features, pairs.rows, args, run)


def save_run(folder: Path, model: SiglipTwoTower, tokenizer: BPETokenizer, pairs, args) -> None:
    """A published checkpoint folder, with what transformers' tokenizer and image processor need to know."""
    save_pretrained(model, folder)
    tokenizer.model_input_names = ["input_ids"]  # padding is read, not masked
    tokenizer.save_pretrained(folder)
    write_image_settings(folder, pairs.settings)
    write_json(folder / "settings.json", vars(args))
    from_pretrained(folder)  # what was written can be read


# ---- the recipe ------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)

    # ---- data ----
    tower, settings = trained_tower(args) if args.vision else (None, None)
    if args.dataset == "llava":
        pairs = (ShardPairs if streams(args) else RowPairs)(args, run, settings)
    else:
        pairs = (ScenePairs if args.dataset == "scenes" else ClassPairs)(args, run)

    # ---- model and optimiser ----
    model, tokenizer = build(args, pairs, tower)
    model = run.place(model)
    if args.freeze == "vision" and not args.fsdp:
        use_features(model, pairs, args, run)
    quick = pairs.tests(quick=True)
    optimizers = make_optimizers(groups_of(model, args))
    total_steps = args.steps or max(1, round(args.epochs * len(pairs)))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config, size = model.config, pairs.settings.image_size
    run.print(
        f"{args.dataset}: images of {'x'.join(map(str, size))} in {'x'.join(map(str, config.vision_config.grid))}"
        f" patches, captions of {config.text_config.max_position_embeddings} tokens out of {len(tokenizer)}\n"
        f"towers: vision {count['vision_model']:,}, text {count['text_model']:,} parameters, {trained:,} trained in all\n"
        f"{total_steps:,} steps of {args.batch_size} pairs in parts of {args.batch_size // args.grad_accum}, {run}"
    )

    # ---- loop ----
    for step in run.steps("", total_steps, pairs, optimizers, unit="pairs"):
        if run.evaluates(step):
            with run.evaluation() as eval_model:
                run.log(**evaluate(eval_model, tokenizer, quick, pairs, run)[0])
        set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
        pixels, captions, true = pairs.draw(run.seed_step(step), run.progress)
        true = true_pairs(all_gather(true), all_gather(captions))
        part_loss = part_losses(run, pixels, caption_ids(tokenizer, captions, config.text_config), true)
        for k in run.parts(range(args.grad_accum)):
            loss = part_loss(k) / args.grad_accum
            run.scaler.scale(loss).backward()
            run.loss += loss.detach()
        run.clip_and_step(optimizers, args.clip)

    # ---- evaluation, and what the run leaves ----
    if run.is_main and not args.dry_run:
        with run.evaluation() as whole:
            tests = pairs.tests()
            found, logits = evaluate(whole, tokenizer, tests, pairs, run)
            run.log(**found)
            save_run(run.folder, whole, tokenizer, pairs, args)
            first = next(iter(tests))
            draw(run.folder, tests[first], logits[first], run.metrics.read())
        result = {name: round(value, 4) for name, value in found.items()}
        result |= {"parameters": trained, "seconds": round(run.seconds, 1), "steps": run.steps_done}
        result |= {"pairs_per_second": round(run.steps_done * args.batch_size / run.seconds, 1)}
        result |= {"seed": args.seed, "run": str(run.folder)}
        write_json(run.folder / "result.json", result)
        print(json.dumps(result))
    run.finish()


if __name__ == "__main__":
    run_cli(main)
