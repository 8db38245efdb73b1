"""Keys and values of all that is shared and of all slots, in two tensors made once.

Owns their shapes and sizes. `Limits` say how large; which place holds what is the scheduler's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ragfleet.engines.shared_prefix import budget
from ragfleet.engines.shared_prefix.scheduler import OWN_TOKENS, Limits, Range

LEAST_POOL_TOKENS: Final = 256
_MOST_PARTS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    group: int = 1
    """Heads that ask the same keys."""

    @property
    def bytes_per_token(self) -> int:
        return int(2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize)

    @classmethod
    def of(cls, model: Any) -> Shape:
        config = model.config.get_text_config()
        num_heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            dtype=model.dtype,
            device=model.device,
            group=num_heads // kv_heads,
        )


def limits_within(
    budget_bytes: int,
    shape: Shape,
    *,
    num_slots: int,
    max_new_tokens: int,
    max_model_len: int | None,
    pass_tokens: int,
    extra_tokens: int = 0,
    least_free_share: float = 0.0,
) -> Limits:
    """At most half for slots, the rest for the pool; a cache takes `extra_tokens` beyond those.
    `least_free_share`: of the slots, see `Limits.least_free`. Raises ValueError with the least
    budget."""
    budget_tokens = budget_bytes // shape.bytes_per_token
    slot_tokens = OWN_TOKENS + max_new_tokens
    least = slot_tokens + LEAST_POOL_TOKENS + extra_tokens
    if budget_tokens < least:
        raise ValueError(
            f"{budget_bytes:,} bytes hold {budget_tokens:,} tokens of keys and values; one answer"
            f" of {max_new_tokens} tokens needs {least * shape.bytes_per_token:,} bytes"
        )
    num_slots = min(num_slots, max(1, budget_tokens // 2 // slot_tokens))
    pool_tokens = budget_tokens - num_slots * slot_tokens - extra_tokens
    if max_model_len is not None:  # more could never be in use
        pool_tokens = min(pool_tokens, num_slots * max_model_len)
    return Limits(
        num_slots=num_slots,
        max_new_tokens=max_new_tokens,
        pool_tokens=pool_tokens,
        pass_tokens=max(pass_tokens, 2 * num_slots),
        least_free=max(1, int(least_free_share * num_slots)),
    )


def useful_bytes(shape: Shape, **sizes: Any) -> int:
    """See `budget.useful_tokens`."""
    return budget.useful_tokens(**sizes) * shape.bytes_per_token


def default_budget_bytes(shape: Shape, *, num_threads: int, **sizes: Any) -> int:
    """See `budget.default_budget_bytes`."""
    return budget.default_budget_bytes(
        useful_bytes(shape, **sizes),
        _memory_bytes(),
        num_threads=num_threads,
        num_cores=os.cpu_count() or 1,
    )


def _memory_bytes() -> int:
    """Of this machine, or of the container where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return memory


class KeyValueCache:
    """`pool` [layers, 2, tokens, kv_heads, dim], `slots` [layers, 2, slots, kv_heads, places, dim].

    In slots the places of one head stand together, because they are read by a batched matrix
    product. Memory is taken from the system when it is first written.
    """

    def __init__(self, shape: Shape, limits: Limits) -> None:
        layers, heads, dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
        options: Any = {"dtype": shape.dtype, "device": shape.device}
        self.pool = torch.empty((layers, 2, limits.pool_tokens, heads, dim), **options)
        self.slots = torch.empty(
            (layers, 2, limits.num_slots, heads, limits.slot_tokens, dim), **options
        )
        self._clean: set[int] = set()
        self._parts: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # Taken apart once: indexing costs more than what is then done with a small part.
        self.flat_slots = [[states.view(-1, dim) for states in layer] for layer in self.slots]
        """[layer][keys or values]: [slots * kv_heads * places, dim]."""

    @property
    def num_bytes(self) -> int:
        return int(self.pool.nbytes + self.slots.nbytes)

    def part(self, layer: int, offset: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a range of the pool: views, each [1, kv_heads, tokens, dim]."""
        where = (layer, offset, length)
        found = self._parts.get(where)
        if found is None:
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            both = self.pool[layer, :, offset : offset + length].transpose(1, 2)
            found = self._parts[where] = (both[0][None], both[1][None])
        return found

    def joined(self, layer: int, ranges: Sequence[Range]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of several ranges, one after the other: [kv_heads, tokens, dim]."""
        parts = [self.part(layer, range_.offset, range_.length) for range_ in ranges]
        if len(parts) == 1:
            return parts[0][0][0], parts[0][1][0]
        return (
            torch.cat([keys[0] for keys, _ in parts], 1),
            torch.cat([values[0] for _, values in parts], 1),
        )

    def clean(self, slot: int) -> None:
        """Make what a slot holds finite: places beyond its end count as 0 × what stands there."""
        if slot not in self._clean:
            self.slots[:, :, slot].zero_()
            self._clean.add(slot)

    def taint(self, slot: int) -> None:
        """What was written into a slot may not be finite."""
        self._clean.discard(slot)

    def poison(self) -> None:
        """See `ways.Cache`. Slots are cleaned before they are used."""
        self.pool.fill_(torch.nan)
        self.slots.fill_(torch.nan)
