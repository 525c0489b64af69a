"""What the recipes of image classifiers share: data, accuracy, a patch size that fits, figures, a published folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from data.augment import normalize_images
from data.datasets import ImageDataset, evenly, load_images
from lib import figures
from lib.checkpoint import from_pretrained, save_pretrained
from lib.files import write_json
from lib.image_settings import write_classifier_settings
from lib.run import Run
from vit_scratch import ViTModel, pair


def load_data(args, run: Run) -> tuple[ImageDataset, ImageDataset]:
    """(train, test); on the device where they are small, so that no batch need be copied to it."""
    with run.main_first():  # what it downloads and decodes
        train, test = load_images(args.dataset, args.data, args.image_size, args.split_seed, run.is_main, args.workers)
    if len(train.classes) < 2:
        raise ValueError(f"--data {args.data} has the one class {train.classes[0]}: as class/*.jpg, or with train/ for test/, "
                         "there are two or more")  # fmt: skip
    run.compare_data(classes=train.classes)
    if words := train.describe_skipped():
        run.print(words)
    if train.images.nbytes + test.images.nbytes < 2**30:
        for part in (train, test):
            part.images, part.labels = part.images.to(run.device), part.labels.to(run.device)
    return train, test


def default_patch(size: tuple[int, int]) -> int:
    """The largest published patch that cuts the image into at least 8x8 pieces; else the largest that divides at all."""
    fits = [p for p in (32, 16, 14, 8, 7, 4, 2, 1) if size[0] % p == 0 and size[1] % p == 0]
    return next((p for p in fits if min(size) // p >= 8), fits[-1])


def predict(model: Callable[[torch.Tensor], torch.Tensor], dataset: ImageDataset, mean, std, run: Run) -> torch.Tensor:
    """Probabilities [N, K] for every image of a data set, from what model(images [B, C, H, W]) says: logits [B, K]."""
    rows = []
    for images in dataset.images.split(500):
        with run.autocast():
            logits = model(normalize_images(images.to(run.device), mean, std))
        if not logits.isfinite().all():
            raise FloatingPointError("the model's outputs are not finite: try a lower --lr or --weight-decay")
        rows.append(logits.float().softmax(dim=-1).cpu())
        run.stop_if_asked()
    return torch.cat(rows)


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return (probabilities.argmax(dim=1) == labels.cpu()).float().mean().item()


def draw_answers(folder: Path, test: ImageDataset, probabilities: torch.Tensor, rows: list[dict]) -> None:
    """curves.png, samples.png, mistakes.png, confusion.png of a finished run. rows: of metrics.jsonl."""
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
    figures.curves(rows, folder / "curves.png")


def save_classifier(folder: Path, model: ViTModel, classes: list[str], mean, std, settings: dict) -> None:
    """A published checkpoint folder, with what transformers' image processor needs to know."""
    model.config = replace(model.config, id2label=dict(enumerate(classes)))
    save_pretrained(model, folder)
    write_classifier_settings(folder, pair(model.config.image_size), mean, std)
    write_json(folder / "settings.json", settings)
    from_pretrained(folder)  # what was written can be read
