"""One worker: claims chunks, feeds its engine, appends what finishes. The loop is `Worker.run`.

Owns a request from its record until it has an outcome. Which chunks are this worker's is the
business of `holdings`, what an outcome becomes that of `outcomes`. It knows nothing of how it was
started (`worker_main`).
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Final

import xxhash

from ragfleet.claims import Claim, Leave
from ragfleet.engines.protocol import (
    Completion,
    Engine,
    EngineInfo,
    Failure,
    Outcome,
    Prepared,
    Request,
)
from ragfleet.errors import InputChanged
from ragfleet.events import EventPipe
from ragfleet.holdings import Chunk, Holdings
from ragfleet.journal import Journal
from ragfleet.launch import Launch, LaunchPaths
from ragfleet.outcomes import Item, Outcomes, record_seed
from ragfleet.pulse import Pulse
from ragfleet.records import LazyRecord, parse_sent
from ragfleet.rows import microseconds, place_of
from ragfleet.shards import ShardWriter

_IDLE_POLL_S: Final = 0.2
_STEP_S: Final = 1.0
_BLOCKING_TIMEOUT_S: Final = 600.0


class Worker:
    """Everything one worker process holds while it runs."""

    def __init__(
        self,
        paths: LaunchPaths,
        launch: Launch,
        rank: int,
        incarnation: int,
        engine: Engine,
        events: EventPipe,
    ) -> None:
        self.launch, self.engine, self.events = launch, engine, events
        owner = f"{rank}.{incarnation}"
        self.shard = ShardWriter(Path(launch.output_file), rank)
        self.held = Holdings(paths, launch, rank, owner, self.shard)
        self.counters = self.held.counters
        self.outcomes = Outcomes(
            rank,
            self.shard,
            self.counters,
            events,
            self.settle,
            include_context=launch.include_context,
        )
        self.pulse = Pulse(
            paths,
            owner,
            self.counters,
            self.shard,
            engine.progress,
            self.oldest_in_flight,
            launch.fsync_s,
        )
        self.journal = Journal(paths.journals / owner)
        self.draining = False
        self.timeout_s = launch.request_timeout_s
        self._in_flight: dict[bytes, Item] = {}
        self._retries: deque[Item] = deque()
        self._suspects: dict[int, Item] = {}
        """Requests that were in flight at two deaths, by index row: see `try_suspects`."""
        self._on_trial = False
        self._next: Item | None = None
        self._feeding: Chunk | None = None

    # ---- the loop

    def run(self) -> None:
        """Load; then fill, step and append until every chunk of the run is finished."""
        self.pulse.start()
        self.events.send("loading")
        info = self.engine.start()
        if self.timeout_s is None and info.may_block:
            self.timeout_s = _BLOCKING_TIMEOUT_S
        limit_s = self.timeout_s if info.may_block else None
        self.held.order = info.order
        self.counters.degraded = info.degraded
        self.events.send("ready", info.name, notes=list(info.notes), blocked_after_s=limit_s)
        self.held.refresh()
        ready_s = time.monotonic()
        while True:
            if self.draining and info.survives:
                break
            started_s = time.monotonic()
            if self.fill(info) or self.try_suspects() or self.is_held_up():
                is_idle = not self._in_flight
                for outcome in self.engine.step(_STEP_S):
                    self.finish(outcome)
                now_s = time.monotonic()
                self.counters.busy_s += now_s - started_s
                self.counters.span_s = now_s - ready_s
                self.pulse.check()
                if is_idle:
                    time.sleep(_IDLE_POLL_S)  # `step` may return at once where nothing is to do
            elif not self.look_around():
                break
        self.engine.close()
        self.shard.close()
        self.counters.state = "left"
        self.pulse.stop()

    def fill(self, info: EngineInfo) -> bool:
        """Submit while the engine has room; whether anything is in flight then."""
        while not self.draining and not (self._on_trial and self._in_flight):
            self._on_trial = False
            item = self._next or self.next_prepared(info)
            if item is None:
                break
            assert item.prepared is not None
            if not self.engine.has_room(item.prepared):
                self._next = item
                break
            self._next = None
            self.submit(item)
        return bool(self._in_flight)

    def submit(self, item: Item) -> None:
        assert item.prepared is not None
        item.started_s = time.monotonic()
        item.slot = self.journal.add(item.row)
        self._in_flight[item.request.key] = item
        self.engine.submit(item.prepared)

    def try_suspects(self) -> bool:
        """With nothing else in flight: try some of those that may have killed their worker.

        A death now says more than the last one did, and a survival clears them: `poison`.
        """
        if self.draining or self._in_flight:
            return False
        rows = self.held.suspicion.next_trial(list(self._suspects))
        # Rendered one by one before any is in flight, for that alone may be what kills.
        trial = [self._suspects.pop(row) for row in rows]
        if trial:
            self.counters.state = "generating"
        for item in [item for item in trial if item.prepared or self.render(item)]:
            assert item.prepared is not None
            if self.engine.has_room(item.prepared):
                self.submit(item)
            else:
                self._suspects[item.row] = item
        self._on_trial = bool(self._in_flight)
        return self._on_trial

    def is_held_up(self) -> bool:
        """Nothing is in flight, and yet the engine has no room: it moves on when it is stepped."""
        return not self.draining and (self._next is not None or bool(self._suspects))

    def look_around(self) -> bool:
        """Nothing is in flight: wait for what others hold. False when it is time to leave."""
        if not self.draining:
            self.outcomes.release_withheld()
        self.counters.state = "waiting"
        while not self.draining:
            self.held.refresh()
            instruction = self.held.next_step()
            if isinstance(instruction, Leave):
                return False
            if isinstance(instruction, Claim):
                return True
            self.pulse.check()
            time.sleep(_IDLE_POLL_S)  # other workers' files are all there is to wait for
        return False

    # ---- requests

    def next_prepared(self, info: EngineInfo) -> Item | None:
        """The next request to submit, from the chunk at hand or one claimed now."""
        if self._retries:
            return self._retries.popleft()
        while True:
            if self._feeding is None:
                is_hungry = len(self._in_flight) < info.batch_size
                self._feeding = self.held.claim(is_hungry=is_hungry)
                if self._feeding is None:
                    return None
            chunk = self._feeding
            for row in chunk.rows:
                if self.draining:
                    return None
                self.pulse.check()
                item = self.prepare(chunk, *row)
                if self.held.is_superseded(chunk):
                    chunk.forget_rest()
                if item is not None:
                    return item
            chunk.exhausted = True
            self._feeding = None
            self.held.close_if_complete(chunk)

    def prepare(
        self,
        chunk: Chunk,
        row: int,
        line: bytes,
        line_hash: int,
        line_no: int,
        key: bytes,
    ) -> Item | None:
        """Read, check and render one record; None when it is finished without being sent."""
        if key in chunk.skip:
            return None
        if key in self._in_flight:  # from this chunk's earlier claim, which somebody took over
            item = self._in_flight[key]
            item.chunk.outstanding -= 1
            item.chunk = chunk
            chunk.outstanding += 1
            return None
        if xxhash.xxh3_64_intdigest(line) != line_hash:
            raise InputChanged(
                f"{self.launch.contexts_file} was edited during the run (line {line_no}). What is"
                " finished is safe; run the same command again."
            )
        # The hash says that these are the bytes the planner found valid and made the key from.
        fields, query, context, method = parse_sent(line, self.launch.include_context)
        request = Request(
            key=key,
            query=query,
            context=context,
            retrieval_method=method,
            record=LazyRecord(line),
            seed=record_seed(self.launch.seed, key),
        )
        place = place_of(line_hash, line_no, self.launch.include_context)
        item = Item(request, fields, row, line_no, place, chunk)
        chunk.outstanding += 1
        if row in self.held.board.timed_out:
            self.outcomes.fail(item, self.timeout_of(item), self.timeout_s)
            return None
        if self.held.suspicion.is_poison(row):
            self.outcomes.fail(item, self.poison_of(item), 0.0)
            return None
        if self.held.suspicion.is_suspect(row):
            self._suspects[row] = item
            return None
        return item if self.render(item) else None

    def render(self, item: Item) -> bool:
        """Have the engine prepare a request; False when that failed, and it is finished by it.

        Noted in the journal, for a tokenizer or a user's code can kill a worker too.
        """
        slot = self.journal.add(item.row)
        prepared: Prepared | Failure
        try:
            prepared = self.engine.prepare(item.request)
        except ValueError as error:
            prepared = Failure(key=item.request.key, error_type="invalid_record", error=str(error))
        self.journal.remove(slot)
        if isinstance(prepared, Failure):
            self.outcomes.fail(item, prepared, None)
            return False
        item.prepared = prepared
        return True

    def timeout_of(self, item: Item) -> Failure:
        return Failure(
            key=item.request.key,
            error_type="timeout",
            error=f"no answer within {self.timeout_s:g} s (--request_timeout_s)",
        )

    def poison_of(self, item: Item) -> Failure:
        owners = [owner for owner, rows in self.held.board.deaths.items() if item.row in rows]
        logs = ", ".join(sorted({f"worker_{owner.partition('.')[0]}.log" for owner in owners}))
        return Failure(
            key=item.request.key,
            error_type="poison",
            error=f"its worker died {len(owners)} times while answering it, once with nothing else"
            f" in flight; see {logs}",
        )

    def oldest_in_flight(self) -> tuple[float, int, int]:
        """(monotonic start, index row, number in flight); called from a side thread."""
        try:
            item = next(iter(self._in_flight.values()))
        except (StopIteration, RuntimeError):  # empty, or just changing
            return 0.0, 0, 0
        return item.started_s, item.row, len(self._in_flight)

    # ---- results

    def finish(self, outcome: Outcome) -> None:
        """Append one outcome, or send its request again."""
        item = self._in_flight.pop(outcome.key)
        self.journal.remove(item.slot)
        inference_time = microseconds(time.monotonic() - item.started_s)
        if isinstance(outcome, Completion):
            if outcome.inference_time_s is not None:
                inference_time = microseconds(outcome.inference_time_s)
            self.journal.count_answer()
            self.outcomes.complete(item, outcome, inference_time)
        elif outcome.retryable and item.attempts <= self.launch.max_retries:
            item.attempts += 1
            self._retries.append(item)  # while draining: it is tried again by the next start
        else:
            self.outcomes.fail(item, outcome, inference_time)

    def settle(self, item: Item) -> None:
        """An item is in the shard."""
        chunk = item.chunk
        chunk.outstanding -= 1
        if chunk.exhausted:
            self.held.close_if_complete(chunk)
