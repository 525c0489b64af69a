"""What the tests of scripts share: a script called in this process, as from a command line."""

import contextlib
import io

import pytest

from lib.cli import run_cli


def printed(main, *flags) -> list[str]:
    """The lines that it prints to stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main(list(map(str, flags)))
    return out.getvalue().splitlines()


def refused(capsys, main, *flags) -> str:
    """With what it must refuse: exit code 2 and one line of error, which is returned."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: main(list(map(str, flags))))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if "error: " in line]
    return line
