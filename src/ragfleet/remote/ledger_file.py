"""Where the run-wide account is kept: one small file in the launch's folder, locked for each use.

Where files can't be locked, every worker keeps an account of its own, in a file of its own, with
its share of the limits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from ragfleet.errors import RemoteError
from ragfleet.remote.ledger import Budget, Lease, Ledger, Report, exchange, new_ledger

NAME: Final = "rates.json"
_MOST_BYTES: Final = 1 << 18
_LENGTH_BYTES: Final = 8


class LedgerFile:
    """The account of a launch as one worker sees it."""

    def __init__(self, path: Path | None, budget: Budget, num_workers: int, rank: int = 0) -> None:
        """`path` None: an account in memory, for a single worker without a launch."""
        self._path, self._budget = path, budget
        self._num_workers, self._rank = num_workers, rank
        self._fd = -1
        self._memory: Ledger | None = None
        self.is_shared = path is not None
        if path is None:
            self._memory = new_ledger(budget)
            return
        try:
            self._fd = _open(path)
            with self._locked():
                pass
        except OSError:
            self._part_with_others()

    def exchange(self, report: Report) -> Lease:
        """Report and ask: see `ledger.exchange`. Raises RemoteError for a damaged account."""
        if self._memory is not None:
            return exchange(self._memory, self._budget, report)
        try:
            with self._locked():
                return self._exchange(report)
        except OSError:
            if not self.is_shared:
                raise
            self._part_with_others()
            return self._exchange(report)

    def _exchange(self, report: Report) -> Lease:
        if not self.is_shared:  # what the server says holds for all workers
            report.requests_per_minute = _divided(report.requests_per_minute, self._num_workers)
            report.tokens_per_minute = _divided(report.tokens_per_minute, self._num_workers)
        ledger = self._read()
        lease = exchange(ledger, self._budget, report)
        _write(self._fd, ledger)
        return lease

    def _read(self) -> Ledger:
        data = os.pread(self._fd, _MOST_BYTES, 0)
        try:
            return _decode(data)
        except (msgspec.DecodeError, ValueError):
            if not self._budget.is_limited:
                return new_ledger(self._budget)  # only what was learned is lost
            raise RemoteError(
                f"The account of what this run has spent is damaged ({self._path}). Run the same"
                " command again: it is summed up anew from the answers."
            ) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.is_shared:
            yield
            return
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _part_with_others(self) -> None:
        """Go on with a share of the limits and of what was spent, in a file nobody else writes."""
        assert self._path is not None
        share, budget = self._num_workers, self._budget
        spent = (0.0, 0.0)
        with contextlib.suppress(OSError, msgspec.DecodeError, ValueError):
            spent = _decode(self._path.read_bytes()).spent
        self._budget = msgspec.structs.replace(
            budget,
            requests_per_minute=_divided(budget.requests_per_minute, share),
            tokens_per_minute=_divided(budget.tokens_per_minute, share),
            max_cost=_divided(budget.max_cost, share),
            max_tokens_total=None
            if budget.max_tokens_total is None
            else budget.max_tokens_total // share,
        )
        self.close()
        self.is_shared = False
        own = self._path.with_name(f"rates.{self._rank}.json")
        is_new = not own.exists()
        self._fd = _open(own)
        if is_new:
            _write(self._fd, new_ledger(self._budget, (spent[0] / share, spent[1] / share)))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_ledger(path: Path, budget: Budget, spent: tuple[float, float]) -> None:
    """Begin a launch's account with what earlier starts of the run have spent."""
    fd = _open(path)
    try:
        _write(fd, new_ledger(budget, spent))
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _write(fd: int, ledger: Ledger) -> None:
    """One write, with the length in front: what an earlier, longer state left behind is ignored."""
    data = msgspec.json.encode(ledger)
    os.pwrite(fd, b"%0*d" % (_LENGTH_BYTES, len(data)) + data, 0)


def _decode(data: bytes) -> Ledger:
    length = int(data[:_LENGTH_BYTES])
    return msgspec.json.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + length], type=Ledger)


def _divided(limit: float | None, share: int) -> float | None:
    return None if limit is None else limit / share
