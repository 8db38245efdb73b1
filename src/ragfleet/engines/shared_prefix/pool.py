"""Where in the pool of keys and values a node stands: contiguous ranges of tokens.

Pure. Owns the free space; knows nothing of what the ranges hold.
"""

from __future__ import annotations

from bisect import insort


class Pool:
    """First fit, lowest place first, so that memory never written to stays untouched."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.used_tokens = 0
        self.peak_tokens = 0
        self._holes = [(0, num_tokens)] if num_tokens else []
        """(start, stop) of free ranges, in order, never touching each other."""

    def take(self, length: int) -> int | None:
        """The start of a range of `length` tokens; None where no hole is so long."""
        for index, (start, stop) in enumerate(self._holes):
            if stop - start >= length:
                if stop - start == length:
                    del self._holes[index]
                else:
                    self._holes[index] = (start + length, stop)
                self.used_tokens += length
                self.peak_tokens = max(self.peak_tokens, self.used_tokens)
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        self.used_tokens -= length
        insort(self._holes, (start, start + length))
        joined: list[tuple[int, int]] = []
        for hole in self._holes:
            if joined and joined[-1][1] == hole[0]:
                joined[-1] = (joined[-1][0], hole[1])
            else:
                joined.append(hole)
        self._holes = joined
