"""Captioned photos as they are handed out, into rows {"image", "captions"}: all captions of a photo in one row, so that
training encodes the photo once for all of them (`python -m data.convert captions SOURCE FOLDER`).

| SOURCE | what is written |
|---|---|
| an archive or folder with images/ and NAME.json of such rows | FOLDER/NAME.json for each, FOLDER/images/ |
| COCO's captions_val2017.json | FOLDER/captions.json |
| dataset_flickr8k.json and the like (Karpathy and Fei-Fei 2015) | FOLDER/train.json, val.json, test.json |
| Flickr8k.token.txt, or Flickr30k's results_20130124.token | FOLDER/captions.json, or a file for each list of names beside it |

The last three name their photos and do not hold them: pass --images DIR to what reads FOLDER.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import ImageOps

from data.archives import content_reader, open_archive
from data.images import decode_image
from data.row_files import decoded, parsed_file, write_rows
from data.row_values import RowError, is_absent, kind_of
from data.spellings import texts_of
from lib.files import naming, new_folder, read_text

SPLIT_LIST = re.compile(r"(?:.*[._-])?(train|dev|val|test)(?:_?images)?\.txt", re.IGNORECASE)
DESCRIPTION = "captions are read from rows {image, captions}, COCO's annotations, Karpathy's splits, lines of NAME#0<tab>TEXT"


def convert_captions(source: Path, folder: Path) -> str:
    """See above. Returns what was written. Raises FileNotFoundError, and ValueError for what is none of these."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name an archive or folder with images/, or a file of captions")
    if source.is_file() and source.suffix.lower() in (".json", ".txt", ".token", ".csv"):
        parts, counted = parts_of_file(source), "name them with --images DIR"
        with new_folder(folder) as whole:
            write_parts(whole, parts)
    else:
        parts, counted = copy_photos(source, folder), f"they are in {folder}/images"
    said = [f"{name}.json has {len(rows):,} photos with {captions(rows):,} captions" for name, rows in parts.items()]
    return f"{folder}: {', '.join(said)}; {counted}"


def convert_mirrored(source: Path, folder: Path, images: Path) -> str:
    """Photos with captions, and each photo once more in a mirror with the same captions, of which few say left or right (116 of
    Flickr8k's 30,000): FOLDER/NAME.json and FOLDER/images/. Returns what was written. Raises ValueError or an OSError for a
    file of several splits or none, and for a photo that cannot be read."""
    parts = parts_of_file(source)
    if len(parts) > 1:
        raise ValueError(f"{source} holds {', '.join(parts)}: write them to files of their own with `captions` first")
    ((name, rows),) = parts.items()
    twins = [row | {"image": f"mirrored/{row['image']}.png"} for row in rows]
    with new_folder(folder) as whole:
        for row, twin in zip(rows, twins, strict=True):
            for each in (row, twin):
                (whole / "images" / each["image"]).parent.mkdir(parents=True, exist_ok=True)
            with naming("--images", images / row["image"]):
                photo = decode_image(images / row["image"])
            shutil.copyfile(images / row["image"], whole / "images" / row["image"])
            ImageOps.mirror(photo).save(whole / "images" / twin["image"], compress_level=1)
        write_parts(whole, {name: rows + twins})
    return f"{folder}: {name}.json has {len(rows):,} photos, and each of them mirrored; they are in {folder}/images"


def captions(rows: Iterable[Mapping]) -> int:
    return sum(len(row["captions"]) for row in rows)


def write_parts(folder: Path, parts: Mapping[str, list[dict]]) -> None:
    if not parts:
        raise ValueError(f"there is no photo with a caption in it: {DESCRIPTION}")
    for name, rows in parts.items():
        if not rows:
            raise ValueError(f"{name}.json would have no photo in it: {DESCRIPTION}")
        write_rows(folder / f"{name}.json", rows)


def parts_of_file(source: Path) -> dict[str, list[dict]]:
    """Part of the data -> its rows, from a file that holds captions alone."""
    text, _ = decoded(source.read_bytes())
    if source.suffix.lower() == ".json":
        return parts_of_json(source.name, parsed_file(source.name, text))
    said: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        found = re.match(r"([^\t,#]+\.\w+)(?:#\d+[a-z]*\t|\t|,)(.*)", line.rstrip("\r"))
        if found and (caption := found[2].strip().strip('"').strip()):
            said.setdefault(found[1].strip(), []).append(caption)
        elif number == 1 and line.lower().startswith("image"):  # Kaggle's captions.txt names its columns
            if len(columns := re.split(r"[,\t]", line.strip())) > 2:
                raise ValueError(f"{source} has the columns {', '.join(columns)}: image and caption were expected; as it is, "
                                 "finetune_vlm.py --data reads it")  # fmt: skip
        elif line.strip():
            raise ValueError(f"{source}, line {number} is {line[:60]!r}: NAME#0, a tab and a caption were expected")
    if not said:
        raise ValueError(f"{source} holds no caption: {DESCRIPTION}")
    lists = {}
    for beside in sorted(source.parent.iterdir()):
        if beside != source and beside.is_file() and (part := SPLIT_LIST.fullmatch(beside.name)):
            lists[part[1].lower()] = read_text(beside).split()
    rows = {name: captioned(f"{source}, {name}", {"image": name, "captions": texts}) for name, texts in said.items()}
    if not lists:
        return {"captions": list(rows.values())}
    return {part: [rows[name] for name in names if name in rows] for part, names in lists.items()}


