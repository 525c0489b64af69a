"""A run's figures, as they stand in metrics.jsonl, for TensorBoard and Weights & Biases as well.

    logs = open_logs(["tensorboard"], folder, settings, resumed=False)       # lib/metrics.py writes to them
    python train_vit.py --log tensorboard; tensorboard --logdir runs         # tensorboard --logdir runs in another terminal
    WANDB_MODE=offline python train_vit.py --log wandb                       # no network; later: wandb sync

Both packages are optional. samples.png follows at the end of a run.
"""

import importlib.util
import json
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from lib.files import one_line, read_text, write_atomic

LOGS = ("tensorboard", "wandb")


def check_installed(names: list[str]) -> None:
    """Raises ValueError for one whose package is missing."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb leaves behind, is no package
            raise ValueError(f"--log {name} needs a package that is not installed: pip install {name}")


def open_logs(names: list[str], folder: Path, settings: dict, resumed: bool) -> list:
    """What Metrics writes to: begin(rows that a resumed run keeps), write(row), finish(path of an image, step)."""
    kinds = {"tensorboard": TensorboardLog, "wandb": WandbLog}
    return [kinds[name](folder, settings, resumed) for name in dict.fromkeys(names)]


class TensorboardLog:
    """FOLDER/tensorboard. What a resumed run keeps is written anew, so that steps that come again stand there once."""

    def __init__(self, folder: Path, settings: dict, resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        for file in (folder / "tensorboard").glob("events.out.tfevents.*"):  # of this run, or of one that it replaces
            file.unlink()
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1, default=str)}\n```")

    def begin(self, rows: list[dict]) -> None:
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def finish(self, image: Path, step: int) -> None:
        if image.exists():
            with Image.open(image) as opened:
                self.writer.add_image(image.stem, np.asarray(opened.convert("RGB")), step, dataformats="HWC")
        self.writer.close()


class WandbLog:
    """A run in the project that $WANDB_PROJECT names, else "vlm-scratch". Its id stands in FOLDER/wandb-id, by which a resumed
    run continues it; steps that come again after a kill stand there twice. Raises ValueError where wandb cannot start."""

    def __init__(self, folder: Path, settings: dict, resumed: bool):
        import wandb

        known = folder / "wandb-id"
        name = read_text(known).strip() if resumed and known.exists() else uuid.uuid4().hex[:8]
        write_atomic(known, lambda temporary: temporary.write_text(name + "\n", encoding="utf-8"))
        about = {"id": name, "name": folder.name, "dir": str(folder), "resume": "allow", "config": settings}
        quiet = wandb.Settings(console="off")  # what the run prints is its own
        try:
            self.run = wandb.init(project=quiet.project or "vlm-scratch", settings=quiet, **about)
        except wandb.errors.Error as error:
            hint = "log in with `wandb login`, or set WANDB_MODE=offline, which needs no network"
            raise ValueError(f"--log wandb cannot start ({one_line(error)}): {hint}") from None
        self.run.define_metric("*", step_metric="step")  # wandb's own steps only ever rise
        self.image = wandb.Image

    def begin(self, rows: list[dict]) -> None:
        pass  # it has them already

    def write(self, row: dict) -> None:
        self.run.log(row)

    def finish(self, image: Path, step: int) -> None:
        if image.exists():
            self.run.log({"step": step, image.stem: self.image(str(image))})
        self.run.finish()
