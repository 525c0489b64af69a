"""The law of data/check.py: the exit code says how good a file is. What makes a row bad: test_llava.py."""

import json

import pytest

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
    assert stop.value.code == code and len(err.splitlines()) == (code == 2) and len(out.splitlines()) == (1, 2, 0)[code]
