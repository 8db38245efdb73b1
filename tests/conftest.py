"""Fixtures that several kinds of tests share, and how Hypothesis searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from models import make_model

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
