"""What the loop takes of the CPU's memory for keys and values, unless --kv_cache_bytes says so.

Pure, and imports no torch: whoever decides how many workers start counts with it too.
"""

from __future__ import annotations

from typing import Final

from ragfleet.engines.shared_prefix.scheduler import OWN_TOKENS

NUM_SLOTS: Final = 64
"""Decoded together unless --batch_size says otherwise: the products are then bound by arithmetic,
no longer by reading the weights."""
PREFIX_TOKENS_PER_SLOT: Final = 1024
"""Of the CPU's default budget: more would keep prefixes that are likely done with."""
_MEMORY_SHARE: Final = 0.3
"""Most of a worker's part of the machine's memory that the default budget takes."""


def useful_tokens(
    *,
    num_slots: int,
    max_new_tokens: int,
    max_model_len: int | None,
    prefix_tokens: int = PREFIX_TOKENS_PER_SLOT,
) -> int:
    """For all slots and `prefix_tokens` of shared nodes per slot, or the longest prompt alone."""
    slot_tokens = OWN_TOKENS + max_new_tokens
    return max(num_slots * (slot_tokens + prefix_tokens), slot_tokens + (max_model_len or 0))


def default_budget_bytes(
    useful_bytes: int, memory_bytes: int, *, num_threads: int, num_cores: int
) -> int:
    """What is useful, within a worker's part of the memory, as its threads are of the cores."""
    part = min(1.0, num_threads / num_cores)
    return min(useful_bytes, int(memory_bytes * part * _MEMORY_SHARE))