def parts_of_json(name: str, about) -> dict[str, list[dict]]:
    """The same of JSON: rows, COCO's annotations, or Karpathy's splits."""
    if isinstance(about, list):
        return {Path(name).stem: [captioned(f"{name}, row {k}", row) for k, row in enumerate(about, start=1)]}
    if not isinstance(about, dict) or not isinstance(about.get("images"), list) or not about["images"]:
        raise ValueError(f"{name} holds {kind_of(about)}: {DESCRIPTION}")
    for k, photo in enumerate(photos := about["images"], start=1):
        if not isinstance(photo, dict):
            raise ValueError(f"{name}, image {k} is {kind_of(photo)}: {DESCRIPTION}")
    if isinstance(about.get("annotations"), list):
        named = [photo for photo in photos if is_id(photo.get("id")) and isinstance(photo.get("file_name"), str)]
        names = {photo["id"]: photo["file_name"] for photo in named}
        if twice := [photo for photo in named if names[photo["id"]] != photo["file_name"]]:
            raise ValueError(f"{name}: two images have the id {twice[0]['id']}: get COCO's captions_*.json")
        said: dict[str, list] = {}
        for k, each in enumerate(about["annotations"], start=1):
            known = isinstance(each, dict) and is_id(each.get("image_id")) and each["image_id"] in names
            if not known or "caption" not in each:
                raise ValueError(f"{name}, annotation {k} has no caption of a photo that is listed: get COCO's captions_*.json")
            said.setdefault(names[each["image_id"]], []).append(each["caption"])
        return {"captions": [captioned(name, {"image": photo, "captions": texts}) for photo, texts in said.items()]}
    parts: dict[str, list[dict]] = {}
    for k, photo in enumerate(photos, start=1):
        part = photo.get("split") or "captions"
        if not isinstance(part, str):
            raise ValueError(f"{name}, image {k}: its split is {kind_of(part)}: a text was expected")
        part = "train" if part == "restval" else part
        parts.setdefault(re.sub(r"\W", "", part) or "captions", []).append(captioned(f"{name}, image {k}", photo))
    return parts


def is_id(value) -> bool:
    """Whether it can name a photo in COCO's annotations."""
    return isinstance(value, int | str)


def captioned(where: str, row) -> dict:
    """{"image", "captions"} of a row that says so in one of the ways of spellings.py. Raises ValueError."""
    row = row if isinstance(row, dict) else {}
    image = next((row[key] for key in ("image", "file_name", "filename") if isinstance(row.get(key), str)), "")
    said = next((row[key] for key in ("captions", "sentences", "caption") if not is_absent(row.get(key))), None)
    try:
        texts = texts_of("captions", said)
    except RowError as wrong:
        raise ValueError(f"{where}: {': '.join(wrong.args)}") from None
    folder = f"{row['filepath']}/" if isinstance(row.get("filepath"), str) and row["filepath"] else ""
    name = folder + image.replace("\\", "/")
    if not image or not texts or ".." in name.split("/") or name.startswith("/") or "\0" in name or ":" in name:
        raise ValueError(f"{where} is not the name of a photo with its captions: {DESCRIPTION}")
    return {"image": name, "captions": [" ".join(text.split()) for text in texts]}


def copy_photos(source: Path, folder: Path) -> dict[str, list[dict]]:
    """The parts of an archive or folder with images/, which are written with their photos to a new folder."""
    with open_archive(source) as (sizes, read), new_folder(folder) as whole:
        files = [name for name in sizes if re.fullmatch(r"(?:.*/)?[^/]+\.json", name) and not name.endswith("/")]
        depth = min((name.count("/") for name in files), default=0)
        files = [name for name in files if name.count("/") == depth]
        if not files:
            raise ValueError(f"{source} holds no .json with rows of image and captions: unpack it, and name a file of captions")
        content = content_reader(source, sizes, read)
        parts = {}
        for name in files:
            about = parsed_file(f"{source}: {name}", decoded(content(name))[0])
            found = parts_of_json(name, about)
            found = {Path(name).stem: rows for rows in found.values()} if len(found) == 1 else found
            if twice := found.keys() & parts.keys():
                raise ValueError(f"{source}: {name} has {', '.join(sorted(twice))}, and so has another file: leave one out")
            parts |= found
        prefix = files[0].rpartition("/")[0]
        for image in dict.fromkeys(row["image"] for rows in parts.values() for row in rows):
            place = whole / "images" / image
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content("/".join(filter(None, (prefix, "images", image)))))
        write_parts(whole, parts)
    return parts
