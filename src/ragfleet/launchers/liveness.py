"""Whether a worker still gets anywhere, from what it says of itself. Pure: no clock, no process.

Times are seconds of the caller's monotonic clock. Judged is progress (tokens or calls, outcomes,
the chunk), not that there are beats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ragfleet.beats import Beat

GRACE_S: Final = 5.0
"""What a request may take beyond its limit before its worker is ended for it."""
FROZEN_S: Final = 3.0
"""A look that comes so late says that whoever looks was stopped, and the workers with it."""


@dataclass(slots=True)
class AwakeTime:
    """Time without that in which everything stood still: a job suspended, a container paused."""

    every_s: float
    """How often `look` is called."""
    last_s: float
    _frozen: list[tuple[float, float]] = field(default_factory=list)

    def look(self, now_s: float) -> None:
        if now_s - self.last_s > self.every_s + FROZEN_S:
            self._frozen.append((self.last_s, now_s))
        self.last_s = now_s

    def since(self, start_s: float, now_s: float) -> float:
        frozen_s = sum(
            max(0.0, min(end_s, now_s) - max(begin_s, start_s)) for begin_s, end_s in self._frozen
        )
        return now_s - start_s - frozen_s


@dataclass(slots=True)
class Life:
    """What is known of one worker process."""

    beat_seen_s: float
    """When its last beat was seen, or it was started."""
    moved_s: float
    """When it was last seen to make progress."""
    beat: Beat | None = None
    ready: bool = False
    blocked_after_s: float | None = None
    """Where a user's code can block the engine: how long it may."""

    def become_ready(self, now_s: float, blocked_after_s: float | None) -> None:
        self.ready, self.moved_s, self.blocked_after_s = True, now_s, blocked_after_s

    def observe(self, beat: Beat, now_s: float) -> None:
        if self.beat is not None and beat.sequence == self.beat.sequence:
            return
        if self.beat is None or _progress(beat) != _progress(self.beat):
            self.moved_s = now_s
        self.beat, self.beat_seen_s = beat, now_s

    def has_left_for(self, seconds: float, now_s: float) -> bool:
        return (
            self.beat is not None
            and self.beat.state == "left"
            and now_s - self.beat_seen_s > seconds
        )

    def blocking_row(self, now_s: float, awake: AwakeTime) -> int | None:
        """The index row of a request that takes longer than a user's code may."""
        limit_s, beat = self.blocked_after_s, self.beat
        if limit_s is None or beat is None or beat.oldest_row is None:
            return None
        # With the beat's own silence, for code that holds the GIL.
        age_s = awake.since(self.beat_seen_s - beat.oldest_s, now_s)
        return beat.oldest_row if age_s > limit_s + GRACE_S else None

    def standstill(
        self, now_s: float, awake: AwakeTime, start_timeout_s: float, stall_timeout_s: float
    ) -> str | None:
        """What it does instead of getting on, for people; None while all is well."""
        beat = self.beat
        silent_s, stuck_s = awake.since(self.beat_seen_s, now_s), awake.since(self.moved_s, now_s)
        if not self.ready:
            if stuck_s <= start_timeout_s:
                return None
            return f"is loading for {stuck_s:.0f} s (--start_timeout_s)"
        limit_s = stall_timeout_s
        if self.blocked_after_s is not None:  # a user's code has its own, longer limit
            limit_s = max(limit_s, self.blocked_after_s + 2 * GRACE_S)
        what, is_stalled = "gives no sign of life", silent_s > limit_s
        # Nothing in flight while generating: it reads or renders, where templates and a user's
        # create_prompt may hang; one with nothing to do is "waiting".
        if beat is not None and (beat.in_flight or beat.state == "generating"):
            what, is_stalled = "makes no progress", stuck_s > limit_s
        which = "--stall_timeout_s" if limit_s == stall_timeout_s else "--request_timeout_s"
        return f"{what} for {max(stuck_s, silent_s):.0f} s ({which})" if is_stalled else None


def _progress(beat: Beat) -> tuple[object, ...]:
    return beat.progress, beat.succeeded, beat.failed, beat.in_flight, beat.chunk, beat.state
