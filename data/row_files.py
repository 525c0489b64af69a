"""Files of rows, as objects that data/spellings.py reads: whatever the file, a row is what one of its lines or objects says.

    file = read_file(Path("train.csv"))          # file.rows: [(2, {"image": "a.png", "question": "...", "answer": "..."}), ...]

| source | rows |
|---|---|
| .json | the objects of its list; of an object that holds one such list ({"data": [...]}), of that |
| .jsonl, .ndjson | an object a line |
| .csv, .tsv | a line each; the first names the columns |
| a folder with metadata.jsonl or metadata.csv | that file's (as Hugging Face's imagefolder) |
| a folder of images, a .txt or .json of the same name beside each | the caption (as img2dataset writes it) |
| a folder of class/*.jpg | "A photo of a CLASS." |
| .parquet, .tar, a folder of datasets.save_to_disk | data/tables.py, data/shards.py: too large for memory, perhaps |

Text is UTF-8, or UTF-16 or UTF-32 that begins as such; what is no UTF-8 at all is read as cp1252, and that is said.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.archives import walk_folder
from data.folders import arrange, cache_folder
from data.row_images import IMAGE_NAME, IMAGES, suffix_of
from data.row_values import kind_of
from data.spellings import ANSWERS, CAPTIONS, CONVERSATIONS, DESCRIBE, QUESTIONS
from lib.files import one_line, write_atomic

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
STREAMED = (".tar", ".parquet")
READ = ".json, .jsonl, .csv, .tsv, .parquet, .tar, or a folder of images with captions or classes"
COLUMNS = {*IMAGES, *QUESTIONS, *ANSWERS, *CAPTIONS, *CONVERSATIONS}
SAYS_CLASS = "A photo of a {}."
LARGEST_CELL = 1 << 28  # characters
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass
class RowFile:
    """rows: (number, what spellings.read_row reads, or the Row that it made of it, or why it could not); problems: (number,
    field, what) of what is no row; notes: how the file was read."""

    path: Path
    folder: Path  # that the images' names start from
    rows: Iterable[tuple[int, object]]
    problems: list[tuple[int, str, str]]
    notes: tuple[str, ...] = ()


def is_streamed(source: str | Path) -> bool:
    """Whether a source is read from front to back: tars, parquet files, a folder that datasets.save_to_disk wrote."""
    return str(source).lower().endswith(STREAMED) or is_saved_to_disk(Path(source))


def is_saved_to_disk(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def read_file(path: Path) -> RowFile:
    """Raises FileNotFoundError for what is not there, ValueError for what holds no rows; a damaged line costs its row."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a file of rows: {READ}")
    if path.is_dir():
        return read_folder(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        hint = "; captions in a text file: python -m data.convert captions" if suffix in (".txt", ".token") else ""
        raise ValueError(f"{path} is no file of rows: name one that ends in {READ}{hint}")
    try:
        text, notes = decoded(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if suffix == ".json":
        (rows, more), problems = json_rows(path, text), []
        notes += more
    else:
        rows, problems = csv_rows(path, text) if suffix in (".csv", ".tsv") else json_lines(text)
    return RowFile(path, path.parent, rows, problems, notes)


# ---- text --------------------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> tuple[str, tuple[str, ...]]:
    """(the text of a file, what there is to say of its encoding). Bytes that are no UTF-8 stay in it as surrogates, and cost
    the rows that they stand in; but where nothing else is UTF-8 either, the text is cp1252. Raises ValueError where most of
    them stand side by side: accented letters do not, those of other alphabets do."""
    encoding = next((name for bom, name in BOMS.items() if data.startswith(bom)), None)
    if encoding is None and len(data) > 3 and (not any(data[1:200:2]) or not any(data[:200:2])):
        encoding = "utf-16-be" if not any(data[:200:2]) else "utf-16-le"
    if encoding:
        return data.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace"), ()
    text = data.decode("utf-8", "surrogateescape")
    beyond = {char for char in text if char > "\x7f"} if not text.isascii() else set()
    if beyond and all("\udc80" <= char <= "\udcff" for char in beyond):
        runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
        if sum(length for length in runs if length > 1) > sum(runs) / 2:
            raise ValueError(f"its text is neither UTF-8 nor cp1252 ({sum(runs):,} bytes): save it as UTF-8")
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            return text, ()
        word = re.search(r"\w*[^\0-\x7f]\w*", text)[0]
        return text, (f"the file is not UTF-8 and was read as cp1252, its first such word being {word[:40]!r}",)
    return text, ()


def parsed(data: bytes | str):
    """JSON. Raises ValueError with the reason."""
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parsed_file(name: str, data: bytes | str):
    """The JSON of a data set's own file. Raises ValueError with its name."""
    try:
        return parsed(data)
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({one_line(error)}): it is damaged or cut off, get it again") from None


def json_rows(path: Path, text: str) -> tuple[list[tuple[int, object]], tuple[str, ...]]:
    """(rows, what there is to say of where they stand). Raises ValueError where it is not plain what is a row."""
    try:
        rows = parsed(text)
    except ValueError as error:
        lines = "Extra data" in str(error)
        hint = "one object a line? Then name it .jsonl" if lines else "it is damaged or cut off, get it again"
        raise ValueError(f"{path} is not valid JSON ({one_line(error)}): {hint}") from None
    notes = ()
    if isinstance(rows, dict) and not COLUMNS & {*rows} - {"images"}:
        inside = [key for key, value in rows.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if "images" in inside:  # these are no rows, or rows of all parts: convert.py knows which
            raise ValueError(f"{path} holds COCO's or Karpathy's annotations: see python -m data.convert captions --help")
        if len(inside) == 1:
            rows, notes = rows[inside[0]], (f"the rows are the list under {inside[0][:40]!r}; its other keys are not used",)
    elif isinstance(rows, dict) and any(isinstance(value, str) for value in rows.values()):
        rows = [rows]  # a single row
    elif isinstance(rows, dict):
        raise ValueError(f"{path} holds columns, not a list of rows: with pandas, to_json(..., orient='records') writes rows")
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, dict) else ""
        raise ValueError(f"{path} holds {kind_of(rows)}{keys[:80]}, not a list of rows")
    return list(enumerate(rows, start=1)), notes


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """A .json with one row a line, to find and to look at."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def json_lines(text: str):
    """(rows, problems): only the line that is damaged, such as a last one cut short, is lost."""
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, parsed(line)))
            except ValueError as error:
                problems.append((number, "line", f"is damaged or cut off ({one_line(error)})"))
    return rows, problems


def csv_rows(path: Path, text: str):
    """(rows, problems) of cells with commas, semicolons, tabs or | between them, whichever gives the first line more names that
    are known. Raises ValueError where it gives none."""
    text = re.sub(r"\A\s*sep=[^\r\n]", "", text)  # Excel's own line above the names
    first = next((line for line in text.splitlines() if line.strip()), "")

    def names(mark: str) -> list[str]:
        return [name.strip().lower() for name in next(csv.reader([first], delimiter=mark, skipinitialspace=True), [])]

    mark = max(",;\t|", key=lambda mark: sum(name in COLUMNS for name in names(mark)))
    if not COLUMNS & {*names(mark)}:
        raise ValueError(
            f"{path}: its first line, {first.strip()[:60]!r}, names no column that is read: write a line above it that names "
            "them, such as image,caption or image,question,answer"
        )
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=True)
    columns, rows, problems, number = None, [], [], 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = f"is damaged ({one_line(error)})"
            if "unexpected end" in what:
                what = "opens a quote that is never closed: all from here on is lost"
            problems.append((number, "line", what))
            number = reader.line_num + 1
            continue
        if cells is None:
            return rows, problems
        if columns is None and any(cells):
            columns = cells
        elif any(cell.strip() for cell in cells):
            if len(cells) == len(columns):
                rows.append((number, dict(zip(columns, cells, strict=True))))
            else:
                what = f"has {len(cells)} cells for the {len(columns)} columns of the first line"
                problems.append((number, "line", f"{what}: a text with {mark!r} in it needs quotes"))
        number = reader.line_num + 1


# ---- folders -------------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> RowFile:
    """A folder that says something about its images. Raises ValueError for any other."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).exists():
            return read_file(folder / name)
    sizes = {name: size for name, (size, _) in walk_folder(folder).items()}
    files = sorted((name for name in sizes if name.lower().endswith(SUFFIXES + STREAMED)), key=lambda name: name.count("/"))
    images = [name for name in sizes if IMAGE_NAME.search(name)]
    beside = {name: [note for end in (".txt", ".json") if (note := name.rpartition(".")[0] + end) in sizes] for name in images}
    if any(beside.values()):
        return RowFile(folder, folder, *beside_rows(folder, beside))
    plan = arrange(sizes, split_seed=0)
    if len({label for *_, label in plan.files}) > 1 and not (files and "/" not in files[0]):
        chosen = [file for file in plan.files if not plan.has_parts or file[1] == "train"]
        left = len(plan.files) - len(chosen)
        notes = (f"{left:,} images of its test part are left alone: name that folder for them",) if left else ()
        rows = [class_row(name, label) for name, _, label in chosen]
        problems = [(len(rows) + k, "image", f"{name[:80]!r} is {why}") for k, (name, why) in enumerate(plan.skipped, start=1)]
        return RowFile(folder, folder, list(enumerate(rows, start=1)), problems, notes)
    if files:
        raise ValueError(f"{folder} is a folder: name a file in it, such as {folder / files[0]}")
    raise ValueError(
        f"{folder} holds {len(images)} images and nothing that is said of them: name a file of rows, put a .txt with its "
        "caption beside each image, or the images of each of several classes in a folder"
    )


def class_row(name: str, label: str) -> dict:
    return {"image": name, "question": DESCRIBE, "answer": SAYS_CLASS.format(label.replace("_", " ")), "kind": "class"}


def beside_rows(folder: Path, beside: Mapping[str, list[str]]):
    """(rows, problems) of images and the names of the .txt and .json beside each."""
    rows, problems = [], []
    for number, (image, notes) in enumerate(beside.items(), start=1):
        try:
            contents = {note.rpartition(".")[2]: decoded((folder / note).read_bytes())[0] for note in notes}
            rows.append((number, {**merged(contents.get("json"), contents.get("txt")), "image": image}))
        except (ValueError, OSError) as error:
            problems.append((number, "json", f"of {image[:80]!r} is damaged ({one_line(error)})"))
    for number in range(len(rows)):
        if len(rows[number][1]) == 1:
            problems.append((rows[number][0], "image", f"{rows[number][1]['image'][:80]!r} has no .txt or .json beside it"))
    return [row for row in rows if len(row[1]) > 1], problems


def merged(about: str | bytes | None, caption: str | None) -> dict:
    """A row from a .json and a .txt beside an image: the text is its caption, unless the JSON says more than img2dataset's.
    Raises ValueError where the JSON holds no object."""
    raw = {} if about is None else parsed(about)
    if not isinstance(raw, dict):
        raise ValueError(f"it holds {kind_of(raw)}, not an object")
    says = raw.keys() & {*CONVERSATIONS, *QUESTIONS}
    return raw if caption is None or says else {**raw, "caption": caption.strip()}


# ---- images that are no files of their own ---------------------------------------------------------------------------------


def image_store() -> Path:
    return cache_folder() / "images"


def keep_image(content: bytes) -> Path:
    """The file in the cache folder (VLM_CACHE) that holds these bytes: the same for the same image, wherever it comes from."""
    digest = hashlib.sha256(content).hexdigest()[:32]
    path = image_store() / digest[:2] / f"{digest}.{suffix_of(content)}"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, lambda temporary: temporary.write_bytes(content))
        except OSError as error:
            raise OSError(f"an image cannot be kept ({one_line(error)}): set VLM_CACHE to a folder with room") from None
    return path
