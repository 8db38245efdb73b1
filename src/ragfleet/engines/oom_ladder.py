"""What follows when memory runs out: smaller batches, one request alone, its failure; then back up.

Pure: counts tokens and keeps a budget. Freeing memory, trying again and logging are the engine's.
The budget halves at once and grows by an eighth at a time, later after each relapse, as in
additive-increase/multiplicative-decrease (Chiu and Jain 1989): a batch that fails costs its work,
a batch that is too small costs a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Rung = Literal["smaller", "alone", "oom"]
"""smaller: try the batch again in parts that fit the budget; alone: try this request again with
nothing else in memory; oom: it fails."""

GROW_AFTER: Final = 16
"""Full batches that must succeed before the budget grows; twice as many after each relapse."""
_MOST_PATIENCE: Final = 1024


@dataclass(slots=True)
class OomLadder:
    """State of one engine.

    Attributes:
        budget_tokens: most tokens of a batch, prompts, answers and padding; None while no batch
            has run out of memory, and again when the budget is back at what failed.
    """

    budget_tokens: int | None = None
    _patience: int = GROW_AFTER
    _good: int = 0
    _failed_tokens: int = 0
    """The largest batch that failed since the budget was last None."""
    _has_grown: bool = False
    """Since the last failure: then the next one is a relapse, not a further step down."""

    def fit(self, width_tokens: int, wanted: int) -> int:
        """How many of `wanted` requests of `width_tokens` each go into a batch: at least 1."""
        if self.budget_tokens is None:
            return wanted
        return max(1, min(wanted, self.budget_tokens // max(width_tokens, 1)))

    def failed(self, num_requests: int, num_tokens: int, *, was_alone: bool) -> Rung:
        """A batch ran out of memory.

        Args:
            num_tokens: of the whole batch, as `budget_tokens` counts them.
            was_alone: it was one request, tried after everything else was freed.
        """
        self._good = 0
        if num_requests == 1:
            # Says nothing of batches of shorter ones, so the budget stays.
            return "oom" if was_alone else "alone"
        if self._has_grown:
            self._patience, self._has_grown = min(2 * self._patience, _MOST_PATIENCE), False
        self._failed_tokens = max(self._failed_tokens, num_tokens)
        smaller = max(1, num_tokens // 2)
        self.budget_tokens = (
            smaller if self.budget_tokens is None else min(smaller, self.budget_tokens)
        )
        return "smaller"

    def succeeded(self, num_tokens: int) -> bool:
        """A batch was answered; True when the budget has just grown.

        Batches of less than half the budget prove nothing and are not counted.
        """
        if self.budget_tokens is None or 2 * num_tokens < self.budget_tokens:
            return False
        self._good += 1
        if self._good < self._patience:
            return False
        self._good, self._has_grown = 0, True
        self.budget_tokens += max(1, self.budget_tokens // 8)
        if self.budget_tokens >= self._failed_tokens:
            self.budget_tokens, self._failed_tokens = None, 0
        return True
