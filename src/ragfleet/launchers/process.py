"""One worker process as its supervisor sees it: started, heard, ended with all that it started."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ragfleet
from ragfleet.errors import RagfleetError
from ragfleet.events import Event, EventReader
from ragfleet.launch import LaunchPaths
from ragfleet.launchers.liveness import Life
from ragfleet.leftovers import VARIABLE, end_tagged, tag

DEATH_S: Final = 30.0
"""From a kill to its effect. A process that hangs in a driver has none, and is not waited for."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one worker runs."""

    rank: int
    environment: Mapping[str, str]
    num_gpus: int
    num_threads: int


class WorkerProcess:
    """A started worker. `pidfd` and `events_fd` become readable when there is news of it."""

    def __init__(
        self,
        seat: Seat,
        incarnation: int,
        paths: LaunchPaths,
        launch_id: str,
        *,
        log: Path,
        keep_fds: tuple[int, ...] = (),
        private: bool = False,
    ) -> None:
        self.seat, self.owner = seat, f"{seat.rank}.{incarnation}"
        self.tag = tag(launch_id, self.owner)
        now_s = time.monotonic()
        self.life = Life(beat_seen_s=now_s, moved_s=now_s)
        self.timed_out = False
        self.start_error: RagfleetError | None = None
        """Why it could not start."""
        self.start_failed_s = math.inf
        """When it said so."""
        self.kill_at_s: float | None = None
        """When a stalled worker has had its time to write its stacks."""
        self.killed_s: float | None = None
        """When it was first killed."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        # What escaped from a dead worker may hold the other end for ever.
        os.set_blocking(read_fd, False)
        self._events: EventReader | None = EventReader(read_fd)
        self.events_fd = read_fd
        self.pidfd: int | None = None
        # This tree's package, and not one from the working directory or another installation.
        source = str(Path(ragfleet.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (source, seat.environment.get("PYTHONPATH"))))
        numbers = (seat.rank, incarnation, seat.num_gpus, seat.num_threads, os.getpid(), write_fd)
        command = [sys.executable, "-P", "-m", "ragfleet.worker_main", str(paths.directory)]
        try:
            with open(log, "ab") as log_file:
                self._popen = subprocess.Popen(
                    command + [str(number) for number in numbers],
                    env={
                        **seat.environment,
                        "PYTHONPATH": path,
                        VARIABLE: self.tag,
                        # Else a process that sets its title writes over the variable above.
                        "SPT_NOENV": "1",
                    },
                    umask=0o077 if private else -1,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    pass_fds=(write_fd, *keep_fds),
                    start_new_session=True,
                )
        except OSError:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self.pid = self._popen.pid
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # without one it is looked at in every tick
                self.pidfd = os.pidfd_open(self.pid)

    def read_events(self) -> list[Event] | None:
        """What it said since; None when there will be no more, or none now."""
        if self._events is None:
            return None
        try:
            events = self._events.read()
        except BlockingIOError:
            return None
        if events is None:
            self._events = None
        return events

    @property
    def is_silent(self) -> bool:
        """Nobody can say anything for it any more."""
        return self._events is None

    def has_ended(self) -> bool:
        """It stays unreaped, so that its number goes on naming its group: see `end`."""
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def send(self, number: int) -> None:
        # Popen.send_signal would reap a worker that has just ended, behind `has_ended`'s back.
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.killed_s is None:
            self.killed_s = time.monotonic()
        kill_group(self.pid)

    def end(self) -> int | None:
        """End it, its group and whoever left the group; its exit code, None without one."""
        self.kill()
        code: int | None
        try:
            code = self._popen.wait(timeout=DEATH_S)
        except subprocess.TimeoutExpired:
            code = None
        end_tagged(self.tag)
        return code

    def close(self) -> None:
        for fd in (self.pidfd, self.events_fd):
            if fd is not None:
                os.close(fd)


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
