"""Ends workers that stand still: `liveness` judges them, their supervisor starts them again."""

from __future__ import annotations

import signal
import time
from typing import Final

from ragfleet.claims import ClaimStore
from ragfleet.events import Event, OnEvent
from ragfleet.launch import Launch
from ragfleet.launchers.liveness import AwakeTime
from ragfleet.launchers.process import WorkerProcess

_DUMP_S: Final = 1.0
"""Time a stalled worker has to write its stacks."""


class Watch:
    """Over the workers of one supervisor."""

    def __init__(
        self, launch: Launch, store: ClaimStore, on_event: OnEvent, every_s: float
    ) -> None:
        """`every_s`: how often `look` is called."""
        self._launch, self._store, self._on_event = launch, store, on_event
        self._awake = AwakeTime(every_s, time.monotonic())

    def look(self, now_s: float) -> None:
        self._awake.look(now_s)

    def end_if_blocked(self, process: WorkerProcess, now_s: float) -> None:
        """End a request that blocks its engine, with the worker; it fails when claimed again."""
        row = process.life.blocking_row(now_s, self._awake)
        if row is None or process.timed_out:
            return
        process.timed_out = True
        self._store.time_out(row)
        self._note(
            process,
            f": a request took longer than {process.life.blocked_after_s:g} s"
            " (--request_timeout_s); it fails, and the worker is restarted",
        )
        process.kill()

    def end_if_stalled(self, process: WorkerProcess, now_s: float) -> None:
        """Restart a worker that loads, or is silent, or makes no progress, for too long."""
        if process.kill_at_s is not None:
            if now_s > process.kill_at_s:
                process.kill()
            return
        what = process.life.standstill(
            now_s, self._awake, self._launch.start_timeout_s, self._launch.stall_timeout_s
        )
        if what is not None:
            self._note(process, f" {what}; its stacks go to its log, and it is restarted")
            process.kill_at_s = now_s + _DUMP_S
            process.send(signal.SIGQUIT)

    def _note(self, process: WorkerProcess, text: str) -> None:
        rank = process.seat.rank
        self._on_event(Event("note", f"worker {rank}{text}", rank))
