"""Requests that wait for a slot.

Pure. Owns their order, and finds those that begin as the first one does without looking at each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Generic, Protocol, TypeVar

from ragfleet.engines.protocol import RequestKey
from ragfleet.engines.shared_prefix.prefixes import ID_BYTES


class Entry(Protocol):
    key: RequestKey
    packed: bytes


E = TypeVar("E", bound=Entry)


class Waiting(Generic[E]):
    """First come, first served."""

    def __init__(self) -> None:
        self._entries: deque[E] = deque()
        self._prompts: list[bytes] = []
        """Sorted by their bytes: those that begin alike stand side by side."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first(self) -> E:
        return self._entries[0]

    def append(self, entry: E) -> None:
        self._entries.append(entry)
        insort(self._prompts, entry.packed)

    def popleft(self) -> None:
        packed = self._entries.popleft().packed
        del self._prompts[bisect_left(self._prompts, packed)]

    def drop(self, key: RequestKey) -> bool:
        """False for one that does not wait."""
        found = [entry for entry in self._entries if entry.key == key]
        for entry in found:
            self._entries.remove(entry)
            del self._prompts[bisect_left(self._prompts, entry.packed)]
        return bool(found)

    def clear(self) -> list[RequestKey]:
        """Forget all; their keys."""
        keys = [entry.key for entry in self._entries]
        self._entries.clear()
        self._prompts.clear()
        return keys

    def like_first(self, num_tokens: int) -> list[bytes]:
        """Prompts other than the first one's that begin with so many of its tokens."""
        packed = self.first.packed
        begin = packed[: num_tokens * ID_BYTES]
        start = stop = bisect_left(self._prompts, begin)
        while stop < len(self._prompts) and self._prompts[stop].startswith(begin):
            stop += 1
        found = self._prompts[start:stop]
        del found[bisect_left(self._prompts, packed) - start]
        return found
