"""Train a vision-language model (model.py) from nothing: it answers questions about scenes of handwritten digits.

    python train_vlm.py                                  eight minutes on a CPU
    python train_vlm.py --blind                          its twin that never sees an image: what can be guessed
    python train_vlm.py --vision runs/siglip-scenes      with a vision tower that is trained already
    torchrun --nproc-per-node 8 train_vlm.py             on 8 GPUs
    python train_vlm.py --resume                         go on after Ctrl-C, exactly

Three stages, each said before it starts and why (see STAGES): the vision tower alone learns what is in each patch of a scene,
then the projector alone learns, then the projector and the language model learn to answer. Twelve questions about a scene are
packed in one row but do not attend to each other (data/packing.py). With seed 0, 96.4 % of the answers about ordinary scenes
are right and 92.6 % about scenes with pairs of digit and colour that no training scene shows; blind, 13.4 and 10.8 %.

Writes runs/vlm-scenes/ (blind: runs/vlm-scenes-blind/): the model as a folder that transformers opens (Idefics3's layout),
metrics.jsonl, curves.png, samples.png, attention.png, result.json. The last line printed is JSON. Your own images, and parts
that come trained: finetune_vlm.py.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches import IGNORE, with_shares
from data.scene_batches import PatchLabels, SceneBatches
from data.scenes import COLOURS, HELD_OUT, PLACES, corpus, make_scenes
from lib.answers import scene_items
from lib.cli import argument_parser, not_negative_float, not_negative_int, positive_int, run_cli
from lib.loss import spare_logits
from lib.optim import cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.run import Run
from lib.vlm_parts import SIZES, assemble, find_part, tower_image_settings, train_tokenizer
from lib.vlm_report import ask, leave_behind, logged
from model import LLAMA32Config
from processing_mllama import rescale
from siglip import SiglipVisionConfig

# ---- settings --------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    name: str
    why: str
    parts: tuple[str, ...]  # of the Learner, that train
    muon_lr: float
    seconds: float  # share of --max-seconds


# With Muon at 0.02 the language model of one run in four never learned to find a digit by its name, with 0.05 it learned all
# late: few of a step's questions tell each digit, and Muon's step is of the same length whether the gradient is sure or not.
STAGES = (
    Stage("vision", "digit, colour and place of each patch, from the generator's labels: there must be something to talk about",
          ("vlm.vision_tower", "probe"), 0.02, 0.4),
    Stage("projector", "vision tower and language model frozen: a projector that is still random would only disturb them",
          ("vlm.multi_modal_projector",), 0.02, 0.02),
    Stage("language", "the projector and the language model learn to answer",
          ("vlm.multi_modal_projector", "vlm.language_model"), 0.01, 0.58),
)  # fmt: skip
VISION_BATCH = 64  # scenes a step of stage 1
LABELS = 11, len(COLOURS) + 1, len(PLACES[3])  # digits and colours, each with "nothing", and places
LABEL_WEIGHTS = 1.0, 0.5, 0.2  # digits are hardest; where places weigh more, digits show less in the features
QUICK = 600  # questions of each split, the first of its test questions, asked every --eval-every steps


def parse_args(argv=None):
    parser = argument_parser(__doc__, batch_size=16, lr=2e-3, eval_every=400)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="small", help="of the model; tiny: for tests")
    add("--vision", metavar="SOURCE", help="take the vision tower of a run, a SigLIP, LLaVA or Idefics3 folder or hub name; it "
        "stays as it is, and stage 1 is left out")  # fmt: skip
    add("--blind", action="store_true", help="train the same model without images: the baseline; stage 1 is left out")
    add("--vision-steps", type=not_negative_int, default=1000, help="of stage 1; 0: the tower trains in stage 3")
    add("--projector-steps", type=not_negative_int, default=20, help="of stage 2")
    add("--steps", type=positive_int, default=1000, help="of stage 3")
    add("--per-scene", type=positive_int, default=12, help="questions about each scene")
    add("--muon-lr", type=not_negative_float, help="Muon's learning rate, for matrices; 0: AdamW for all; default: 0.02, for "
        "stage 3 0.01")  # fmt: skip
    add("--eval-count", type=positive_int, default=300, help="test scenes of each kind, asked at the end")
    args = parser.parse_args(argv)
    if args.data or args.epochs:
        parser.error("scenes are made on the fly: --steps says how many; your own --data are for finetune_vlm.py")
    args.out = args.out or f"runs/vlm-scenes{'-blind' if args.blind else ''}"
    return args


# ---- data ------------------------------------------------------------------------------------------------------------


def training_batches(processor, grid: int, args, run: Run) -> tuple[PatchLabels, int, SceneBatches]:
    """Batches for stage 1, the scenes of one over all processes, and batches for the stages after it."""
    ranks = {"grad_accum": args.grad_accum, "rank": run.rank, "world_size": run.world_size}
    unit = run.world_size * args.grad_accum
    scenes = max(1, round(VISION_BATCH / unit)) * unit
    patches = PatchLabels(processor, scenes // run.world_size, args.seed, grid, **ranks)
    size = args.batch_size // run.world_size
    return patches, scenes, SceneBatches(processor, size, args.seed, args.per_scene, blind=args.blind, **ranks)


@cache
def test_questions(scenes: int) -> dict[str, list]:
    """Questions about so many ordinary scenes, and about so many with a pair that is in no training scene."""
    return {split: scene_items(split, scenes, seed=0) for split in ("test", "compositional")}


# ---- model -----------------------------------------------------------------------------------------------------------


def build(args):
    """The model and its processor."""
    pixels = rescale(make_scenes("train", 500, seed=args.seed).images)
    image_settings = {"image_mean": pixels.mean(dim=(0, 2, 3)).tolist(), "image_std": pixels.std(dim=(0, 2, 3)).tolist()}
    vision_settings, text_settings, vocabulary = SIZES[args.size]
    vision = SiglipVisionConfig(**vision_settings)
    if args.vision:
        vision = find_part(args.vision, "vision")
        image_settings = tower_image_settings(args.vision, vision)
    text, tokenizer = LLAMA32Config(**text_settings), train_tokenizer(corpus(), vocabulary)
    return assemble(vision, text, tokenizer, image_settings, args.seed, projector_type="linear")


class Learner(nn.Module):
    """What is trained: the model and, in stage 1, a linear probe, which tells from each patch's features what is in it."""

    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm
        self.probe = nn.Linear(vlm.config.vision_config.hidden_size, sum(LABELS))

    def forward(self, share=(1.0, 1.0, 1.0), patch_labels=None, **batch) -> torch.Tensor:
        """The loss of a part of a batch. share: see with_shares."""
        if patch_labels is None:
            return self.vlm(**batch)["loss"] * share[0]
        return scene_loss(self.probe(self.vlm.vision_features(batch["pixel_values"])), patch_labels, share)


