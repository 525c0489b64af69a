"""Data sets as they come, into LLaVA-style JSON: FOLDER/train.json, test.json and images/.

    python -m data.convert easy-vqa easy_vqa.tar FOLDER
    python -m data.convert coco-captions coco_captions_permissive.tar FOLDER
    python -m data.convert captions SOURCE FOLDER            # Flickr's, COCO's and others: see data/captions.py
    python -m data.convert mirrored flickr8k/train.json FOLDER   # photos with captions, and each photo once more in a mirror
    python -m data.convert classes photos.zip FOLDER         # class/*.jpg, each answered with "A photo of a CLASS."
    python -m data.convert digits FOLDER                     # train_vit.py's handwritten digits: "What digit is this?", "seven"
    python -m data.convert scenes FOLDER --split test --count 200      # of data/scenes.py, into FOLDER/scenes.json and images/

Sources are archives or folders. FOLDER appears when all of it is written, or not at all.
"""

import argparse
import collections
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from data.archives import content_reader, open_archive
from data.captions import convert_captions, convert_mirrored
from data.datasets import load_images
from data.folders import arrange
from data.row_files import parsed_file, write_rows
from data.row_values import kind_of
from data.scenes import MIX, SPLITS, make_scenes, questions
from lib.cli import Parser, not_negative_int, positive_int, run_cli
from lib.files import new_folder, write_json
from processing_mllama import IMAGE_TOKEN

DIGIT_WORDS = "zero one two three four five six seven eight nine".split()


@contextmanager
def data_source(source: Path, wanted: str) -> Iterator[tuple[str, list[str], Callable[[str], bytes]]]:
    """A folder or archive as (prefix, names, read), where prefix + wanted is a file in it, however deep. What is read is
    returned, never unpacked: nothing in an archive chooses where it is written. Raises ValueError, FileNotFoundError."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name the data set's archive or folder")
    with open_archive(source) as (sizes, read):
        found = [name.removesuffix(wanted) for name in sizes if f"/{name}".endswith(f"/{wanted}")]
        if not found:
            raise ValueError(f"{source} has no {wanted}: is it this data set?")
        yield min(found, key=len), list(sizes), content_reader(source, sizes, read)


def rows_of(name: str, data: bytes, good: Callable[[object], bool], wanted: str) -> list:
    """The rows of a data set's own JSON. Raises ValueError for the first that is not as wanted."""
    rows = parsed_file(name, data)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} is {kind_of(rows)}: a list of rows was expected")
    for number, row in enumerate(rows, start=1):
        if not good(row):
            raise ValueError(f"{name}, row {number} is not {wanted}")
    return rows


def row_about_image(name: str, image: str, turns: Sequence[tuple[str, str, str]]) -> dict:
    """A row from (question, answer, kind) about one image."""
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn[:2], strict=True)]
    said[0]["value"] = f"{IMAGE_TOKEN}\n{said[0]['value']}"
    return {"id": name, "image": image, "conversations": said, "kinds": [kind for *_, kind in turns]}


def easy_vqa_kind(question: str) -> str:
    """colour and shape ask for a word; exists ("is there a ...?") and absent ("is there not a ...?") for yes or no."""
    if question.startswith("what"):
        return "colour" if re.search(r"\bcolou?r\b", question) else "shape"
    return "absent" if re.search(r"\b(no|not)\b", question) else "exists"


def convert_easy_vqa(source: Path, folder: Path) -> str:
    """easy-VQA (Zhou 2019, MIT), 5,000 drawings of one shape each: one row per image, all its questions as turns."""

    def good(row) -> bool:
        return isinstance(row, list) and list(map(type, row)) == [str, str, int] and all(row[:2])

    counts = []
    with data_source(source, "train/questions.json") as (prefix, names, read), new_folder(folder) as whole:
        for part in ("train", "test"):
            name = f"{prefix}{part}/questions.json"
            turns: dict[int, list] = {}
            for question, answer, number in rows_of(name, read(name), good, "[question, answer, number of the image]"):
                turns.setdefault(number, []).append((question, answer, easy_vqa_kind(question)))
            (whole / "images" / part).mkdir(parents=True)
            rows = []
            for number in sorted(turns):
                image = f"{part}/{number}.png"
                (whole / "images" / image).write_bytes(read(f"{prefix}{part}/images/{number}.png"))
                rows.append(row_about_image(f"{part}-{number}", image, turns[number]))
            write_rows(whole / f"{part}.json", rows)
            counts.append(f"{len(rows):,} {part} images with {sum(map(len, turns.values())):,} questions")
        for licence in [name for name in names if Path(name).name == "LICENSE"][:1]:  # which asks to be passed on
            (whole / "LICENSE").write_bytes(read(licence))
    return f"{folder}: {', '.join(counts)}"


