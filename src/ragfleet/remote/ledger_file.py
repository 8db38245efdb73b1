"""Where the run-wide account is kept: one small file in the launch's folder, locked for each use.

Where files can't be locked, every worker keeps an account of its own with its share of the limits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ragfleet.remote.ledger import Budget, Lease, Ledger, Report, exchange, new_ledger

NAME = "rates.json"
_MOST_BYTES = 1 << 16


class LedgerFile:
    """The account of a launch as one worker sees it."""

    def __init__(self, path: Path | None, budget: Budget, num_workers: int) -> None:
        """`path` None: an account of its own, for a single worker."""
        self._budget = budget
        self._num_workers = num_workers
        self._fd = -1
        self._own: Ledger | None = None
        if path is None:
            self._own = new_ledger(budget)
            return
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if self._fd < 0:
            self._part_with_others()

    @property
    def is_shared(self) -> bool:
        return self._own is None

    def exchange(self, report: Report) -> Lease:
        """Report and ask: see `ledger.exchange`."""
        if self._own is None:
            with self._locked() as ledger:
                if ledger is not None:
                    lease = exchange(ledger, self._budget, report)
                    os.pwrite(self._fd, msgspec.json.encode(ledger).ljust(2048), 0)
                    return lease
        assert self._own is not None
        return exchange(self._own, self._budget, report)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Ledger | None]:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError:
            self._part_with_others()
            yield None
            return
        try:
            data = os.pread(self._fd, _MOST_BYTES, 0)
            try:
                ledger = msgspec.json.decode(data, type=Ledger)
            except msgspec.DecodeError:
                ledger = new_ledger(self._budget)  # the first to come
            yield ledger
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _part_with_others(self) -> None:
        share = self._num_workers
        budget = self._budget
        self._budget = msgspec.structs.replace(
            budget,
            requests_per_minute=_divided(budget.requests_per_minute, share),
            tokens_per_minute=_divided(budget.tokens_per_minute, share),
            max_cost=_divided(budget.max_cost, share),
            max_tokens_total=None
            if budget.max_tokens_total is None
            else budget.max_tokens_total // share,
        )
        self._own = new_ledger(self._budget)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_ledger(path: Path, budget: Budget, spent: tuple[float, float]) -> None:
    """Begin a launch's account with what earlier starts of the run have spent."""
    path.write_bytes(msgspec.json.encode(new_ledger(budget, spent)).ljust(2048))


def _divided(limit: float | None, share: int) -> float | None:
    return None if limit is None else limit / share
