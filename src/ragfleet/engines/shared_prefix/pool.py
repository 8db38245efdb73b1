"""Where in the pool of keys and values a node stands: contiguous ranges of tokens.

Pure. Owns the free space; knows nothing of what the ranges hold.
"""

from __future__ import annotations

from bisect import bisect_left


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
        stop = start + length
        index = bisect_left(self._holes, (start, stop))
        if index < len(self._holes) and self._holes[index][0] == stop:
            stop = self._holes.pop(index)[1]
        if index and self._holes[index - 1][1] == start:
            index -= 1
            start = self._holes.pop(index)[0]
        self._holes.insert(index, (start, stop))
