"""Train a Vision Transformer (vit_scratch.py) to classify images: the block of a language model, learning to see.

    python train_vit.py                                              handwritten digits, two minutes on a laptop CPU
    python train_vit.py --dataset mnist --data DIR
    python train_vit.py --dataset cifar10 --size medium              for a GPU: plain ViT, strong augmentation, 200 epochs
    python train_vit.py --dataset cifar10 --size small --patch-size 8 --augment light --max-seconds 600       for a CPU
    python train_vit.py --dataset folder --data photos.tar.gz        class/*.jpg, or train/ and test/ with such folders
    python train_vit.py --out runs/vit-digits --resume               go on after Ctrl-C, exactly

Writes runs/vit-DATASET/: the model (config.json, model.safetensors; with --pooling cls transformers opens it as it is),
metrics.jsonl, curves.png, samples.png, mistakes.png, confusion.png, filters.png. The last line printed is JSON.
"""

import json

import torch
import torch.nn.functional as F

from data.augment import PRESETS as AUGMENTATIONS
from data.augment import Augment
from data.batches import Batches, fit_batch_size
from data.datasets import DATASETS
from lib import figures
from lib.checks import checked_flags
from lib.classification import accuracy, default_patch, draw_answers, load_data, predict, save_classifier
from lib.cli import argument_parser, fraction, not_negative_int, positive_int, run_cli
from lib.optim import cosine_schedule, make_optimizers, parameter_groups, set_learning_rate
from lib.run import Run
from vit_scratch import ViTConfig, ViTModel, pair

# ---- settings --------------------------------------------------------------------------------------------------------

# Per data set: what its images ask of the model and of the schedule. Every value has a flag that replaces it.
RECIPES = {
    "digits": {"image_size": 16, "patch_size": 4, "epochs": 60, "lr": 1e-3},  # 8x8 pixels, enlarged once
    "mnist": {"image_size": 28, "patch_size": 7, "epochs": 4, "lr": 1e-3},
    "fashion-mnist": {"image_size": 28, "patch_size": 7, "epochs": 4, "lr": 1e-3},
    "cifar10": {"image_size": 32, "patch_size": 4, "epochs": 200, "lr": 1e-3},
    "folder": {"image_size": None, "patch_size": None, "epochs": 30, "lr": 1e-3},
}
# The one dial: width, depth, heads.
SIZES = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6},
    "medium": {"hidden_size": 384, "num_hidden_layers": 7, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def parse_args(argv=None):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="digits")
    add("--size", choices=list(SIZES), default="tiny", help="width and depth of the model")
    add("--image-size", type=positive_int, help="pixels; default the data set's own")
    add("--patch-size", type=positive_int, help="pixels; default depends on the data set")
    add("--hidden-size", type=positive_int, help="in place of --size's")
    add("--layers", type=positive_int, dest="num_hidden_layers", help="in place of --size's")
    add("--heads", type=positive_int, dest="num_attention_heads", help="in place of --size's")
    add("--dropout", type=fraction, default=0.0)
    add("--drop-path", type=fraction, default=0.1, help="chance to skip one half of the last block")
    add("--pooling", choices=["cls", "mean"], default="mean", help="what the classifier reads")
    add("--split-seed", type=not_negative_int, default=0, help="another test part, where the data come without one")
    add("--augment", choices=list(AUGMENTATIONS), help="default: made for the data set")
    args = parser.parse_args(argv)
    for key, value in {**RECIPES[args.dataset], **SIZES[args.size]}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.augment = args.augment or args.dataset
    args.out = args.out or f"runs/vit-{args.dataset}"
    return args


def build(args, train) -> ViTModel:
    """A model for the images and classes of the training data."""
    size = tuple(train.images.shape[-2:])
    config = checked_flags(
        args,
        ViTConfig,
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=args.patch_size or default_patch(size),
        num_channels=train.images.shape[1],
        num_labels=len(train.classes),
        **{key: getattr(args, key) for key in (*SIZES["tiny"], "dropout", "drop_path", "pooling")},
        position_init="sincos",
    )
    torch.manual_seed(args.seed)
    return ViTModel(config)


# ---- the recipe --------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)

    # ---- data ----
    train, test = load_data(args, run)
    fit_batch_size(run, len(train), "images")
    mean, std = train.mean_std()
    augment = Augment(AUGMENTATIONS[args.augment], mean, std)
    batches = Batches(len(train), args.batch_size // run.world_size, args.seed, rank=run.rank, world_size=run.world_size)

    # ---- model, optimiser ----
    model = run.place(build(args, train))
    (H, W), grid, patch = model.image_size, model.grid, pair(model.config.patch_size)[0]
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(parameter_groups(model, args.weight_decay, args.lr))
    total_steps = max(1, round(args.epochs * len(batches)))

    run.print(
        f"{args.dataset}: {len(train):,} training and {len(test):,} test images of {H}x{W}, {len(train.classes)} classes\n"
        f"ViT: {parameters:,} parameters, {grid[0]}x{grid[1]} patches of {patch} pixels\n"
        f"{total_steps:,} steps of {args.batch_size} images, learning rate {args.lr:g}, {run}"
    )

    # ---- loop ----
    for step in run.steps("", total_steps, batches, optimizers):
        if run.evaluates(step):
            with run.evaluation() as eval_model:
                run.log(test_accuracy=accuracy(predict(eval_model, test, mean, std, run), test.labels))
        set_learning_rate(optimizers, cosine_schedule(run.progress, args.warmup))
        generator = run.seed_step(step)
        for images, targets in run.parts(augment.parts(train, next(batches), args.grad_accum, generator)):
            with run.autocast():
                loss = F.cross_entropy(run.model(images), targets) / args.grad_accum
            run.scaler.scale(loss).backward()
            run.loss += loss.detach()
        run.clip_and_step(optimizers, args.clip)

    # ---- evaluation, and what the run leaves ----
    if run.is_main and not args.dry_run:
        with run.evaluation() as eval_model:
            probabilities = predict(eval_model, test, mean, std, run)
            test_accuracy = accuracy(probabilities, test.labels)
            run.log(test_accuracy=test_accuracy)
            save_classifier(run.folder, eval_model, train.classes, mean, std, vars(args))
            draw_answers(run.folder, test, probabilities, run.metrics.read())
            figures.patch_filters(eval_model.embeddings.projection.weight, run.folder / "filters.png")
        result = {
            "test_accuracy": round(test_accuracy, 4),
            "seconds": round(run.seconds, 1),
            "images_per_second": round(run.steps_done * args.batch_size / run.seconds, 1),
            "parameters": parameters,
            "steps": run.steps_done,
            "seed": args.seed,
            "run": str(run.folder),
        }
        print(json.dumps(result))
    run.finish()


if __name__ == "__main__":
    run_cli(main)
