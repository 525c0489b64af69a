"""What is wrong with a file of LLaVA-style JSON, before it costs hours of training.

    python -m data.check train.json --images DIR        # a report; exit code 1 if rows had to be dropped
"""

import argparse
import sys
from pathlib import Path

from data.llava import LlavaRows
from lib.cli import run_cli


def parse_args(argv=None) -> argparse.Namespace:
    description, style = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", type=Path, help=".json, or .jsonl with a row a line")
    parser.add_argument("--images", metavar="DIR", type=Path, help="default: the file's own folder, or its images/")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    rows = LlavaRows.read(args.file, args.images, progress=sys.stderr.isatty())
    print(rows.report())
    sys.exit(1 if rows.problems else 0)


if __name__ == "__main__":
    run_cli(main)
