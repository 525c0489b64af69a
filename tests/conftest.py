"""Settings for all tests: one thread each (the models are tiny), no network, signals as they were."""

import os
import signal

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undrawn():
    """Runs of vision-language models draw nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.vlm_report.draw", lambda *args: None)
        yield


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)
