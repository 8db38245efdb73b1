"""Starts workers, restarts the dead, passes signals on, and ends every process it started.

One supervisor watches all workers of a machine (`ragfleet infer`), or exactly one under torchrun,
where each rank is a supervisor of its own: so a dead worker is replaced alone, and its neighbours
keep their models. It waits on process handles, pipes and signals; the tick only refreshes what is
shown.

Several supervisors of one launch talk through files in the launch's folder: `gave_up.<rank>` says
that a worker will not be restarted again, `stop.json` that the whole run has to stop and why.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec

import ragfleet
from ragfleet import errors
from ragfleet.beats import Beat, read_beats
from ragfleet.claims import Board, ClaimStore
from ragfleet.errors import Interrupted, RagfleetError, RunError, StorageError, WorkersFailed
from ragfleet.events import Event, EventReader, OnEvent
from ragfleet.journal import read_journal
from ragfleet.launch import Launch, LaunchPaths, write_atomically
from ragfleet.leftovers import VARIABLE, end_tagged, tag
from ragfleet.poison import Suspicion

TICK_S: Final = 0.5
DRAIN_S: Final = 20.0
"""From a signal to the kill. torchrun and Slurm kill after 30 s, and the last words take time too.
"""
_FORCE_AFTER_S: Final = 2.0
"""Under torchrun one Ctrl-C arrives twice, so only a later one forces."""
_DUMP_S: Final = 1.0
"""Time a stalled worker has to write its stacks."""
_TIMEOUT_GRACE_S: Final = 5.0
_PROVEN: Final = 100
"""A worker that finished so many requests before it died starts counting its restarts anew."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where one worker runs."""

    rank: int
    environment: Mapping[str, str]
    num_gpus: int
    num_threads: int


@dataclass(slots=True, eq=False)
class _Process:
    seat: Seat
    incarnation: int
    popen: subprocess.Popen[bytes]
    events: EventReader
    pidfd: int | None
    blocked_after_s: float | None = None
    """Where a user's code can block the engine: how long it may."""
    timed_out: bool = False
    beat: Beat | None = None
    beat_seen_s: float = field(default_factory=time.monotonic)
    ready: bool = False
    moved_s: float = field(default_factory=time.monotonic)
    """When it was last seen to make progress."""
    kill_at_s: float | None = None

    @property
    def owner(self) -> str:
        return f"{self.seat.rank}.{self.incarnation}"


