"""Train a Vision Transformer (vit_scratch.py) to classify pictures: the block of a language model, learning to see.

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
from pathlib import Path

import torch
import torch.nn.functional as F

from data.augment import PRESETS as AUGMENTATIONS
from data.augment import Augment, normalize_images
from data.batches import Batches
from data.datasets import DATASETS, ImageDataset, evenly, load_images
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.files import write_json
from lib.image_settings import write_image_settings
from lib.run import Run, Trainer, argument_parser, fraction, not_negative_int, parameter_groups, positive_int, run_cli
from vit_scratch import ViTConfig, ViTModel, pair

# ---- settings --------------------------------------------------------------------------------------------------------

# Per data set: what its pictures ask of the model and of the schedule. Every value has a flag that replaces it.
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
    add("--drop-path", type=fraction, default=0.1, help="chance to skip a branch of the last block")
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


# ---- data ------------------------------------------------------------------------------------------------------------


def load_data(args, run: Run) -> tuple[ImageDataset, ImageDataset]:
    with run.main_first():  # what it downloads and decodes
        train, test = load_images(args.dataset, args.data, args.image_size, args.split_seed, run.is_main, args.workers)
    if words := train.describe_skipped():
        run.print(words)
    if train.images.nbytes + test.images.nbytes < 2**30:  # then a GPU can hold them, and no batch need be copied to it
        for part in (train, test):
            part.images, part.labels = part.images.to(run.device), part.labels.to(run.device)
    return train, test


# ---- evaluation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: ViTModel, dataset: ImageDataset, mean, std, run: Run) -> torch.Tensor:
    """Probabilities [N, K] for every picture of a data set."""
    rows = []
    for images in dataset.images.split(500):
        with run.autocast():
            logits = model(normalize_images(images.to(run.device), mean, std))
        rows.append(logits.float().softmax(dim=-1).cpu())
    return torch.cat(rows)


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return (probabilities.argmax(dim=1) == labels.cpu()).float().mean().item()


def draw(folder: Path, model: ViTModel, test: ImageDataset, probabilities: torch.Tensor, rows: list[dict]) -> None:
    """The pictures of a finished run."""
    labels, images = test.labels.cpu(), test.images.cpu()
    confidence, said = probabilities.max(dim=1)
    right = said == labels

    def sheet(chosen: torch.Tensor, name: str, title: str) -> None:
        captions = [
            f"{test.classes[said[i]]} {confidence[i]:.0%}" + ("" if right[i] else f"\nis {test.classes[labels[i]]}")
            for i in chosen.tolist()
        ]
        figures.sheet(images[chosen], captions, folder / name, title, good=right[chosen].tolist())

    sheet(evenly(len(test), 32), "samples.png", "what it saw, what it said")
    wrong = (~right).nonzero()[:, 0]
    sheet(wrong[confidence[wrong].argsort(descending=True)][:32], "mistakes.png", "the most confident mistakes")
    K = len(test.classes)
    matrix = torch.bincount(labels * K + said, minlength=K * K).view(K, K)
    figures.confusion(matrix, test.classes, folder / "confusion.png")
    figures.patch_filters(model.embeddings.projection.weight, folder / "filters.png")
    figures.curves(rows, folder / "curves.png")


# ---- the recipe --------------------------------------------------------------------------------------------------------


def main(argv=None) -> None:
    args = parse_args(argv)
    run = Run(args)
    train, test = load_data(args, run)
    mean, std = train.mean_std()
    augment = Augment(AUGMENTATIONS[args.augment], mean, std)
    K = len(train.classes)

    size = tuple(train.images.shape[-2:])
    config = ViTConfig(
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=args.patch_size or default_patch(size),
        num_channels=train.images.shape[1],
        num_labels=K,
        **{key: getattr(args, key) for key in (*SIZES["tiny"], "dropout", "drop_path", "pooling")},
        position_init="sincos",
    )
    torch.manual_seed(args.seed)
    model = run.place(ViTModel(config))

    batches = Batches(len(train), args.batch_size // run.world_size, args.seed, rank=run.rank, world_size=run.world_size)
    total_steps = max(1, round(args.epochs * len(batches)))
    trainer = Trainer(run, model, total_steps, parameter_groups(model, args.weight_decay, args.lr), batches)
    parameters = sum(p.numel() for p in model.parameters())
    run.print(
        f"{args.dataset}: {len(train):,} training and {len(test):,} test pictures of {size[0]}x{size[1]}, {K} classes\n"
        f"ViT: {parameters:,} parameters, {config.grid[0]}x{config.grid[1]} patches of {pair(config.patch_size)[0]} pixels\n"
        f"{total_steps:,} steps of {args.batch_size} pictures, learning rate {args.lr:g}, {run}"
    )

    def losses(step: int):
        generator = run.seed_step(step)
        for images, targets in augment.parts(train, next(batches), args.grad_accum, generator):
            with run.autocast():
                yield F.cross_entropy(trainer.model(images), targets)

    model.train()
    while not trainer.done():
        trainer.step(losses(trainer.steps_done))
        if trainer.evaluates():
            with trainer.evaluation() as whole:
                trainer.log(test_accuracy=accuracy(predict(whole, test, mean, std, run), test.labels))
    trainer.close()

    # ---- what the run leaves ----
    if run.is_main and not args.dry_run:
        with trainer.evaluation() as whole:
            probabilities = predict(whole, test, mean, std, run)
            test_accuracy = accuracy(probabilities, test.labels)
            trainer.log(test_accuracy=test_accuracy)
            save_run(run.folder, whole, train, mean, std, args)
            draw(run.folder, whole, test, probabilities, trainer.metrics.read())
        images_seen = trainer.steps_done * args.batch_size
        result = {
            "test_accuracy": round(test_accuracy, 4),
            "seconds": round(trainer.seconds, 1),
            "images_per_second": round(images_seen / trainer.seconds, 1),
            "parameters": parameters,
            "steps": trainer.steps_done,
            "seed": args.seed,
            "run": str(run.folder),
        }
        print(json.dumps(result))
    run.barrier()


def default_patch(size: tuple[int, int]) -> int:
    """The largest published patch that cuts the picture into at least 8x8 pieces; else the largest that divides at all."""
    fits = [p for p in (32, 16, 14, 8, 7, 4, 2, 1) if size[0] % p == 0 and size[1] % p == 0]
    return next((p for p in fits if min(size) // p >= 8), fits[-1])


def save_run(folder: Path, model: ViTModel, train: ImageDataset, mean, std, args) -> None:
    """The model as a published checkpoint folder, with what transformers' image processor needs to know."""
    labels = {str(i): name for i, name in enumerate(train.classes)}
    save_pretrained(model, folder, id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    write_image_settings(folder, pair(model.config.image_size), mean, std, image_processor_type="ViTImageProcessor")
    write_json(folder / "settings.json", vars(args))
    from_pretrained(folder)  # what was written can be read


if __name__ == "__main__":
    run_cli(main)
