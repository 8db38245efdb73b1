"""The way of CUDA on the CPU."""

from __future__ import annotations

import dataclasses

import pytest

from ragfleet.engines.shared_prefix import loop, ways
from ragfleet.engines.shared_prefix.decoder import Capture, eagerly
from ragfleet.engines.shared_prefix.varlen import Kernel, Kernels, plain_varlen


def take_cudas_way(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel = plain_varlen, capture: Capture = eagerly
) -> None:
    """Engines that are started from now on take it, by `kernel` and `capture`."""
    way = ways.varlen_way(Kernels(kernel), capture)
    way = dataclasses.replace(way, default_budget=ways.CPU.default_budget)
    monkeypatch.setattr(loop, "way_of", lambda shape: way)
