"""Fixtures that several kinds of tests share, and how Hypothesis searches."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from models import make_model

PARTED = (
    *("tests/e2e/test_bad_input.py", "tests/e2e/test_runs.py"),
    *("tests/fault/test_kills.py", "tests/fault/test_sabotage.py", "tests/fault/test_schedules.py"),
    "tests/fault/test_what_peers_lose.py",
)
"""Long files whose tests mostly start processes and wait for them."""

# The same examples each time, so that a red run is red again; no deadline, for machines are busy.
# To look for new ones: pytest --hypothesis-profile explore
settings.register_profile(
    "repeatable", max_examples=60, derandomize=True, database=None, deadline=None
)
settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a chat template: 350 k weights, 8192 tokens of context.

    Made once, also where tests run in several processes: it takes transformers.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    model = folder / "small model"
    with (folder / "small model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not model.exists():
            make_model(folder / "small model.new").rename(model)
    return model


def group(test: str) -> str:
    """What goes to one process with others where tests run in several (`-n 4`).

    Importing torch and transformers takes seconds, so what uses them here goes to two. Files go as
    a whole, since their tests share fixtures; those of `PARTED` test by test.
    """
    file, _, name = test.partition("::")
    if "test_pocket" in file:
        return "pocket"
    if file.startswith("tests/contract/"):
        return "torch"
    return f"{file}::{name.partition('[')[0]}" if file in PARTED else file


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is installed
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups with many tests first."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log)
