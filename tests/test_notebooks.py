"""The notebooks run from a clean clone, say what they promise, and point at code that exists; so does docs/reading-guide.md.

python tests/test_notebooks.py notebooks/02*.ipynb        run again in a fresh kernel, and keep the new outputs

pytest runs every cell but cuts trainings short (SHORT): whole, they took a third of the suite's time. .ci/run runs them whole.
"""

import ast
import functools
import importlib
import itertools
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXERCISE, POINTERS = "## Now change this", "## Where to go in the code"
MOST_LINES, MOST_WORDS = 14, 120  # of a code cell; of a text cell
MOST_SECONDS = 180  # for one cell: on a busy machine the slowest takes a tenth of it
SHORT = {r"\bsteps( ?= ?)\d+": r"steps\g<1>10", r"--epochs \d+": "--epochs 0.2"}  # how long a notebook trains -> a test


def read(path: Path):
    return nbformat.read(path, as_version=4)


def execute(notebook) -> None:
    """Run all cells from top to bottom in a fresh kernel whose folder is notebooks/; an error in a cell is an exception."""
    client = NotebookClient(notebook, timeout=MOST_SECONDS, kernel_name="python3", resources={"metadata": {}})
    client.resources["metadata"]["path"] = str(ROOT / "notebooks")
    client.execute()


@functools.cache
def names_in(path: Path) -> set[str]:
    """Functions, classes and constants of a module, and those of its classes as Class.name."""
    found = set()

    def collect(body, before: str):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(before + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    found.add(before + target.id)

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def pointers(text: str) -> list[tuple[str, str]]:
    """(file, name) of every line such as "[gpt.py](../gpt.py): `Block`, `GPT.forward`"; a file may stand without a name."""
    found = []
    for line in text.splitlines():
        parts = re.split(r"\[([\w/]+\.py)\]\([./]*\1\)", line)
        for file, rest in zip(parts[1::2], parts[2::2], strict=True):
            found += [(file, name) for name in re.findall(r"`([A-Za-z_][\w.]*)`", rest)] or [(file, "")]
    return found


def check_pointers(text: str) -> None:
    found = pointers(text)
    assert found
    for file, name in found:
        assert (ROOT / file).exists(), file
        assert not name or name in names_in(ROOT / file), f"{file} has no {name}"


def steps(notebook) -> dict[str, list]:
    """Heading of each section (##) -> its cells; the title's own cells under ""."""
    found, heading = {"": []}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.match(r"## .*", cell.source)):
            heading = match[0]
            found[heading] = []
        found[heading].append(cell)
    return found


def images_of(cell) -> list[str]:
    return [kind for out in cell.get("outputs", []) for kind in out.get("data", {}) if kind.startswith("image/")]


def each(test):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(test)


@pytest.mark.long
@each
def test_it_runs_from_a_clean_kernel(path):
    notebook = read(path)
    for cell, (pattern, short) in itertools.product(notebook.cells, SHORT.items()):
        if cell.cell_type == "code":
            cell.source = re.sub(pattern, short, cell.source)
    execute(notebook)


@each
def test_it_leaves_nothing_behind_but_its_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run from top to bottom, all of it"
    assert all(out.output_type != "error" for cell in code for out in cell.outputs)
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text and "/tmp/" not in text, "an output names a folder of this machine"
    assert path.stat().st_size < 2_000_000


@each
def test_it_says_first_what_you_will_understand(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "you will understand" in first.source


@each
def test_every_cell_is_short_and_has_its_reason(path):
    cells = read(path).cells
    for before, cell in zip([None, *cells[:-1]], cells, strict=True):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
            assert before is not None and before.cell_type == "markdown", f"no reason is given for:\n{cell.source}"
            assert before.source.strip().split("\n")[-1][:1] != "#", f"a heading gives no reason for:\n{cell.source}"
        elif not cell.source.startswith(POINTERS):
            words = len(re.sub(r"<details>.*?</details>", "", cell.source, flags=re.S).split())
            assert words <= MOST_WORDS, f"{words} words:\n{cell.source}"


@each
def test_there_is_a_figure_at_every_step(path):
    sections = {heading: cells for heading, cells in steps(read(path)).items() if heading not in ("", EXERCISE, POINTERS)}
    assert len(sections) >= 3
    for heading, cells in sections.items():
        assert any(images_of(cell) for cell in cells), heading


@each
def test_it_has_an_exercise_with_its_answer_folded_away(path):
    sections = steps(read(path))
    text = "\n".join(cell.source for cell in sections[EXERCISE])
    answer = re.search(r"<details>\s*<summary>[^<]+</summary>(.+?)</details>", text, re.S)
    assert answer and len(answer[1].split()) > 5
    assert len(re.sub(r"<details>.*", "", text, flags=re.S).split()) > 15


@each
def test_it_ends_with_pointers_into_the_code(path):
    sections = steps(read(path))
    assert list(sections)[-1] == POINTERS
    check_pointers("\n".join(cell.source for cell in sections[POINTERS]))


@each
def test_it_has_no_second_implementation(path):
    """What a notebook shows is the root modules' own: it defines no class, and only short functions."""
    for cell in read(path).cells:
        if cell.cell_type == "code":
            plain = "\n".join("" if line.startswith("%") else line for line in cell.source.splitlines())
            assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(plain))), cell.source


# ---- the stand-in for SmolLM2 ----


@pytest.fixture
def small(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    return importlib.import_module("small_language_model")


def test_the_small_language_model_knows_its_small_world(small):
    """What can follow "The dog jumped over the" comes first, all of it; the word that came up most is the likeliest."""
    next_token_table = importlib.import_module("generate").next_token_table
    model, tokenizer = small.train_small()
    *_, (last, choices) = next_token_table(model, tokenizer, "The dog jumped over the", 4)
    things = small.DEEDS["jumped over the"]
    assert last == " the" and {word.strip() for word, _ in choices} == set(things)
    assert choices[0][0].strip() == things[0] and sum(p for _, p in choices) > 0.9


def test_the_real_one_is_taken_from_where_it_is_said_to_be(small, monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setenv("SMOLLM2_GGUF", str(file))
    assert small.find_smollm2() == file
    monkeypatch.setenv("SMOLLM2_GGUF", str(tmp_path / "absent.gguf"))
    assert small.find_smollm2() is None


# ---- docs/ ----

GUIDE = ROOT / "docs" / "reading-guide.md"


def test_the_reading_guide_names_code_that_exists():
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| section", "| step")):
            check_pointers(line)


@each
def test_the_reading_guide_has_every_section(path):
    """In the notebook's order, and none besides."""
    parts = re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.M)
    (part,) = [part for part in parts if f"](../notebooks/{path.name})" in part]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")]
    wanted = [heading.removeprefix("## ") for heading in steps(read(path)) if heading not in ("", EXERCISE, POINTERS)]
    assert rows[1:] == wanted


def test_the_glossary_says_each_term_once_in_one_line_and_in_order():
    lines = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(rows) > 50 and all(len(row) == 2 and row[1] for row in rows)
    terms = [row[0].lower() for row in rows]
    assert terms == sorted(set(terms))


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = read(path)
        execute(notebook)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when each cell ran: another diff at every run
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
