"""Fixtures of the tests of corpora and contexts."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import Maker


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)