def convert_coco_captions(source: Path, folder: Path, test_photos: int = 16, seed: int = 0, row_per: str = "caption") -> str:
    """COCO 2017 photos (Lin et al. 2014), those whose licences let them be passed on, split by photo: one row per caption; with
    row_per "photo" a training row has all captions of its photo, as turns for finetune_vlm.py --isolated, which then reads the
    photo once for all of them.

    FOLDER/credits.json has the licence and the origin of each photo.
    """
    texts = {"file_name", "license", "flickr_url"}

    def good(row) -> bool:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) and row[key] for key in texts):
            return False
        captions, name = row.get("captions"), row["file_name"]
        # A bare name, on any system: it decides where the photo is written.
        return bool(re.fullmatch(r"\w[\w.-]*", name)) and isinstance(captions, list) and bool(captions) and all(
            isinstance(caption, str) and caption.strip() for caption in captions
        )  # fmt: skip

    with data_source(source, "annotations.json") as (prefix, _, read), new_folder(folder) as whole:
        name = f"{prefix}annotations.json"
        wanted = 'a photo with "file_name", "license", "flickr_url" and "captions"'
        photos = sorted(rows_of(name, read(name), good, wanted), key=lambda photo: photo["file_name"])
        if not test_photos < len({photo["file_name"] for photo in photos}) == len(photos):
            raise ValueError(f"{test_photos} test photos cannot be held out of {len(photos)} different ones: ask for fewer")
        test = set(np.random.RandomState(seed).permutation(len(photos))[:test_photos].tolist())
        (whole / "images").mkdir()
        rows, said = {"train": [], "test": []}, collections.Counter()
        for k, photo in enumerate(photos):
            file = photo["file_name"]
            (whole / "images" / file).write_bytes(read(f"{prefix}images/{file}"))
            turns = [("Describe the picture.", " ".join(caption.split()), "caption") for caption in photo["captions"]]
            part = "test" if k in test else "train"
            said[part] += len(turns)
            if row_per == "photo" and part == "train":
                rows[part].append(row_about_image(Path(file).stem, file, turns))
            else:
                rows[part] += [row_about_image(f"{Path(file).stem}-{i}", file, [turn]) for i, turn in enumerate(turns)]
        for part, found in rows.items():
            write_rows(whole / f"{part}.json", found)
        credit = {photo["file_name"]: {"license": photo["license"], "source": photo["flickr_url"]} for photo in photos}
        write_json(whole / "credits.json", credit)
    counts = f"{len(photos) - test_photos} train photos with {said['train']} captions"
    return f"{folder}: {counts}, {test_photos} test photos with {said['test']}"


def convert_classes(source: Path, folder: Path, per_class: int | None, question: str, caption: str) -> str:
    """A folder or archive of class/*.jpg (see data/folders.py), a row per image: the first per_class of each class and part.

    caption: what is answered, {} being the class. Where no part is held out, a tenth of each class is.
    """
    if "{}" not in caption:
        raise ValueError(f"--caption {caption!r} has no {{}} where the class comes in")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name an archive or folder of classes")
    rows, counts = {"train": [], "test": []}, collections.Counter()
    with open_archive(source) as (sizes, read), new_folder(folder) as whole:
        (whole / "images").mkdir()
        content = content_reader(source, sizes, read)
        for name, part, label in arrange(sizes, split_seed=0).files:
            counts[part, label] += 1
            if per_class and counts[part, label] > per_class:
                continue
            image = f"{part}-{len(rows[part])}{re.sub(r'[^.a-z0-9]', '', Path(name).suffix.lower())}"
            (whole / "images" / image).write_bytes(content(name))
            answer = caption.replace("{}", label.replace("_", " "))
            rows[part].append(row_about_image(f"{part}-{len(rows[part])}", image, [(question, answer, "class")]))
        if not all(rows.values()):
            found = f"{len(rows['train'])} training and {len(rows['test'])} test images"
            raise ValueError(f"{source} has {found} in class folders: lay them out as class/image.jpg")
        for part, found in rows.items():
            write_rows(whole / f"{part}.json", found)
    classes = len({label for _, label in counts})
    return f"{folder}: {len(rows['train']):,} train and {len(rows['test']):,} test images of {classes} classes"


