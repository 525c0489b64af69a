"""Settings for all tests: one thread each (the models are tiny), no network, signals as they were."""

import gc
import importlib
import multiprocessing
import os
import signal
import sys

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


@pytest.fixture(scope="session")
def nursery():
    """Where processes come from that need not import torch first: a multiprocessing context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for the module before it is told where
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        importlib.import_module("multiprocessing.forkserver").ensure_running()
    return context


def pytest_collection_modifyitems(items):
    """The long ones first: one that begins last keeps a single core busy."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """What the imports made stays: no later garbage collection walks through it."""
    gc.freeze()
