"""Laws of data/check.py: the exit code says how good a file is, the last line what is in it. What makes a row bad:
test_llava.py, test_spellings.py."""

import json

import pytest
from PIL import Image

from data.check import main
from lib.cli import run_cli
from samples import image_bytes

GOOD = {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A thing."}]}


@pytest.mark.parametrize(("rows", "code"), [([GOOD], 0), ([GOOD, None], 1), ([None], 2), ([], 2)])
def test_the_exit_code_says_how_good_a_file_is(tmp_path, capsys, rows, code):
    (tmp_path / "a.png").write_bytes(image_bytes())
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main([str(tmp_path / "data.json"), "--images", str(tmp_path)]))
    out, err = capsys.readouterr()
    assert stop.value.code == code and len(err.splitlines()) == (code == 2) and len(out.splitlines()) == (3, 4, 0)[code]


def test_the_last_line_counts_rows_images_and_questions(tmp_path, capsys):
    """ "1 usable" said nothing of the images that were to be trained on."""
    (tmp_path / "a.png").write_bytes(image_bytes())
    captions = {"image": "a.png", "captions": ["A cat.", "An old cat."], "license": 1}
    text = {"conversations": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi. " * 50}]}
    (tmp_path / "data.json").write_text(json.dumps([GOOD, captions, captions, text]))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "data.json"), "--sheet", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    counts = {"rows": 4, "rows_usable": 4, "rows_with_images": 3, "questions": 6, "images": 3, "longest_row_tokens": 51}
    assert json.loads(lines[-1]) == counts and Image.open(tmp_path / "sheet.png").size[0] > 300
    assert "2 rows: key 'license' is not used" in lines and any("3 rows are drawn" in line for line in lines)