class Supervisor:
    """Runs some workers of a launch until every chunk of it is finished."""

    def __init__(
        self,
        paths: LaunchPaths,
        launch: Launch,
        seats: Sequence[Seat],
        *,
        logs: Path,
        num_chunks: int,
        max_restarts: int,
        on_event: OnEvent,
        on_tick: Callable[[Mapping[str, Beat]], None] | None = None,
        keep_fds: tuple[int, ...] = (),
        parent_pid: int | None = None,
    ) -> None:
        """
        Args:
            keep_fds: descriptors that workers inherit (the run's lock lives as long as they do).
            parent_pid: drain when this process, our parent, dies.
        """
        self._paths, self._launch, self._logs = paths, launch, logs
        self._num_chunks, self._max_restarts = num_chunks, max_restarts
        self._on_event, self._on_tick, self._keep_fds = on_event, on_tick, keep_fds
        self._store = ClaimStore(paths.claims)
        self._running: dict[int, _Process] = {}
        self._deaths: dict[int, int] = {seat.rank: 0 for seat in seats}
        self._incarnations: dict[int, int] = {seat.rank: 0 for seat in seats}
        self._seats = seats
        self._selector = selectors.DefaultSelector()
        self._error: RagfleetError | None = None
        self._deadline_s: float | None = None
        self._signalled_s: float | None = None
        self._parent_pid = parent_pid

    # ---- the loop

    def run(self) -> None:
        """Returns when every chunk is finished.

        Raises:
            Interrupted: a signal; what was in flight for longer than the grace is dropped.
            WorkersFailed: no worker of the launch is left.
            RagfleetError: what a worker found that stops the whole run.
        """
        with _Signals(self._on_signal) as signals, _ParentWatch(self._parent_pid) as parent:
            if signals.fd is not None:
                self._selector.register(signals.fd, selectors.EVENT_READ, signals.read)
            if parent is not None:
                self._selector.register(parent, selectors.EVENT_READ, self._on_orphaned)
            try:
                for seat in self._seats:
                    self._spawn(seat)
                if self._parent_pid not in (None, os.getppid()):
                    self._on_orphaned()  # it died before it could be watched
                while not self._is_over():
                    for key, _ in self._selector.select(TICK_S):
                        key.data()
                    self._reap()
                    self._tick()
            finally:
                for process in list(self._running.values()):
                    self._end(process)
                    self._forget(process)
                self._selector.close()
        if self._error is not None:
            raise self._error

    def _is_over(self) -> bool:
        if self._running:
            return False
        if self._error is not None or self._all_done():
            return True
        if len(self._gave_up()) >= self._launch.num_started:
            self._error = WorkersFailed(
                f"No worker is left. Each died more than {self._max_restarts} times in a row; the"
                f" logs say why: {self._logs}"
            )
            return True
        return False

    def _all_done(self) -> bool:
        done = sum(name.endswith(".done") for name in os.listdir(self._paths.claims))
        return done >= self._num_chunks

    def _gave_up(self) -> list[str]:
        return [name for name in os.listdir(self._paths.directory) if name.startswith("gave_up.")]

    def _tick(self) -> None:
        now_s = time.monotonic()
        beats = read_beats(self._paths.beats)
        for process in list(self._running.values()):
            beat = beats.get(process.owner)
            if beat is not None and (
                process.beat is None or beat.sequence != process.beat.sequence
            ):
                if process.beat is None or _progress(beat) != _progress(process.beat):
                    process.moved_s = now_s
                process.beat, process.beat_seen_s = beat, now_s
            self._end_if_blocked(process, now_s)
            self._end_if_stalled(process, now_s)
        if self._on_tick is not None:
            self._on_tick(beats)
        self._obey_stop_file()
        if self._deadline_s is None and self._all_done():
            # One that is frozen, or still loading, must not keep a finished run from its merge.
            self._deadline_s = now_s + DRAIN_S
        if self._deadline_s is not None and now_s > self._deadline_s:
            for process in self._running.values():
                _kill_group(process.popen.pid)

    # ---- workers

    def _spawn(self, seat: Seat) -> None:
        incarnation = self._incarnations[seat.rank]
        self._incarnations[seat.rank] += 1
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        # This tree's package, and not one from the working directory or another installation.
        source = str(Path(ragfleet.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (source, seat.environment.get("PYTHONPATH"))))
        numbers = (seat.rank, incarnation, seat.num_gpus, seat.num_threads, os.getpid(), write_fd)
        command = [sys.executable, "-P", "-m", "ragfleet.worker_main", str(self._paths.directory)]
        with open(self._logs / f"worker_{seat.rank}.log", "ab") as log:
            popen = subprocess.Popen(
                command + [str(number) for number in numbers],
                env={
                    **seat.environment,
                    "PYTHONPATH": path,
                    VARIABLE: tag(self._launch.launch_id, f"{seat.rank}.{incarnation}"),
                },
                umask=0o077 if self._launch.private else -1,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(write_fd, *self._keep_fds),
                start_new_session=True,
            )
        os.close(write_fd)
        pidfd = os.pidfd_open(popen.pid) if hasattr(os, "pidfd_open") else None
        process = _Process(seat, incarnation, popen, EventReader(read_fd), pidfd)
        self._running[seat.rank] = process
        self._selector.register(read_fd, selectors.EVENT_READ, lambda: self._read_events(process))
        if pidfd is not None:
            self._selector.register(pidfd, selectors.EVENT_READ, lambda: None)  # wakes `_reap`

    def _read_events(self, process: _Process) -> None:
        events = process.events.read()
        if events is None:
            self._selector.unregister(process.events.fd)
            return
        for event in events:
            if event.kind == "ready":
                process.ready, process.moved_s = True, time.monotonic()
                process.blocked_after_s = event.data.get("blocked_after_s")
            if event.kind == "fatal":
                self._stop(_error_from(event.data.get("error", ""), event.message))
            else:
                self._on_event(event)

    def _reap(self) -> None:
        """Notice workers that ended, and end whatever they left behind."""
        for process in list(self._running.values()):
            flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
            if os.waitid(os.P_PID, process.popen.pid, flags) is None:
                continue
            code = self._end(process)
            while process.events.fd in self._selector.get_map():
                self._read_events(process)
            self._forget(process)
            in_flight = read_journal(self._paths.journals / process.owner)
            if code != 0 and not process.timed_out and self._error is None:
                self._store.record_death(process.owner, in_flight)
            self._store.bury(process.owner)
            # Exit code 0 too: a signal from outside, or a user's os._exit, is no reason to wait.
            if self._error is None and not self._all_done():
                self._replace(process, code)

    def _replace(self, process: _Process, code: int) -> None:
        rank = process.seat.rank
        log = self._logs / f"worker_{rank}.log"
        finished = process.beat.succeeded + process.beat.failed if process.beat else 0
        if process.timed_out and process.beat is not None and process.beat.succeeded:
            self._spawn(process.seat)  # one request hung, and others did not
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self._was_trial(process):
            self._on_event(
                Event("died", f"worker {rank} died ({how}) while suspects were tried", rank)
            )
            self._spawn(process.seat)
            return
        self._deaths[rank] = 1 if finished >= _PROVEN else self._deaths[rank] + 1
        if self._deaths[rank] <= self._max_restarts:
            self._on_event(
                Event(
                    "died",
                    f"worker {rank} died ({how}); restarting, {self._deaths[rank]} of"
                    f" {self._max_restarts}. Its log: {log}",
                    rank,
                )
            )
            self._spawn(process.seat)
            return
        (self._paths.directory / f"gave_up.{rank}").touch()
        self._store.give_up(rank)
        self._on_event(
            Event("gave_up", f"worker {rank} died ({how}) and is given up. Its log: {log}", rank)
        )

    def _was_trial(self, process: _Process) -> bool:
        """Whether all it had in flight were suspects already: such a death narrows them down."""
        board = Board(slices=(), costs=())
        self._store.refresh(board)
        rows = board.deaths.pop(process.owner, ())
        before = Suspicion.of(board.deaths.values())
        return bool(rows) and all(before.is_suspect(row) for row in rows)

    def _forget(self, process: _Process) -> None:
        for fd in (process.pidfd, process.events.fd):
            if fd is not None:
                if fd in self._selector.get_map():
                    self._selector.unregister(fd)
                os.close(fd)
        self._running.pop(process.seat.rank, None)

    def _end(self, process: _Process) -> int:
        """End a worker, its group and whoever left the group; the worker's exit code."""
        _kill_group(process.popen.pid)  # not reaped yet, so its number still names its group
        code = process.popen.wait()
        end_tagged(tag(self._launch.launch_id, process.owner))
        return code

    def _end_if_blocked(self, process: _Process, now_s: float) -> None:
        """End a request that blocks its engine, with the worker; it fails when claimed again."""
        limit_s, beat = process.blocked_after_s, process.beat
        if limit_s is None or beat is None or beat.oldest_row is None:
            return
        age_s = beat.oldest_s + (now_s - process.beat_seen_s)
        if age_s > limit_s + _TIMEOUT_GRACE_S and not process.timed_out:
            process.timed_out = True
            self._store.time_out(beat.oldest_row)
            self._on_event(
                Event(
                    "note",
                    f"worker {process.seat.rank}: a request took longer than {limit_s:g} s"
                    " (--request_timeout_s); it fails, and the worker is restarted",
                    process.seat.rank,
                )
            )
            _kill_group(process.popen.pid)

    def _end_if_stalled(self, process: _Process, now_s: float) -> None:
        """Restart a worker that loads, or is silent, or makes no progress, for too long."""
        if process.kill_at_s is not None:
            if now_s > process.kill_at_s:
                _kill_group(process.popen.pid)
            return
        beat, silent_s = process.beat, now_s - process.beat_seen_s
        stuck_s = now_s - process.moved_s
        limit_s = self._launch.stall_timeout_s
        if process.blocked_after_s is not None:  # a user's code has its own, longer limit
            limit_s = max(limit_s, process.blocked_after_s + 2 * _TIMEOUT_GRACE_S)
        if not process.ready:
            what, is_stalled = "is loading", stuck_s > self._launch.start_timeout_s
        elif beat is not None and (beat.in_flight or beat.state == "generating"):
            # Nothing in flight while generating: it reads or renders, where templates and a user's
            # create_prompt may hang; one with nothing to do is "waiting".
            what, is_stalled = "makes no progress", stuck_s > limit_s
        else:
            what, is_stalled = "gives no sign of life", silent_s > limit_s
        if is_stalled:
            stuck_s = max(stuck_s, silent_s) if process.ready else stuck_s
            self._on_event(
                Event(
                    "note",
                    f"worker {process.seat.rank} {what} for {stuck_s:.0f} s; its stacks go to its"
                    " log, and it is restarted",
                    process.seat.rank,
                )
            )
            process.kill_at_s = now_s + _DUMP_S
            process.popen.send_signal(signal.SIGQUIT)

    # ---- stopping

    def _stop(self, error: RagfleetError) -> None:
        """Stop the whole run, here and at the other supervisors."""
        if self._error is None:
            self._error = error
            self._drain(DRAIN_S)
            if not isinstance(error, Interrupted):
                text = {"error": type(error).__name__, "message": str(error)}
                # A full disk must not keep this run from stopping; others will notice it too.
                with contextlib.suppress(StorageError):
                    write_atomically(self._stop_file, msgspec.json.encode(text))

    @property
    def _stop_file(self) -> Path:
        return self._paths.directory / "stop.json"

    def _obey_stop_file(self) -> None:
        if self._error is None and self._stop_file.exists():
            said: dict[str, Any] = msgspec.json.decode(self._stop_file.read_bytes())
            self._error = _error_from(said["error"], said["message"])
            self._drain(DRAIN_S)

    def _drain(self, seconds: float) -> None:
        self._deadline_s = time.monotonic() + seconds
        for process in self._running.values():
            # Popen.send_signal would reap a worker that has just ended, behind `_reap`'s back.
            os.kill(process.popen.pid, signal.SIGTERM)

    def _on_signal(self, number: int) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            in_flight = sum(p.beat.in_flight for p in self._running.values() if p.beat)
            self._on_event(
                Event(
                    "interrupting",
                    f"{signal.Signals(number).name}: no new requests; up to {DRAIN_S:.0f} s for the"
                    f" {in_flight} in flight. Ctrl-C again drops them.",
                )
            )
            self._stop(Interrupted("interrupted", number))
        elif number == signal.SIGINT and now_s - self._signalled_s > _FORCE_AFTER_S:
            self._deadline_s = now_s

    def _on_orphaned(self) -> None:
        if self._signalled_s is None:
            self._on_signal(signal.SIGTERM)


def _progress(beat: Beat) -> tuple[object, ...]:
    return beat.progress, beat.succeeded, beat.failed, beat.in_flight, beat.chunk, beat.state


def _error_from(name: str, message: str) -> RagfleetError:
    kind = getattr(errors, name, RunError)
    if isinstance(kind, type) and issubclass(kind, RagfleetError) and kind is not Interrupted:
        return kind(message)
    return RunError(message)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class _Signals:
    """Turns signals into readable bytes while a run goes on; what nohup ignores stays ignored."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._old: dict[int, Any] = {}
        self.fd: int | None = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        os.write(self._write_fd, bytes([number]))

    def read(self) -> None:
        assert self.fd is not None
        for number in os.read(self.fd, 64):
            self._on_signal(number)

    def __exit__(self, *exception: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        if self.fd is not None:
            os.close(self.fd)
            os.close(self._write_fd)


class _ParentWatch:
    """A handle of the parent process, readable when it has died; None where there are none."""

    def __init__(self, pid: int | None) -> None:
        self._fd: int | None = None
        if pid is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(ProcessLookupError):
                self._fd = os.pidfd_open(pid)

    def __enter__(self) -> int | None:
        return self._fd

    def __exit__(self, *exception: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
