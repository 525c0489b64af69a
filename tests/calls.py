"""What the tests of scripts share: a script called in this process, as from a command line."""

import contextlib
import io
import os
import signal
from pathlib import Path

import pytest

from lib.cli import run_cli
from lib.metrics import Metrics
from lib.run import Run


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


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def learned(run: Path) -> list[dict]:
    """metrics.jsonl but for what a clock says."""
    rows = Metrics(run / "metrics.jsonl", 10**9).read()
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in between catches it, nothing is saved."""


def interrupt(patch: pytest.MonkeyPatch, how: str, step: int) -> None:
    """SIGTERM ("term") or a sudden death ("kill") as soon as so many steps are taken."""
    inner = Run.clip_and_step

    def outer(run, *args):
        inner(run, *args)
        if run.steps_done == step:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Run, "clip_and_step", outer)


def stop_and_resume(train, stops) -> None:
    """train(*more flags): stopped after each of these steps and resumed, at last to its end."""
    for number, (how, step) in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, how, step)
            with pytest.raises(Killed if how == "kill" else SystemExit) as ended:
                train(*["--resume"] * (number > 0))
            assert how == "kill" or ended.value.code == 128 + signal.SIGTERM
    train("--resume")
