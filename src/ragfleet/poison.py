"""Poison: the record that kills whatever process answers it, found among those in flight with it.

Pure. What goes in is the in-flight set of each death, as the journals of dead workers say; what
comes out is which records to try alone. A record in flight at two deaths is a suspect and is kept
from the others; suspects are halved, the narrowest death set first, each half alone in its worker.
A death narrows the set to the half that was running, a survival to the other one, so n suspects
cost at most log2(n) deaths after the two that raised the suspicion (and one more where n is 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What all deaths of a launch say.

    Attributes:
        deaths: how often each index row was in flight at a death.
        alone: rows that were once the only one in flight at a death.
    """

    deaths: dict[int, int]
    alone: frozenset[int]

    @classmethod
    def of(cls, death_sets: Iterable[Iterable[int]]) -> Suspicion:
        deaths: Counter[int] = Counter()
        alone: set[int] = set()
        for rows in map(frozenset, death_sets):
            deaths.update(rows)
            if len(rows) == 1:
                alone |= rows
        return cls(dict(deaths), frozenset(alone))

    def is_suspect(self, row: int) -> bool:
        """Killed twice: it is not sent together with others any more."""
        return self.deaths.get(row, 0) >= 2

    def is_poison(self, row: int) -> bool:
        """In flight at three deaths, once alone: kills from outside do not strike so often."""
        return self.deaths.get(row, 0) >= 3 and row in self.alone

    def next_trial(self, suspects: Sequence[int]) -> list[int]:
        """Which of these unfinished suspects to run now, with nothing else in flight.

        Those in flight at the most deaths are the narrowest set that still holds the cause; half of
        them is tried, so that either outcome halves the set.
        """
        if not suspects:
            return []
        most = max(self.deaths[row] for row in suspects)
        narrowest = sorted(row for row in suspects if self.deaths[row] == most)
        return narrowest[: (len(narrowest) + 1) // 2]
