"""When waiting requests are admitted: in rounds, for a pass that reads prompts may cost much more.

Pure. A round, once begun, goes on over as many passes as it takes, until all slots are taken or the
pool is too full for the first that waits. The next one waits for `least_free` of the slots; where
the pool ended it, of the requests that were admitted the same part must be done. So a round begins
at the latest when nothing runs. Where there are slots for all that waits, which is how an input
ends, it has nothing to wait for.
"""

from __future__ import annotations


class Rounds:
    """Whether one goes on, by the number of requests that hold a slot."""

    def __init__(self, num_slots: int, least_free: int) -> None:
        self._num_slots = num_slots
        self._least_free = least_free
        self._resume_at = num_slots
        """Most admitted requests with which a round begins. All slots: one goes on."""
        self._pool_was_full = False

    def may_admit(self, num_admitted: int, num_waiting: int) -> bool:
        is_last = num_waiting <= self._num_slots - num_admitted and not self._pool_was_full
        if num_admitted > self._resume_at and not is_last:
            return False
        self._resume_at = self._num_slots
        return True

    def admitted(self, num_admitted: int) -> None:
        """One more, which makes them so many."""
        self._pool_was_full = False
        if num_admitted == self._num_slots:
            self._end(num_admitted)

    def refused(self, num_admitted: int) -> None:
        """The pool was too full for the first that waits, beside so many."""
        self._pool_was_full = True
        self._end(num_admitted)

    def forget_refused(self) -> None:
        """What the pool was too full for may no longer be first, and what is may fit."""
        if self._pool_was_full:
            self._pool_was_full = False
            self._resume_at = self._num_slots

    def _end(self, num_admitted: int) -> None:
        done = max(1, num_admitted * self._least_free // self._num_slots)
        self._resume_at = max(0, num_admitted - done)
