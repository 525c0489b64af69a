"""What is in a file of conversations about images, and what is wrong with it, before it costs hours of training.

    python -m data.check train.json --images DIR                 # a report; exit code 1 if rows had to be left out
    python -m data.check 'shard-*.tar' --sheet out.png           # and ten rows with images, drawn
    python -m data.check train.json --model runs/vlm-own         # the longest row in the tokens of this model

FILE is whatever finetune_vlm.py takes as --data (data/row_files.py). The last line printed is one JSON object.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.images import decode_image
from data.llava import LlavaRow, LlavaRows, header_problem, noted, problem_lines
from data.packing import encode_sample
from data.row_files import is_streamed
from data.rows import open_streamed
from lib.cli import Parser, png_file, positive_int, run_cli
from lib.files import check_output, find_source, naming
from processing_mllama import IMAGE_TOKEN, MllamaImageProcessor

BYTES_A_TOKEN = 4  # of English in the vocabularies of GPT-2, LLaMA and Qwen, roughly


@dataclass
class Tally:
    """What the usable rows hold. drawn: some rows with images, each as likely as any other."""

    processor: MllamaImageProcessor | None
    most_drawn: int
    usable: int = 0
    with_images: int = 0
    images: int = 0
    questions: int = 0
    longest: tuple[int, int, int] = (0, 0, 0)  # tokens, the row's number, its images
    drawn: list[LlavaRow] = field(default_factory=list)

    def add(self, row: LlavaRow) -> None:
        self.usable += 1
        self.images += len(row.images)
        self.questions += sum(message["role"] == "assistant" for message in row.messages)
        self.longest = max(self.longest, (self.tokens(row), row.number, len(row.images)), key=lambda found: found[0])
        if row.images:
            self.with_images += 1
            place = random.Random(self.with_images).randrange(self.with_images)  # reservoir sampling (Vitter 1985)
            if len(self.drawn) < self.most_drawn:
                self.drawn.append(row)
            elif place < self.most_drawn:
                self.drawn[place] = row

    def tokens(self, row: LlavaRow) -> int:
        if self.processor:
            return len(encode_sample(self.processor, row.conversations, self.processor.tilings(row.images)))
        return sum(len(message["content"].replace(IMAGE_TOKEN, "").encode()) for message in row.messages) // BYTES_A_TOKEN

    def __str__(self) -> str:
        tokens, number, images = self.longest
        beside = f"{images} image" + "s" * (images != 1)
        size = f"{tokens:,} tokens" if self.processor else f"about {tokens:,} tokens of text and {beside}"
        return (
            f"{self.with_images:,} rows have images, {self.images:,} in all; {self.questions:,} questions; the longest row, "
            f"{number:,}, has {size}"
        )


def streamed_rows(source: str, images_dir: Path | None, problems: list, notes: Counter, progress: bool) -> Iterator[LlavaRow]:
    """The usable rows of shards or tables, one by one. problems: gains what is wrong with the others; notes: see read_row."""
    stream, lost = open_streamed(source, images_dir, progress=progress), {}
    problems += [(f"file {name}", what) for name, what in stream.problems]
    for row in tqdm(stream.read(range(len(stream)), lost, notes), "checking", len(stream), unit=" rows", disable=not progress):
        bad = next(((image, what) for image in row.images if (what := header_problem(image.data))), None) if row else None
        if row is None:
            problems.append(next(reversed(lost.items())))
        elif bad:
            problems.append((bad[0].name, f"image {bad[1]}"))
        else:
            yield row


def draw_sheet(rows: list[LlavaRow], path: Path) -> str:
    """The first image of each row, with its first question and answer; what to say of it."""
    from lib import figures
    from lib.vlm_report import image_tensor

    images, questions, answers = [], [], []
    for row in rows:
        image = row.images[0]
        try:
            picture = decode_image(image if isinstance(image, Path) else image.data)
        except (ValueError, OSError):
            continue
        picture.thumbnail((400, 400))
        images.append(image_tensor(picture))
        asked, said = (next(m["content"] for m in row.messages if m["role"] == role) for role in ("user", "assistant"))
        questions.append(f"row {row.number}: {asked.replace(IMAGE_TOKEN, '').strip()}")
        answers.append(said)
    figures.answer_sheet(images, questions, answers, [None] * len(images), path, "rows drawn at random", columns=5)
    return f"{len(images)} rows are drawn in {path}"


def is_figure(path: str) -> bool:
    """Whether a PNG says that matplotlib has made it, as those say that are drawn here."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software", "").startswith("Matplotlib")
    except (OSError, SyntaxError):
        return False


def find_processor(source: str | None) -> MllamaImageProcessor | None:
    """Of a vision-language model, to count tokens with."""
    return None if source is None else MllamaImageProcessor.from_pretrained(find_source(source))


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a file or folder of rows, or shards or tables as 'DIR/x-*.tar'")
    parser.add_argument("--images", metavar="DIR", type=Path, help="default: the file's own folder, or its images/")
    parser.add_argument("--sheet", metavar="FILE.png", type=png_file, help="draw some rows with images there")
    parser.add_argument("--samples", type=positive_int, default=10, help="how many")
    parser.add_argument("--model", metavar="SOURCE", help="count tokens as this vision-language model does")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.sheet:
        check_output("--sheet", args.sheet, [args.file])
    tally, progress = Tally(find_processor(args.model), args.samples), sys.stderr.isatty()
    if is_streamed(args.file):
        if args.sheet and Path(args.sheet).exists() and not is_figure(args.sheet):  # streamed rows name no image
            raise ValueError(f"--sheet {args.sheet} is there already, and may be one of the images: name a new file")
        problems, notes = [], Counter()
        for row in streamed_rows(args.file, args.images, problems, notes, progress):
            tally.add(row)
        if not tally.usable:
            first = "; the first, {}: {}".format(*problems[0]) if problems else ""
            raise ValueError(f"{args.file}: no row is usable{first}")
        total = tally.usable + len(problems)
        lines = [f"{args.file}: {total:,} rows, {tally.usable:,} usable", *problem_lines("{}: {}", problems), *noted(notes)]
    else:
        rows = LlavaRows.read(args.file, args.images, progress)
        if args.sheet:
            check_output("--sheet", args.sheet, (image for row in rows for image in row.images))
        for row in rows:
            tally.add(row)
        total, problems, lines = rows.total, rows.problems, [rows.report()]
    print("\n".join(lines))
    print(tally)
    if args.sheet:
        with naming("--sheet", args.sheet):
            print(draw_sheet(tally.drawn, args.sheet))
    found = {"rows_usable": tally.usable, "rows_with_images": tally.with_images, "questions": tally.questions}
    print(json.dumps({"rows": total, **found, "images": tally.images, "longest_row_tokens": tally.longest[0]}))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run_cli(main)
