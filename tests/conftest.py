"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import make_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a chat template: 350 k weights, 8192 tokens of context."""
    return make_model(tmp_path_factory.mktemp("models") / "small")
