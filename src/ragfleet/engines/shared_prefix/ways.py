"""The ways in which a device holds keys and values and reads a pass.

The one place that knows of them all; the loop and the self-check see a `Way`, and nothing of what
is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from ragfleet.engines.heap import keep_freed_memory
from ragfleet.engines.protocol import EngineSpec
from ragfleet.engines.shared_prefix.attention import Probing
from ragfleet.engines.shared_prefix.cache import KeyValueCache, Shape, default_budget_bytes
from ragfleet.engines.shared_prefix.forward import Readable
from ragfleet.engines.shared_prefix.passes import TensorPass
from ragfleet.engines.shared_prefix.scheduler import Limits, Pass

NUM_SLOTS: Final = 64
"""Decoded together unless --batch_size says otherwise: the products are then bound by arithmetic,
no longer by reading the weights."""
PASS_TOKENS: Final = 512
"""Of a pass: matrix products gain nothing from more, and what lies between them stays in caches."""


class Cache(Protocol):
    """Keys and values of a loop."""

    @property
    def num_bytes(self) -> int: ...

    def taint(self, slot: int) -> None:
        """What was written into a slot may not be finite."""
        ...


MakePass = Callable[[Pass, Mapping[int, int], Any, Probing | None], Readable]
"""Of what the scheduler says, the token that each slot feeds, the way's own cache, and what looks
on; keys and values are written into the cache while the model reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a device reads passes."""

    dtypes: frozenset[torch.dtype]
    """Those it is made for."""
    make_cache: Callable[[Shape, Limits], Cache]
    make_pass: MakePass
    default_budget: Callable[[Shape, EngineSpec, Mapping[str, Any]], int]
    """Bytes for keys and values, where nobody says how many."""
    begin: Callable[[], list[str]]
    """Settings of the process for this way; lines for the log of what could not be set."""
    packs_weights: bool
    num_slots: int
    """Decoded together unless --batch_size says otherwise."""
    pass_tokens: int


def way_of(shape: Shape) -> Way | None:
    """The way of the device that `shape` is on; None: there is none."""
    return CPU if shape.device.type == "cpu" else None


def _part_of_memory(shape: Shape, spec: EngineSpec, sizes: Mapping[str, Any]) -> int:
    return default_budget_bytes(shape, **sizes, num_threads=spec.num_threads)


def _keep_memory() -> list[str]:
    reason = keep_freed_memory()
    return [] if reason is None else [f"memory is mapped anew in every pass: {reason}"]


CPU: Final = Way(
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    make_cache=KeyValueCache,
    make_pass=TensorPass,
    default_budget=_part_of_memory,
    begin=_keep_memory,
    packs_weights=True,
    num_slots=NUM_SLOTS,
    pass_tokens=PASS_TOKENS,
)
