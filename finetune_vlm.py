"""Train a vision-language model on your own images: from published parts, from a model of yours, or from nothing.

    python finetune_vlm.py --data train.json --images DIR --test-data test.json     from nothing
    python finetune_vlm.py --data train.json --vision SIGLIP --lm SMOLLM2 --lora 8  a projector between published parts
    python finetune_vlm.py --data train.json --model runs/vlm-own --lora 8          a whole model learns more
    python finetune_vlm.py --data train.json --vision SIGLIP --lm LM.gguf --qlora 8       over matrices of four bits a weight
    python finetune_vlm.py --data 'OUT/shard-*.tar' --test-data test.json           more than fits in memory (data/shards.py)
    torchrun --nproc-per-node 8 finetune_vlm.py ...      on 8 GPUs; with --fsdp a model that does not fit on one

--data is JSON, JSONL, CSV, Parquet or tar files, whose rows docs/finetuning.md describes; `python -m data.check` says what is
wrong with them. Up to three stages, each said before it starts and why: a vision tower that starts untrained learns the answers
to common questions, if there are any; the projector learns alone; then all that is not frozen learns to answer. Read
train_vlm.py first: the loop is the same.

Writes runs/vlm-own/ (blind: runs/vlm-own-blind/): the model, with --lora the corrections in lora/ as well, metrics.jsonl,
curves.png, samples.png, attention.png, result.json. transformers opens it in Idefics3's layout (SigLIP and LLaMA joined by the
linear projector) or LLaVA's (--projector mlp); of other pairs the run says that it does not. The last line printed is JSON.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches import IGNORE, fit_batch_size, with_shares
from data.common import CommonAnswers, common_questions
from data.features import IN_OUT, features_for_run, keep_for_run
from data.image_cache import ImageCache
from data.llava import LlavaRows, decoding_problem
from data.llava_batches import LlavaBatches, ShardBatches
from data.row_values import DamagedRow
from data.rows import FIRST_ROWS, load_rows, some, streams
from data.shards import ShardImages
from data.warp import GEOMETRY, warp
from lib.answers import Item, prompt_ids, row_items
from lib.checks import checked_flags
from lib.cli import argument_parser, fraction, not_negative_float, not_negative_int, positive_float, positive_int, run_cli
from lib.distributed import all_gather
from lib.files import naming
from lib.lora import check_rank, lora_parameters
from lib.loss import spare_logits
from lib.optim import cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.quant import Linear4bit, quantize_
from lib.run import Run
from lib.tokenizer import load_tokenizer
from lib.vlm_parts import (
    SIZES,
    assemble,
    find_part,
    parts_after,
    tower_image_settings,
    train_tokenizer,
    whole_model,
    with_chat_template,
)
from lib.vlm_report import ask, leave_behind, logged, memorised
from model import LLAMA32Config, MLLAMAConfig, convert_linears_to_lora
from processing_mllama import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from siglip import SiglipVisionConfig

# ---- settings --------------------------------------------------------------------------------------------------------

SECONDS = {"vision": 0.4, "projector": 0.02, "language": 0.58}  # shares of --max-seconds
MUON_LR = {"vision": 0.02, "projector": 0.02, "language": 0.01}  # see train_vlm.py
VISION_BATCH = 64  # images a step of stage 1
LEAST_STEPS = 100  # of stage 3, where neither --steps nor --epochs is given: three passes over a few rows teach nothing
SEEN = 20  # training rows, asked at the end: what it has learned by heart shows beside the test questions
QUICK = 600  # questions, the first of the test questions, asked every --eval-every steps
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_TARGETS += ["attn.qkv", "attn.proj", "mlp.fc", "mlp.proj"]  # GPT-2's
KEPT_IN_BITS = rf"(?!.*cross_layers).*({'|'.join(LORA_TARGETS)})"  # what --qlora packs: not layers that start untrained
PARTS = {"language": "vlm.language_model", "vision": "vlm.vision_tower", "projector": "vlm.multi_modal_projector"}


def parse_args(argv=None):
    parser = argument_parser(__doc__, batch_size=16, lr=None, eval_every=400)
    add = parser.add_argument
    add("--images", metavar="DIR", help="where the images of --data are; default: its own folder, or images/ in it")
    add("--test-data", metavar="FILE", help="held-out rows; default: --test-part of --data, split by image")
    add("--test-part", type=fraction, default=0.1, help="held out, where there is no --test-data; 0: train on all rows")
    add("--size", choices=list(SIZES), default="small", help="of what is not taken from --vision or --lm; tiny: for tests")
    add("--dropout", type=fraction, default=0.0, help="in the language model that starts untrained, or in its LoRA")
    add("--model", metavar="SOURCE", help="go on from a whole vision-language model, its projector too: a run, a LLaVA or "
        "Idefics3 folder or hub name")  # fmt: skip
    add("--vision", metavar="SOURCE", help="take the vision tower of a run (train_vit.py's, too), or of a folder or hub name: "
        "SigLIP, ViT, CLIP, DINOv2, LLaVA, Idefics3")  # fmt: skip
    add("--lm", metavar="SOURCE", help="take language model and tokenizer of a run, a .gguf file, or a folder or hub name: "
        "LLaMA, Mistral, Qwen2, Qwen3, GPT-2")  # fmt: skip
    add("--image-size", type=positive_int, help="pixels; default: the tower's, whose positions are resized to it")
    add("--vision-layers", type=positive_int, help="take only the first so many blocks of --vision, and its last norm")
    add("--patch-size", type=positive_int, help="pixels; default --size's")
    add("--projector", choices=["linear", "mlp"], default="linear", help="linear: Idefics3's; mlp: LLaVA's two layers, which "
        "read the tower before its last norm (on scenes they learn far more slowly)")  # fmt: skip
    add("--pixel-shuffle", type=positive_int, default=1, help="r x r patches become one token, for --projector linear")
    add("--fusion", choices=["early", "cross"], default="early", help="images among the words, or in layers between the blocks")
    add("--blind", action="store_true", help="train the same model without images: the baseline")
    add("--freeze", default=None, metavar="vision,lm", help="what does not train in the last stages; default: a tower that "
        "is trained by then, and with --lora the rest of the language model; none: nothing")  # fmt: skip
    add("--lora", type=positive_int, metavar="RANK", help="train low-rank corrections of the language model's matrices")
    add("--qlora", type=positive_int, metavar="RANK", help="the same over matrices of four bits a weight (lib/quant.py)")
    add("--lora-alpha", type=positive_float, help="default: twice the rank")
    add("--lr-pretrained", type=positive_float, default=1e-4, help="peak learning rate of what comes trained, LoRA apart")
    add("--muon-lr", type=not_negative_float, help="Muon's, for matrices that start untrained; 0: AdamW for all; default: "
        "0.02, for stage 3 0.01")  # fmt: skip
    add("--vision-steps", type=not_negative_int, help="of stage 1; default: 400")
    add("--projector-steps", type=not_negative_int, help="of stage 2; default: 20 after a stage 1, a tenth of "
        "stage 3 with --vision and --lm, else 0")  # fmt: skip
    add("--steps", type=positive_int, help="of stage 3, in place of --epochs")
    add("--shift", type=fraction, default=0.0, help="move training images by up to this part of their side, with a "
        "tower that trains")  # fmt: skip
    add("--isolated", action="store_true", help="each question of a row is asked alone, without those before it")
    add("--split-images", action=argparse.BooleanOptionalAction, help="cut images into tiles, as Idefics3 and SmolVLM do, or "
        "take them whole; default: as --model says, else whole")  # fmt: skip
    add("--max-length", type=positive_int, help="tokens of a packed row; default: 1024, with tiles 2048")
    add("--cache-features", nargs="?", const=IN_OUT, metavar="FILE", help="keep a frozen tower's features; default in --out")
    add("--eval-count", type=positive_int, default=300, help="test rows asked at the end")
    args = parser.parse_args(argv)
    settle(args, parser)
    return args


def settle(args, parser: argparse.ArgumentParser) -> None:
    """Fill in what flags say of others; end with a line where they contradict each other."""
    if not args.data:
        parser.error("--data FILE is missing: a file or folder of rows, or 'DIR/shard-*.tar'")
    if streams(args) and args.cache_features is not None:
        parser.error(f"--data {args.data} with --test-data is read from front to back: leave out --cache-features")
    args.out = args.out or f"runs/vlm-own{'-more' if args.model else ''}{'-blind' if args.blind else ''}"
    frozen = set((args.freeze or "none").split(","))
    if frozen != {"none"} and frozen - {"vision", "lm"}:
        parser.error(f"--freeze {args.freeze}: it takes vision, lm, both with a comma, or none")
    args.freeze = None if args.freeze is None else sorted(frozen - {"none"})
    if args.test_data and args.test_part != parser.get_default("test_part"):
        parser.error(f"--test-part {args.test_part:g} is of --data: leave it out, or --test-data {args.test_data}")
    if args.steps and args.epochs:
        parser.error("--steps and --epochs: choose one")
    if args.lora and args.qlora:
        parser.error("--lora and --qlora: choose one")
    args.lora = args.lora or args.qlora
    if args.lora_alpha and not args.lora:
        parser.error(f"--lora-alpha {args.lora_alpha:g} is of LoRA: add --lora or --qlora")
    if args.model:
        settled = ("projector", "pixel_shuffle", "fusion", "vision", "lm", "image_size", "vision_layers", "patch_size")
        chosen = [f"--{name.replace('_', '-')}" for name in settled if getattr(args, name) != parser.get_default(name)]
        if chosen:
            parser.error(f"--model {args.model} brings its own: leave out {', '.join(chosen)}")
        args.vision = args.lm = args.model
    if args.vision_layers and not args.vision:
        parser.error("--vision-layers is of --vision, a tower that comes trained: name one")
    if args.vision and args.patch_size:
        parser.error("--patch-size cannot be chosen with --vision: the tower has its own")
    if args.dropout and args.lm and not args.lora:
        parser.error(f"--dropout {args.dropout:g} is of a language model that starts untrained, or of LoRA: add --lora")
    if args.projector == "mlp" and args.pixel_shuffle > 1:
        parser.error("--pixel-shuffle goes with --projector linear: no published layout has it with an mlp")
    if args.fsdp and args.cache_features is not None:
        parser.error("--cache-features needs a whole vision tower in each process: leave out --fsdp")
    if args.shift and args.cache_features is not None:
        parser.error("--shift moves images anew at each step: leave out --cache-features")
    if args.fusion == "cross" and "lm" in (args.freeze or ()) and not args.lora:
        parser.error("--fusion cross --freeze lm: the language model holds the layers that attend to images: add --lora")


# ---- model -----------------------------------------------------------------------------------------------------------


def build(args, texts: list[str]):
    """The model, with what --model, --vision and --lm bring, and its processor. texts: to train a tokenizer on."""
    if args.model:
        return whole_model(args.model, args.seed, args.split_images)
    vision_settings, text_settings, vocabulary = SIZES[args.size]
    changes = {key: getattr(args, key) for key in ("image_size", "patch_size") if getattr(args, key)}
    image_settings = {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
    if args.vision:
        vision = find_part(args.vision, "vision", args.image_size, args.vision_layers)
        image_settings = tower_image_settings(args.vision, vision)
    else:
        vision = checked_flags(args, SiglipVisionConfig, **{**vision_settings, **changes})
    if args.lm:
        text = find_part(args.lm, "lm")
        with naming("--lm", args.lm):
            tokenizer = load_tokenizer(args.lm)
        if tokenizer.plain_size > text.config.vocab_size:
            raise ValueError(
                f"--lm {args.lm}: its tokenizer has {tokenizer.plain_size} tokens, its model {text.config.vocab_size}: "
                "they do not belong together"
            )
        with_chat_template(tokenizer, args.lm)
    else:
        text, tokenizer = LLAMA32Config(**text_settings, dropout=args.dropout), train_tokenizer(texts, vocabulary)
    join = {"projector_type": args.projector, "vision_feature_layer": -1 if args.projector == "mlp" else None}
    join |= {"pixel_shuffle": args.pixel_shuffle}
    configs = {"vision_config": getattr(vision, "config", vision), "text_config": getattr(text, "config", text)}
    checked_flags(args, MLLAMAConfig, **configs, **join)
    return assemble(vision, text, tokenizer, image_settings, args.seed, args.fusion, bool(args.split_images), **join)


def add_lora(args, model) -> None:
    """--lora, --qlora: low-rank corrections of the language model's matrices, which --qlora packs in four bits before."""
    if args.qlora:
        quantize_(model.language_model, KEPT_IN_BITS)
    if args.lora:
        alpha, classes = args.lora_alpha or 2 * args.lora, (nn.Linear, Linear4bit)
        check_rank(model.language_model, args.lora, LORA_TARGETS, classes)
        convert_linears_to_lora(model.language_model, args.lora, alpha, args.dropout, classes, LORA_TARGETS)


