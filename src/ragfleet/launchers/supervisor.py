"""Starts workers, restarts the dead, passes signals on, and ends every process it started.

One supervisor watches all workers of a machine (`ragfleet infer`), or exactly one under torchrun,
where each rank is a supervisor of its own: so a dead worker is replaced alone, and its neighbours
keep their models. It waits on process handles, pipes and signals; the tick only refreshes what is
shown.

Several supervisors of one launch talk through files in the launch's folder: those of `starts`, and
`stop.json`, which says that the whole run has to stop and why.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ragfleet.beats import Beat, read_beats
from ragfleet.claims import Board, ClaimStore
from ragfleet.errors import (
    Interrupted,
    RagfleetError,
    StorageError,
    UsageError,
    WorkersFailed,
    cannot_go_on,
    error_named,
)
from ragfleet.events import Event, OnEvent
from ragfleet.journal import LastWords, read_journal
from ragfleet.launch import Launch, LaunchPaths, write_atomically
from ragfleet.launchers.process import DEATH_S, Seat, WorkerProcess
from ragfleet.launchers.restarts import Restarts, Verdict
from ragfleet.launchers.signals import ParentWatch, Signals
from ragfleet.launchers.starts import Starts
from ragfleet.launchers.watch import Watch
from ragfleet.leftovers import Orphanage
from ragfleet.poison import Suspicion

TICK_S: Final = 0.5
DRAIN_S: Final = 20.0
"""From a signal to the kill. torchrun and Slurm kill after 30 s, and the last words take time too.
"""
_FORCE_AFTER_S: Final = 2.0
"""Under torchrun one Ctrl-C arrives twice, so only a later one forces."""
_LEAVE_S: Final = 5.0
"""From a worker's last word to its end."""
START_AGAIN_S: Final = 5.0
"""After a worker that could not start, for each of its deaths: what took its GPU or its memory may
be gone by then."""


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
        owns_process: bool = False,
    ) -> None:
        """
        Args:
            keep_fds: descriptors that workers inherit (the run's lock lives as long as they do).
            parent_pid: drain when this process, our parent, dies.
            owns_process: this process has no other children than the workers, so what they leave
                behind may be adopted by it, and ended.
        """
        self._paths, self._launch, self._logs = paths, launch, logs
        self._num_chunks, self._max_restarts = num_chunks, max_restarts
        self._restarts = {seat.rank: Restarts(max_restarts) for seat in seats}
        self._on_event, self._on_tick, self._keep_fds = on_event, on_tick, keep_fds
        self._store = ClaimStore(paths.claims)
        self._running: dict[int, WorkerProcess] = {}
        self._incarnations: dict[int, int] = {seat.rank: 0 for seat in seats}
        self._starts: Starts[WorkerProcess] = Starts(paths.directory, launch.num_started)
        self._later: dict[int, float] = {}
        """When workers that could not start are started again, by rank."""
        self._last_error = ""
        self._seats = seats
        self._selector = selectors.DefaultSelector()
        self._error: RagfleetError | None = None
        self._deadline_s: float | None = None
        self._signalled_s: float | None = None
        self._watch = Watch(launch, self._store, on_event, TICK_S)
        self._parent_pid = parent_pid
        self._orphanage = Orphanage() if owns_process else None

    # ---- the loop

    def run(self) -> None:
        """Returns when every chunk is finished.

        Raises:
            Interrupted: a signal; what was in flight for longer than the grace is dropped.
            WorkersFailed: no worker of the launch is left.
            RagfleetError: what a worker found that stops the whole run.
        """
        with Signals(self._on_signal) as signals, ParentWatch(self._parent_pid) as parent:
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
                    self._judge_starts()
                    self._tick()
            except OSError as error:
                self._error = self._error or cannot_go_on(error)
            finally:
                for process in self._running.values():
                    process.kill()
                for process in self._running.values():
                    process.end()
                    self._forget(process)
                self._selector.close()
                if self._orphanage is not None:
                    self._orphanage.end()
        if self._error is not None:
            raise self._error

    def _is_over(self) -> bool:
        if self._running:
            return False
        if self._error is not None or self._all_done():
            return True
        if self._starts.all_given_up():
            self._error = WorkersFailed(
                f"No worker is left. Each died more than {self._max_restarts} times and nothing"
                f" explains it, or can't be ended; the logs say why: {self._logs}{self._last_error}"
            )
            return True
        return False

    def _all_done(self) -> bool:
        done = sum(name.endswith(".done") for name in os.listdir(self._paths.claims))
        return done >= self._num_chunks

    def _tick(self) -> None:
        now_s = time.monotonic()
        beats = read_beats(self._paths.beats)
        self._watch.look(now_s)
        for process in list(self._running.values()):
            if process.owner in beats:
                process.life.observe(beats[process.owner], now_s)
            self._watch.end_if_blocked(process, now_s)
            self._watch.end_if_stalled(process, now_s)
            if process.life.has_left_for(_LEAVE_S, now_s) or (
                now_s > process.start_failed_s + _LEAVE_S
            ):
                process.kill()  # a thread that somebody started keeps it, or a driver
            if process.killed_s is not None and now_s > process.killed_s + DEATH_S:
                self._abandon(process)
        if self._on_tick is not None:
            self._on_tick(beats)
        self._obey_stop_file()
        for rank in [rank for rank, due_s in self._later.items() if now_s > due_s]:
            del self._later[rank]
            if self._error is None and not self._all_done():
                self._spawn(next(seat for seat in self._seats if seat.rank == rank))
        if self._deadline_s is None and self._all_done():
            # One that is frozen, or still loading, must not keep a finished run from its merge.
            self._deadline_s = now_s + DRAIN_S
        if self._deadline_s is not None and now_s > self._deadline_s:
            for process in self._running.values():
                process.kill()

    # ---- workers

    def _spawn(self, seat: Seat) -> None:
        incarnation = self._incarnations[seat.rank]
        self._incarnations[seat.rank] += 1
        self._logs.mkdir(parents=True, exist_ok=True)
        process = WorkerProcess(
            seat,
            incarnation,
            self._paths,
            self._launch.launch_id,
            log=self._log_of(seat.rank),
            keep_fds=self._keep_fds,
            private=self._launch.private,
        )
        self._running[seat.rank] = process
        self._selector.register(
            process.events_fd, selectors.EVENT_READ, lambda: self._read_events(process)
        )
        if process.pidfd is not None:
            self._selector.register(process.pidfd, selectors.EVENT_READ, lambda: None)  # `_reap`

    def _log_of(self, rank: int) -> Path:
        return self._logs / f"worker_{rank}.log"

    def _read_events(self, process: WorkerProcess) -> None:
        """Pass on all that a worker has said."""
        while (events := process.read_events()) is not None:
            for event in events:
                if event.kind == "ready":
                    process.life.become_ready(time.monotonic(), event.data.get("blocked_after_s"))
                    self._starts.succeed()
                if event.kind != "fatal":
                    self._on_event(event)
                    continue
                error = error_named(event.data.get("error", ""), event.message)
                if isinstance(error, UsageError) and not process.life.ready:
                    # Whose trouble it is shows later.
                    process.start_error, process.start_failed_s = error, time.monotonic()
                else:
                    self._stop(error)
        if process.is_silent and process.events_fd in self._selector.get_map():
            self._selector.unregister(process.events_fd)

    def _reap(self) -> None:
        """Notice workers that ended, and end whatever they left behind."""
        for process in list(self._running.values()):
            if not process.has_ended():
                continue
            code = process.end()
            del self._running[process.seat.rank]  # its number means nothing any more
            self._read_events(process)
            self._forget(process)
            if self._orphanage is not None and not self._running:
                self._orphanage.end()  # a GPU it holds is missing when the next worker loads
            in_flight = self._last_words(process).in_flight
            if code != 0 and not process.timed_out and self._error is None:
                self._store.record_death(process.owner, in_flight)
            self._store.bury(process.owner)
            # Exit code 0 too: a signal from outside, or a user's os._exit, is no reason to wait.
            if self._error is not None or self._all_done():
                continue
            if process.start_error is not None:
                rank = process.seat.rank
                self._starts.fail(rank, process)
                if self._starts.verdict() == "not known":
                    text = f"worker {rank} could not start: {process.start_error}".rstrip(".")
                    self._on_event(Event("note", f"{text}. Others still load.", rank))
            else:
                self._replace(process, code or 0)
        if self._orphanage is not None:
            self._orphanage.reap({process.pid for process in self._running.values()})

    def _judge_starts(self) -> None:
        """Of workers that could not start: stop the run, or go on as after a death."""
        verdict = self._starts.verdict()
        if self._error is not None or verdict in ("nobody's", "not known"):
            return
        for process in self._starts.release():
            error = process.start_error
            assert error is not None
            if verdict == "its own":
                self._replace(process, 0)
            else:
                log = self._log_of(process.seat.rank)
                self._stop(type(error)(f"{error}\nThe log of worker {process.seat.rank}: {log}"))

    def _replace(self, process: WorkerProcess, code: int) -> None:
        rank, log, beat = process.seat.rank, self._log_of(process.seat.rank), process.life.beat
        if process.timed_out and beat is not None and beat.succeeded:
            self._spawn(process.seat)  # one request hung, and others did not
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._last_error = ""
        if process.start_error is not None:
            how = f"it could not start: {process.start_error}"
            self._last_error = f"\nThe last one said: {process.start_error}"
        restarts = self._restarts[rank]
        verdict = self._verdict(process)
        if verdict == "give up":
            self._give_up(rank)
            text = f"worker {rank} died ({how}) and is given up. Its log: {log}"
            self._on_event(Event("gave_up", text, rank))
            return
        what = " while suspects were tried"
        if verdict == "restart":
            count = f", {restarts.count} of {restarts.most}" if restarts.count else ""
            what = f"; restarting{count}. Its log: {log}"
        self._on_event(Event("died", f"worker {rank} died ({how}){what}", rank))
        if process.start_error is None:
            self._spawn(process.seat)
        else:
            self._later[rank] = time.monotonic() + START_AGAIN_S * restarts.count

    def _verdict(self, process: WorkerProcess) -> Verdict:
        board = Board(slices=(), costs=())
        self._store.refresh(board)
        after = Suspicion.of(board.deaths.values())
        rows = board.deaths.pop(process.owner, ())
        return self._restarts[process.seat.rank].died(
            rows,
            num_answered=self._last_words(process).num_answered,
            before=Suspicion.of(board.deaths.values()),
            after=after,
        )

    def _last_words(self, process: WorkerProcess) -> LastWords:
        return read_journal(self._paths.journals / process.owner)

    def _forget(self, process: WorkerProcess) -> None:
        for fd in (process.pidfd, process.events_fd):
            if fd is not None and fd in self._selector.get_map():
                self._selector.unregister(fd)
        process.close()

    def _abandon(self, process: WorkerProcess) -> None:
        """Go on without a worker that hangs in the kernel; others take over what it held."""
        rank = process.seat.rank
        self._on_event(
            Event(
                "gave_up",
                f"worker {rank} (process {process.pid}) can't be ended, it hangs in the"
                " system; it is left behind, and no other takes its place",
                rank,
            )
        )
        del self._running[rank]
        self._forget(process)
        if not process.timed_out and self._error is None:
            in_flight = self._last_words(process).in_flight
            self._store.record_death(process.owner, in_flight)
        self._store.bury(process.owner)
        self._give_up(rank)

    def _give_up(self, rank: int) -> None:
        self._starts.give_up(rank)
        self._store.give_up(rank)

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
            self._error = error_named(said["error"], said["message"])
            self._drain(DRAIN_S)

    def _drain(self, seconds: float) -> None:
        self._deadline_s = time.monotonic() + seconds
        for process in self._running.values():
            if process.life.ready:
                process.send(signal.SIGTERM)
            else:
                process.kill()  # it has nothing to finish, and loading can take minutes

    def _on_signal(self, number: int) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            beats = (process.life.beat for process in self._running.values())
            in_flight = sum(beat.in_flight for beat in beats if beat is not None)
            self._on_event(
                Event(
                    "interrupting",
                    f"{signal.Signals(number).name}: no new requests; up to {DRAIN_S:.0f} s for the"
                    f" {in_flight} in flight. Ctrl-C again, after"
                    f" {_FORCE_AFTER_S:.0f} s, drops them.",
                )
            )
            self._stop(Interrupted("interrupted", number))
        elif number == signal.SIGINT and now_s - self._signalled_s > _FORCE_AFTER_S:
            self._deadline_s = now_s

    def _on_orphaned(self) -> None:
        if self._signalled_s is None:
            self._on_signal(signal.SIGTERM)
