"""Fixtures that several kinds of tests share, and how Hypothesis searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from models import make_model

PARTED = ("e2e", "fault")
"""Folders of tests that mostly start processes and wait for them."""

# The same examples each time, so that a red run is red again; no deadline, for machines are busy.
# To look for new ones: pytest --hypothesis-profile explore
settings.register_profile(
    "repeatable", max_examples=60, derandomize=True, database=None, deadline=None
)
settings.register_profile("explore", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a chat template: 350 k weights, 8192 tokens of context."""
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes (`-n 4 --dist loadgroup`): what goes to one of them.

    Importing torch and transformers takes seconds, so what needs them shares two processes. A
    file's other tests go together; those of `PARTED` alone, unless they share a fixture of theirs.
    """
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.get_closest_marker("xdist_group"):
            continue
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        shared = any(each.scope == "module" for found in fixtures for each in found)
        if item.path.parent.name == "contract" and item.path.stem != "test_pocket":
            item.add_marker(pytest.mark.xdist_group("torch"))
        elif item.path.parent.name == "contract" or "small_model" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("pocket"))
        elif item.path.parent.name not in PARTED or shared:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
