"""Whether a worker that died is started again. Pure: no clock, no process.

`max_restarts` is for workers whose deaths nothing explains. A record that kills explains some:
those with it in flight, once it was in flight at two (`poison`). But a broken engine looks like a
file in which every record kills, so deaths with no answer in between are counted as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from ragfleet.poison import Suspicion

PROVEN: Final = 100
"""A worker that answered so many requests before it died starts counting anew."""
MOST_IN_A_ROW: Final = 16
"""Records that kill one after the other, each alone and with no answer in between: more are not the
records' fault. Of a worker that never answered anything `max_restarts` are."""

Verdict = Literal["trial", "restart", "give up"]
"""trial: it died while suspects were tried, as they may."""


@dataclass(slots=True)
class Restarts:
    """Of one worker.

    Attributes:
        count: deaths that count against `most`, after the last one.
    """

    most: int
    count: int = 0
    _sets: list[tuple[int, ...]] = field(default_factory=list)
    """What was in flight at the deaths since it was proven, without those of trials."""
    _fruitless: int = 0
    """Deaths since its last answer that taught nothing."""
    _alone: int = 0
    """Those of single suspects since its last answer."""
    _has_answered: bool = False

    def died(
        self,
        rows: Sequence[int],
        *,
        num_answered: int,
        before: Suspicion,
        after: Suspicion,
    ) -> Verdict:
        """`rows` were in flight, `before` and `after` is what all deaths say without and with this
        one; `num_answered`: by the dead process."""
        is_trial = bool(rows) and all(before.is_suspect(row) for row in rows)
        if num_answered:
            self._has_answered, self._fruitless, self._alone = True, 0, 0
        if num_answered >= PROVEN:
            self._sets.clear()
        if is_trial:
            self._alone += len(rows) == 1
        else:
            self._sets.append(tuple(rows))
            taught = any(after.is_suspect(row) and not before.is_suspect(row) for row in rows)
            self._fruitless += not taught
        unexplained = sum(not any(map(after.is_suspect, rows)) for rows in self._sets)
        self.count = max(unexplained, self._fruitless)
        most_alone = MOST_IN_A_ROW if self._has_answered else self.most
        if self.count > self.most or self._alone > most_alone:
            return "give up"
        return "trial" if is_trial else "restart"
