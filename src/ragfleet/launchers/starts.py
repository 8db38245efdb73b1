"""Workers that could not start: is it one worker's trouble, or everybody's?

A broken model or a flag that means nothing meets every worker alike, and the run ends with the
reason before anything is spent. A GPU that fell off the bus, or memory that somebody took, meets
one: the others start, and this one has died as workers die. So a failed start is held until another
worker is ready, or none is left that could be.

Known through files in the launch's folder, for under torchrun each worker has a supervisor of its
own. Knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Final, Generic, Literal, TypeVar

_READY: Final = "was_ready"
_FAILED: Final = "failed_start."
_GAVE_UP: Final = "gave_up."
T = TypeVar("T", bound=Hashable)


class Starts(Generic[T]):
    """Of one launch. T: what a supervisor knows of a failed start."""

    def __init__(self, directory: Path, num_started: int) -> None:
        """`directory` of the launch, in which `num_started` workers start."""
        self._directory = directory
        self._num_started = num_started
        self._held: dict[int, T] = {}

    def succeed(self) -> None:
        """A worker is ready."""
        (self._directory / _READY).touch()

    def fail(self, rank: int, start: T) -> None:
        """A worker could not start."""
        self._held[rank] = start
        (self._directory / f"{_FAILED}{rank}").touch()

    def give_up(self, rank: int) -> None:
        """A worker is not started again."""
        (self._directory / f"{_GAVE_UP}{rank}").touch()

    @property
    def is_holding(self) -> bool:
        return bool(self._held)

    def all_given_up(self) -> bool:
        return len(self._named(_GAVE_UP)) >= self._num_started

    def verdict(self) -> Literal["nobody's", "not known", "its own", "everybody's"]:
        """Whose trouble the held ones are."""
        if not self._held:
            return "nobody's"
        if (self._directory / _READY).exists():
            return "its own"
        hopeless = self._named(_FAILED) | self._named(_GAVE_UP)
        return "everybody's" if len(hopeless) >= self._num_started else "not known"

    def release(self) -> list[T]:
        """The held ones, by rank, which are nobody's concern here any more."""
        released = [self._held[rank] for rank in sorted(self._held)]
        for rank in self._held:
            (self._directory / f"{_FAILED}{rank}").unlink(missing_ok=True)
        self._held.clear()
        return released

    def _named(self, prefix: str) -> set[str]:
        """Ranks with such a file."""
        return {path.name.removeprefix(prefix) for path in self._directory.glob(f"{prefix}*")}