def scene_loss(logits: torch.Tensor, labels: torch.Tensor, share=(1.0, 1.0, 1.0)) -> torch.Tensor:
    """logits [N, patches, sum(LABELS)] against digit, colour and place of each patch, or "nothing": labels int64 [N, 3,
    patches], see Scenes.dense_labels.

    No training scene shows the held-out pairs of digit and colour. From a digit's colour the tower could therefore learn which
    digit it is not, and would then miss these pairs in the test. So the digit of a pair is left out of the softmax wherever
    its colour is shown (the prior-adjusted loss of Menon et al. 2021, with a prior of 0).
    """
    labels = [label.flatten() for label in labels.unbind(dim=1)]
    never = torch.zeros(LABELS[1], LABELS[0], dtype=torch.bool, device=logits.device)
    for digit, colour in HELD_OUT:
        never[COLOURS.index(colour), digit] = True
    digits, *others = logits.flatten(0, 1).float().split(LABELS, dim=1)
    digits = digits.masked_fill(never[labels[1].clamp(min=0)], -1e4)
    read = zip(LABEL_WEIGHTS, share, (digits, *others), labels, strict=True)
    return sum(weight * part * F.cross_entropy(x, y, ignore_index=IGNORE) for weight, part, x, y in read)


# ---- stages ----------------------------------------------------------------------------------------------------------


def stages(args) -> dict[Stage, int]:
    """The stages of this run, and how many steps each has."""
    vision, projector, language = STAGES
    if args.blind or args.vision:
        return {projector: args.projector_steps, language: args.steps} if args.projector_steps else {language: args.steps}
    if not args.vision_steps:  # then the tower learns with the rest
        language = language._replace(parts=(language.parts[0], "vlm.vision_tower", language.parts[1]))
    steps = {vision: args.vision_steps, projector: args.projector_steps, language: args.steps}
    return {stage: count for stage, count in steps.items() if count}


def train_only(learner: Learner, stage: Stage, args) -> list[dict]:
    """Let the stage's parts train and nothing else; their groups for the optimizers."""
    learner.requires_grad_(False)
    muon_lr, groups = stage.muon_lr if args.muon_lr is None else args.muon_lr, []
    for part in stage.parts:
        module = learner.get_submodule(part).requires_grad_(True)
        groups += parameter_groups(module, args.weight_decay, args.lr, muon_lr)
    return groups


# ---- the recipe --------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    model, processor = build(args)
    spare_logits(model.language_model)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    run.print(f"scenes {run}; {', '.join(f'{name} {count:,}' for name, count in counts.items())} parameters")
    learner = run.place(Learner(model))
    patches, patch_batch_size, questions = training_batches(processor, model.vision_tower.grid[0], args, run)
    plan = stages(args)

    for stage, steps in plan.items():
        optimizers = make_optimizers(train_only(learner, stage, args))
        batches, size = (patches, patch_batch_size) if stage.name == "vision" else (questions, args.batch_size)
        seconds = args.max_seconds and args.max_seconds * stage.seconds / sum(each.seconds for each in plan)
        trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        run.print(f"stage {stage.name}: {stage.why}\n  {trained:,} parameters, {steps:,} steps of {size}")

        # ---- loop ----
        for step in run.steps(stage.name, steps, batches, optimizers, "samples", size, seconds):
            if stage.name == "language" and run.evaluates(step):
                with run.evaluation() as eval_learner:
                    evaluate(run, eval_learner.vlm, processor, most=QUICK)
            set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
            run.seed_step(step)
            for batch in run.parts(with_shares(run, next(batches))):
                with run.autocast():
                    loss = run.model(**batch)
                run.scaler.scale(loss).backward()
                run.loss += loss.detach()
            run.clip_and_step(optimizers, args.clip)

    # ---- what the run leaves ----
    if run.is_main and not args.dry_run:
        with run.evaluation() as eval_learner:
            found = evaluate(run, eval_learner.vlm, processor)
            leave_behind(run, eval_learner.vlm, processor, test_questions(args.eval_count), found, "scenes")
    run.finish()


def evaluate(run: Run, model, processor, most: int | None = None) -> dict[str, dict]:
    """Ask the (first) test questions of each split; what was found is in metrics.jsonl and returned."""
    tests, blind = test_questions(run.args.eval_count), run.args.blind
    found = {split: ask(model, processor, items[:most], blind, run.stop_if_asked) for split, items in tests.items()}
    run.log(**logged(found))
    return found


if __name__ == "__main__":
    run_cli(main)