def convert_digits(folder: Path, size: int = 16, split_seed: int = 0) -> str:
    """The handwritten digits that train_vit.py learns, of size x size pixels and in the same split, a row per image, named in
    words."""
    with new_folder(folder) as whole:
        (whole / "images").mkdir()
        counts = []
        for part, dataset in zip(("train", "test"), load_images("digits", image_size=size, split_seed=split_seed), strict=True):
            rows = []
            for number, (image, label) in enumerate(zip(dataset.images, dataset.labels.tolist(), strict=True)):
                name = f"{part}-{number}"
                Image.fromarray(image[0].numpy()).save(whole / "images" / f"{name}.png")
                turn = "What digit is this?", DIGIT_WORDS[label], "digit"
                rows.append(row_about_image(name, f"{name}.png", [turn]))
            write_rows(whole / f"{part}.json", rows)
            counts.append(f"{len(rows):,} {part}")
    return f"{folder}: {' and '.join(counts)} images of digits"


def convert_scenes(
    folder: Path, split: str, count: int, seed: int = 0, per_scene: int = 12, mix: Mapping[str, float] = MIX
) -> str:
    """Generated scenes and questions about them, a row per scene."""
    scenes = make_scenes(split, count, seed)
    with new_folder(folder) as whole:
        (whole / "images").mkdir()
        rows = []
        for number, (image, turns) in enumerate(zip(scenes.images, questions(scenes, seed, per_scene, mix), strict=True)):
            name = f"{split}-{seed}-{number:06d}"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(whole / "images" / f"{name}.png")
            rows.append(row_about_image(name, f"{name}.png", [(turn.question, turn.answer, turn.kind) for turn in turns]))
        write_rows(whole / "scenes.json", rows)
    return f"{folder}: {count} scenes, {sum(len(row['kinds']) for row in rows)} questions"


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    easy = commands.add_parser("easy-vqa", help="convert easy-VQA")
    coco = commands.add_parser("coco-captions", help="convert captioned COCO photos")
    captions = commands.add_parser("captions", help="all captions of a photo in one row")
    mirrored = commands.add_parser("mirrored", help="photos with captions, and each photo once more in a mirror")
    mirrored.add_argument("source", metavar="FILE.json", type=Path, help="rows of image and captions")
    mirrored.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    mirrored.add_argument("--images", metavar="DIR", type=Path, help="default: images/ beside FILE.json")
    classes = commands.add_parser("classes", help="convert images in class folders")
    for command in (easy, coco, captions, classes):
        sort = "; or a file of captions" if command is captions else ""
        command.add_argument("source", metavar="SOURCE", type=Path, help=f"an archive or a folder{sort}")
        command.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    digits = commands.add_parser("digits", help="handwritten digits as PNGs")
    digits.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    digits.add_argument("--size", type=positive_int, default=16, help="pixels of a side (default 16, as train_vit.py has them)")
    scenes = commands.add_parser("scenes", help="generated scenes as PNGs, with their questions")
    scenes.add_argument("folder", metavar="FOLDER", type=Path, help="to be made")
    scenes.add_argument("--count", type=positive_int, default=200, help="scenes (default 200)")
    scenes.add_argument("--per-scene", type=positive_int, default=12, help="questions about each, at most (default 12)")
    scenes.add_argument("--split", choices=SPLITS, default="train")
    scenes.add_argument("--seed", type=not_negative_int, default=0)
    coco.add_argument("--test-photos", type=positive_int, default=16, help="photos held out (default 16)")
    coco.add_argument("--seed", type=not_negative_int, default=0, help="which (default 0)")
    rows = "of training rows; photo: all its captions as turns, for finetune_vlm.py --isolated (default: caption)"
    coco.add_argument("--row-per", choices=("caption", "photo"), default="caption", help=rows)
    classes.add_argument("--per-class", type=positive_int, help="most images of a class, in each part; default: all")
    classes.add_argument("--question", default="Describe the picture.")
    classes.add_argument("--caption", default="A photo of a {}.", help="the answer, {} being the class")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.command == "easy-vqa":
        print(convert_easy_vqa(args.source, args.folder))
    elif args.command == "captions":
        print(convert_captions(args.source, args.folder))
    elif args.command == "mirrored":
        print(convert_mirrored(args.source, args.folder, args.images or args.source.parent / "images"))
    elif args.command == "digits":
        print(convert_digits(args.folder, args.size))
    elif args.command == "scenes":
        print(convert_scenes(args.folder, args.split, args.count, args.seed, args.per_scene))
    elif args.command == "classes":
        print(convert_classes(args.source, args.folder, args.per_class, args.question, args.caption))
    else:
        print(convert_coco_captions(args.source, args.folder, args.test_photos, args.seed, args.row_per))


if __name__ == "__main__":
    run_cli(main)
