"""Rates and concurrency as pure state machines: no clock, no file, no event loop.

`Pacer` hands out moments, evenly spaced, so that any sliding minute at the server holds no more
than the limit. `Concurrency` adds one per round without trouble and halves on trouble. `backoff_s`
keeps retries apart.
"""

from __future__ import annotations

from typing import Final

import msgspec

WINDOW_S: Final = 60.0
JITTER: Final = 0.02
"""Of the window: how far apart the way to the server may pull two requests (1.2 s of a minute)."""
CREDIT: Final = 0.4
"""Of the jitter: how late a moment may still be used."""
UNLIMITED: Final = 1e12
_FIRST: Final = 4
_ROUND: Final = 8
"""Replies that a judgement takes at least: one refusal among four says nothing."""
_TROUBLE: Final = 0.2
"""Of a round's replies: up to here single refusals are noise, above it the server is full."""
_BASE_S: Final = 0.5
_LONGEST_S: Final = 60.0


class Allowance(msgspec.Struct):
    """`amount` units of which the n-th may be spent from `start_s + n * step_s` on."""

    start_s: float = 0.0
    step_s: float = 0.0
    amount: float = 0.0

    def at_s(self, now_s: float, credit_s: float) -> float | None:
        """When the next unit may be spent; None when nothing is left.

        Moments that went by unused are gone: used late they would crowd the following ones.
        """
        if self.step_s > 0 and self.start_s < now_s - credit_s:
            missed = min((now_s - credit_s - self.start_s) / self.step_s, self.amount)
            self.start_s += missed * self.step_s
            self.amount -= missed
        return self.start_s if self.amount > 1e-9 else None

    def spend(self, amount: float) -> None:
        taken = min(amount, self.amount)
        self.amount -= taken
        self.start_s += taken * self.step_s

    @property
    def left(self) -> float:
        """Units that were granted of a rate and not used."""
        return self.amount if self.step_s > 0 else 0.0


class Pacer(msgspec.Struct):
    """One budget per minute, shared by whoever takes from it.

    In any window of `window_s` at the server, of requests that were let go at their moments and
    took up to the jitter to arrive, no more than the limit arrive: n units of step
    (window + jitter) / (limit - largest) fit, and `largest` is what straddles the window's edge.
    """

    per_minute: float | None = None
    most_per_minute: float | None = None
    """What the user set; what the server says counts where it is less."""
    next_s: float = 0.0

    def take(
        self, now_s: float, amount: float, largest: float = 0.0, window_s: float = WINDOW_S
    ) -> Allowance:
        if self.per_minute is None:
            return Allowance(now_s, 0.0, UNLIMITED)
        jitter_s = JITTER * window_s
        limit = self.per_minute * window_s / 60.0
        step_s = (window_s + jitter_s) / max(limit - largest, limit / 10)
        # Half of the credit makes up for the time between two blocks; the other half is left to
        # whoever got this one, so that it is not stale at once.
        start_s = max(self.next_s, now_s - CREDIT / 2 * jitter_s)
        self.next_s = start_s + amount * step_s
        return Allowance(start_s, step_s, amount)

    def give_back(self, now_s: float, amount: float, window_s: float = WINDOW_S) -> None:
        """Units of a block that were not used; later blocks move up."""
        if self.per_minute is not None and amount > 0:
            step_s = (1 + JITTER) * 60.0 / self.per_minute
            earliest_s = now_s - CREDIT / 2 * JITTER * window_s
            self.next_s = max(self.next_s - amount * step_s, earliest_s)

    def learn(self, per_minute: float) -> None:
        """What the server says now; a limit that it raises again is raised here too."""
        most = self.most_per_minute
        self.per_minute = per_minute if most is None else min(per_minute, most)


class Concurrency(msgspec.Struct):
    """How many requests may be on their way: additive increase, multiplicative decrease.

    Judged by rounds of as many replies as may be under way, so that one refusal among many, which
    a busy server sends now and then, does not halve the speed, and a full server does.
    """

    most: int
    limit: float = 0.0
    is_starting: bool = True
    """Doubling from a few, so that a server can tell its limits before it is flooded."""
    replies: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        self.limit = self.limit or float(min(self.most, _FIRST))

    @property
    def is_least(self) -> bool:
        """Fewer are not possible: to ask a server less then is to wait."""
        return self.limit < 2

    def count(self, refused: bool) -> None:
        self.replies += 1
        self.refused += refused
        if self.replies < max(self.limit, _ROUND if self.is_starting else 1):
            return
        if self.refused > _TROUBLE * self.replies:
            self.limit = max(1.0, self.limit / 2)
            self.is_starting = False
        elif self.refused < max(1.0, _TROUBLE * self.replies / 2):
            more = self.limit if self.is_starting else 1.0
            self.limit = min(float(self.most), self.limit + more)
        self.replies = self.refused = 0


def backoff_s(attempt: int, after_s: float | None, draw: float) -> float:
    """Seconds until the next attempt (1 is the first retry); `draw` is uniform in [0, 1).

    The server's Retry-After is a floor, never the moment itself: many wait for the same one.
    """
    longest = min(_LONGEST_S, _BASE_S * 2.0 ** (attempt - 1))
    if not after_s:
        return longest * (0.5 + draw / 2)
    return after_s + max(longest, 0.25 * after_s) * draw
