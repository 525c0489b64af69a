"""A sheet of twelve scenes, with three questions and their answers beside each.

    python -m data.show_scenes scenes.png --split test
"""

import textwrap
from pathlib import Path

from data.scenes import KINDS, SPLITS, make_scenes, questions
from lib import figures
from lib.cli import Parser, not_negative_int, png_file, run_cli
from lib.figures.common import new_figure


def show_scenes(path: str | Path, split: str, seed: int = 0, count: int = 12, per_scene: int = 3) -> None:
    scenes, columns = make_scenes(split, count, seed), 4
    figure = new_figure(figsize=(4.2 * columns, 1.75 * -(-count // columns) + 0.4), layout="constrained")
    figure.suptitle(f"{split} scenes, seed {seed}")
    for i, turns in enumerate(questions(scenes, seed, per_scene, dict.fromkeys(KINDS, 1))):
        axes = figure.add_subplot(-(-count // columns), columns, i + 1, anchor="W")
        axes.imshow(scenes.images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
        row = 0.0
        for turn in turns:
            for text, color in ((turn.question, "black"), (textwrap.fill(turn.answer, 38), figures.BLUE)):
                axes.text(1.05, 1 - row / 11, text, transform=axes.transAxes, va="top", fontsize=8, color=color)
                row += 1 + text.count("\n")
            row += 0.5
    figures.finish(figure, path)


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE.png", type=png_file)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=not_negative_int, default=0)
    args = parser.parse_args(argv)
    show_scenes(args.file, args.split, args.seed)
    print(args.file)


if __name__ == "__main__":
    run_cli(main)