class Learner(nn.Module):
    """What is trained: the model and, in stage 1, a linear probe, which answers common questions from the mean of an image's
    features. sizes: of how many answers to each question it chooses one."""

    def __init__(self, vlm, sizes: tuple[int, ...] = ()):
        super().__init__()
        self.vlm, self.sizes = vlm, sizes
        self.probe = nn.Linear(vlm.config.vision_config.hidden_size, sum(sizes)) if sizes else None

    def forward(self, share=(1.0,), answers=None, **batch) -> torch.Tensor:
        """The loss of a part of a batch. share: see with_shares."""
        if answers is not None:
            features = self.vlm.vision_features(batch["pixel_values"]).mean(dim=1)
            return common_loss(self.probe(features).float().split(self.sizes, dim=1), answers) * share[0]
        loss = self.vlm(**batch)["loss"] * share[0]
        if "pixel_values" in batch or "vision_features" in batch:
            return loss
        # Without an image what encodes images has no gradient, and several processes must all have one: 0.
        return loss + sum(p.sum() for p in self.parameters() if p.requires_grad) * 0


def common_loss(logits: tuple[torch.Tensor, ...], answers: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all questions that are asked, from the logits [N, choices] of each and the answers [N, questions]
    (see CommonAnswers)."""
    each = zip(logits, answers.unbind(dim=1), strict=True)
    losses = [F.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum") for x, y in each]
    return sum(losses) / (answers != IGNORE).sum()


# ---- stages ----------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    name: str
    why: str
    steps: int
    parts: tuple[str, ...]  # of the Learner, that train


def has_vision_stage(args, common: dict) -> bool:
    """Whether the tower is trained by itself: if it starts untrained and there are common questions about what it sees."""
    untrained = not (args.vision or args.blind or "vision" in (args.freeze or ()))
    return untrained and args.vision_steps != 0 and bool(common)


def frozen_parts(args, common: dict) -> set[str]:
    """What never trains in the last stage. A tower that is trained already is about as good frozen, and cheaper."""
    if args.freeze is not None:
        return set(args.freeze)
    return {"vision"} if args.vision or args.blind or has_vision_stage(args, common) else set()


def stages(args, epoch: int, common: dict) -> list[Stage]:
    """What this run goes through. epoch: steps of one pass over the rows. common: see common_questions."""
    steps = args.steps or max(1, round(args.epochs * epoch) if args.epochs else max(LEAST_STEPS, 3 * epoch))
    frozen, plan, first = frozen_parts(args, common), [], args.projector_steps
    if has_vision_stage(args, common):
        why = f"the answers to {len(common)} common questions, by a linear layer: there must be something to talk about"
        plan.append(Stage("vision", why, args.vision_steps or 400, (PARTS["vision"], "probe")))
    if first is None:  # where what is on both sides of the projector is trained, or nearly so, and the projector is not
        first = 0 if args.model else 20 if plan else steps // 10 if args.vision and args.lm else 0
    if first and args.fusion == "early":  # the gates of "cross" are closed at first, and let no gradient through to it
        why = "vision tower and language model frozen: a projector that is still random would only disturb them"
        plan.append(Stage("projector", why, first, (PARTS["projector"],)))
    parts = {"the projector": PARTS["projector"]}
    parts |= {} if "vision" in frozen else {"the vision tower": PARTS["vision"]}
    parts |= {} if "lm" in frozen and not args.lora else {"the language model": PARTS["language"]}
    why = " and ".join(parts) + (f", by LoRA of rank {args.lora}" if args.lora else "") + " learn to answer"
    return [*plan, Stage("language", why, steps, tuple(parts.values()))]


def train_only(learner: Learner, stage: Stage, args) -> list[dict]:
    """Let the stage's parts train and nothing else; their groups for the optimizers, each with its learning rate. Raises
    ValueError where nothing is left to train."""
    learner.requires_grad_(False)
    muon_lr, groups = MUON_LR[stage.name] if args.muon_lr is None else args.muon_lr, []
    trained_before = {PARTS["vision"]: args.vision, PARTS["projector"]: args.model, PARTS["language"]: args.lm}
    for part in stage.parts:
        module = learner.get_submodule(part).requires_grad_(True)
        if part == PARTS["vision"]:
            for unused in parts_after(module, learner.vlm.config.vision_feature_layer):
                unused.requires_grad_(False)
        if part == PARTS["language"] and args.lora:
            lora = {name for name, _ in lora_parameters(module)}
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in lora or "cross_layers" in name)
            groups += parameter_groups(module, args.weight_decay, args.lr or 1e-3)
        elif not trained_before.get(part):
            groups += parameter_groups(module, args.weight_decay, args.lr or 2e-3, muon_lr)
        else:
            cross_layers = getattr(getattr(module, "model", module), "cross_layers", None)
            if cross_layers is not None and not args.model:  # they start untrained
                groups += parameter_groups(cross_layers, args.weight_decay, args.lr or 2e-3, muon_lr)
                cross_layers.requires_grad_(False)  # not again, in the groups of what comes trained
            groups += parameter_groups(module, args.weight_decay, args.lr_pretrained)
            module.requires_grad_(True)
    if not groups:
        raise ValueError(f"stage {stage.name}: nothing is left to train: freeze less")
    return groups


# ---- data ------------------------------------------------------------------------------------------------------------


def common_answers(args, run: Run, rows: LlavaRows, common: dict, images: ImageCache) -> tuple[CommonAnswers, int]:
    """Batches for stage 1, and how many images one is over all processes."""
    unit = run.world_size * args.grad_accum
    size = max(1, round(VISION_BATCH / unit)) * unit
    ranks = {"rank": run.rank, "world_size": run.world_size, "all_ranks": run.all, "workers": args.workers}
    return CommonAnswers(rows, common, images, size // run.world_size, args.seed, args.grad_accum, **ranks), size


def conversations(args, run: Run, rows, model, processor, common: dict) -> LlavaBatches:
    """Batches for stages 2 and 3."""
    tiled = processor.image_settings.fit == "tiles"
    sharded, frozen, features = streams(args), "vision" in frozen_parts(args, common), None
    images = (ShardImages if sharded else ImageCache)(processor.image_settings)
    if args.cache_features is not None and not frozen:
        raise ValueError("--cache-features: the vision tower is trained, so its features change: add --freeze vision")
    if frozen and not (args.fsdp or sharded) and (run.device.type == "cpu" or args.cache_features is not None):
        features = features_for_run(model, images, rows, args, run)
    if args.shift and features and not args.blind and not has_vision_stage(args, common):
        raise ValueError("--shift: the vision tower is frozen and encodes each image once: add --freeze none")
    return (ShardBatches if sharded else LlavaBatches)(
        rows, processor, images, args.batch_size // run.world_size, args.seed, args.max_length or (2048 if tiled else 1024),
        isolated=args.isolated, grad_accum=args.grad_accum, blind=args.blind, workers=args.workers, features=features,
        rank=run.rank, world_size=run.world_size, context=model.config.text_config.context_length,
        all_ranks=run.all, always_image=args.fsdp,
    )  # fmt: skip


def test_questions(args, run: Run, rows: LlavaRows, model, processor) -> list[Item]:
    """Questions about --eval-count test rows, without those that cannot be asked."""
    items = row_items(some(rows, args.eval_count), args.isolated)
    paths, limit = {path for item in items for path in item.images}, model.config.text_config.context_length
    bad = set() if args.blind else {path for path in paths if decoding_problem(path)}
    fit = [item for item in items if not bad & {*item.images} and len(prompt_ids(processor, item, True)[0]) < limit]
    if len(fit) < len(items):
        why = f"{len(bad)} images cannot be read" if bad else f"they have over {limit} tokens"
        run.print(f"{len(items) - len(fit)} of {len(items)} questions are left out of its evaluation: {why}")
    return fit


def shifted(pixel_values: torch.Tensor, most: float, generator: torch.Generator) -> torch.Tensor:
    """[I, 3, S, S], each moved by up to `most` of its side, either way; its border is repeated."""
    geometry = torch.zeros(len(pixel_values), len(GEOMETRY))
    geometry[:, 1:3] = (torch.rand(len(pixel_values), 2, generator=generator, device=generator.device).cpu() * 2 - 1) * most
    return warp(pixel_values, geometry.to(pixel_values), "border")


def left_out(batches: LlavaBatches) -> dict[str, int]:
    """How much training met, in all processes, that it could not use."""
    found = {"unreadable_images": map(str, batches.images.unreadable), "rows_too_long": batches.too_long}
    lost = batches.order.lost if isinstance(batches, ShardBatches) else None
    if lost is not None:
        found["damaged_rows"] = [place for place, why in lost.items() if isinstance(why, DamagedRow)]
        found["unusable_rows"] = lost.keys() - {*found["damaged_rows"]}
    return {name: len(set(all_gather(list(each)))) for name, each in found.items()}


# ---- the recipe --------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)

    # ---- data, model ----
    rows, test_rows = load_rows(args, run)
    fit_batch_size(run, len(rows), "rows")
    common = {} if streams(args) else common_questions(rows)
    texts = [m["content"] for row in (rows.head(FIRST_ROWS) if streams(args) else rows) for m in row.messages]
    model, processor = build(args, texts)
    spare_logits(model.language_model)
    add_lora(args, model)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    learner = run.place(Learner(model, tuple(map(len, common.values()))))
    packed = conversations(args, run, rows, model, processor, common)
    tests = test_questions(args, run, test_rows, model, processor)
    plan = stages(args, len(packed), common)
    run.print(f"{args.data} {run}; {', '.join(f'{name} {count:,}' for name, count in counts.items())} parameters")

    for stage in plan:
        optimizers = make_optimizers(train_only(learner, stage, args))
        if stage.name == "vision":
            batches, size = common_answers(args, run, rows, common, packed.images)
        else:
            batches, size = packed, args.batch_size
            keep_for_run(packed.features, rows, args, run)
        seconds = args.max_seconds and args.max_seconds * SECONDS[stage.name] / sum(SECONDS[each.name] for each in plan)
        trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        run.print(f"stage {stage.name}: {stage.why}\n  {trained:,} parameters, {stage.steps:,} steps of {size}")

        # ---- loop ----
        for step in run.steps(stage.name, stage.steps, batches, optimizers, "samples", size, seconds):
            if stage.name == "language" and run.evaluates(step):
                with run.evaluation() as eval_learner:
                    found = ask(eval_learner.vlm, processor, tests[:QUICK], args.blind, run.stop_if_asked)
                    run.log(**logged({"test": found}))
            set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
            generator = run.seed_step(step)
            for batch in run.parts(with_shares(run, next(batches))):
                if args.shift and "pixel_values" in batch:
                    batch["pixel_values"] = shifted(batch["pixel_values"], args.shift, generator)
                with run.autocast():
                    loss = run.model(**batch)
                run.scaler.scale(loss).backward()
                run.loss += loss.detach()
            run.clip_and_step(optimizers, args.clip)

    # ---- evaluation, and what the run leaves ----
    lost = left_out(packed)
    if run.is_main and not args.dry_run:
        with run.evaluation() as eval_learner:
            asked = {"test": tests}
            if not (streams(args) or test_rows is rows):
                asked["seen"] = test_questions(args, run, some(rows, SEEN), model, processor)
            vlm, stop = eval_learner.vlm, run.stop_if_asked
            found = {part: ask(vlm, processor, items, args.blind, stop) for part, items in asked.items()}
            run.log(**logged(found))
            run.print(memorised(found))
            leave_behind(run, vlm, processor, asked, found, "llava", **lost)
    run.finish()


if __name__ == "__main__":
    run_cli(main)
