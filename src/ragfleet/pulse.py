"""The side threads of a worker: beats and fsync. They copy progress, they never make it.

Two threads, so that a slow disk does not look like a dead worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ragfleet.beats import BEAT_S, Beat, State, write_beat
from ragfleet.claims import ClaimStore
from ragfleet.engines.protocol import Completion
from ragfleet.errors import StorageError
from ragfleet.launch import LaunchPaths
from ragfleet.shards import ShardWriter


@dataclass(slots=True)
class Counters:
    """What the loop tells the side threads; plain assignments, read without a lock."""

    state: State = "loading"
    succeeded: int = 0
    failed: int = 0
    stolen: int = 0
    busy_s: float = 0.0
    span_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    degraded: str | None = None
    chunk: int | None = None
    generations: dict[int, int] = field(default_factory=dict)
    """Generation of the claim on each chunk this worker has open."""
    superseded: set[tuple[int, int]] = field(default_factory=set)
    """Claims (chunk, generation) taken over by somebody who believed this worker dead."""

    def count(self, completion: Completion) -> None:
        """Add up an answer and what it took."""
        self.succeeded += 1
        if completion.prompt_tokens is None or completion.cached_tokens is None:
            self.uncounted += 1
        else:
            self.cached_tokens += completion.cached_tokens
        self.prompt_tokens += completion.prompt_tokens or 0
        self.completion_tokens += completion.completion_tokens or 0

    def degrade(self, reason: str) -> None:
        """One more reason why it works slower than it could; each once."""
        if self.degraded is None:
            self.degraded = reason
        elif reason not in self.degraded:
            self.degraded += f"; {reason}"


class Pulse:
    """Publishes a beat every second and syncs the shard, until `stop`."""

    def __init__(
        self,
        paths: LaunchPaths,
        owner: str,
        counters: Counters,
        shard: ShardWriter,
        progress: Callable[[], int],
        oldest: Callable[[], tuple[float, int, int]],
        fsync_s: float,
    ) -> None:
        """`oldest` returns (monotonic start of the oldest request, its row, number in flight)."""
        self._paths = paths
        self._owner = owner
        self._counters = counters
        self._shard = shard
        self._progress = progress
        self._oldest = oldest
        self._fsync_s = fsync_s
        self._store = ClaimStore(paths.claims)
        self._stop = threading.Event()
        self._sequence = 0
        self._error: StorageError | None = None
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._beat_loop, "beat"), (self._sync_loop, "sync"))
        ]

    def start(self) -> None:
        self.beat()
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise what a side thread ran into."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.beat()

    def beat(self) -> None:
        self._sequence += 1
        counters = self._counters
        started_s, row, in_flight = self._oldest()
        beat = Beat(
            owner=self._owner,
            sequence=self._sequence,
            state=counters.state,
            progress=self._progress(),
            succeeded=counters.succeeded,
            failed=counters.failed,
            in_flight=in_flight,
            chunk=counters.chunk,
            stolen=counters.stolen,
            busy_s=counters.busy_s,
            span_s=counters.span_s,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            completion_tokens=counters.completion_tokens,
            uncounted=counters.uncounted,
            degraded=counters.degraded,
            oldest_s=time.monotonic() - started_s if in_flight else 0.0,
            oldest_row=row if in_flight else None,
        )
        try:
            write_beat(self._paths.beats, beat)
        except OSError as error:
            raise StorageError(f"Can't write {self._paths.beats}: {error.strerror}.") from error

    def _beat_loop(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self.beat()
                for chunk, generation in list(self._counters.generations.items()):
                    if self._store.is_superseded(chunk, generation):
                        self._counters.superseded.add((chunk, generation))
            except StorageError as error:
                self._error = error

    def _sync_loop(self) -> None:
        while not self._stop.wait(self._fsync_s):
            try:
                self._shard.sync()
            except StorageError as error:
                self._error = error
