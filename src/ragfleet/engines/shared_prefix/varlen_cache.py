"""Keys and values in one tensor, where everything is a range of places.

Owns which place is whose: the pool first, then slot by slot, then one that nobody reads.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ragfleet.engines.shared_prefix.cache import Shape
from ragfleet.engines.shared_prefix.scheduler import Limits

Places = TypeVar("Places", int, npt.NDArray[np.int64])
"""One, or as many as there are slots."""


class VarlenCache:
    """`states` [layers, 2, places, kv_heads, dim].

    Nothing needs cleaning: keys are read as ranges that end with what was written.
    """

    EXTRA_TOKENS = 1
    """Places beyond those of the limits."""

    def __init__(self, shape: Shape, limits: Limits) -> None:
        self.num_pool = limits.pool_tokens
        self.slot_tokens = limits.slot_tokens
        self.group = shape.group
        self.device = shape.device
        self.scratch = limits.pool_tokens + limits.num_slots * limits.slot_tokens
        """Where padding is written."""
        self.states = torch.empty(
            (shape.num_layers, 2, self.scratch + 1, shape.num_kv_heads, shape.head_dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        self._layers = [(layer[0], layer[1]) for layer in self.states]

    @property
    def num_bytes(self) -> int:
        return int(self.states.nbytes)

    def place(self, slot: Places, column: int = 0) -> Places:
        """Of a slot's token."""
        return self.num_pool + slot * self.slot_tokens + column

    def write(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        written: torch.Tensor,
        copies: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [tokens, kv_heads, dim] to the places `written` [tokens], then those of
        `copies[0]` to `copies[1]` [2, tokens]. Returns all keys and all values of the layer."""
        both = self._layers[layer]
        for states, new in zip(both, (key, value), strict=True):
            states.index_copy_(0, written, new)
            if copies is not None:
                states.index_copy_(0, copies[1], states.index_select(0, copies[0]))
        return both

    def taint(self, slot: int) -> None:
        """What is not finite is overwritten before it is read again."""

    def poison(self) -> None:
        """See `ways.Cache`."""
        self.states.fill_(torch.nan)
