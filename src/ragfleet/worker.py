"""One worker: claims chunks, feeds its engine, appends what finishes. The loop is `Worker.run`.

Owns what happens to a request between its record and its line in the shard. It knows other workers
only by their claims and beats, and nothing of how it was started (`worker_main`).
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash

from ragfleet.beats import Observer, read_beats
from ragfleet.claims import Claim, ClaimStore, Holder, Leave, Wait, decide
from ragfleet.engines.protocol import (
    Completion,
    Engine,
    EngineInfo,
    Failure,
    Outcome,
    Prepared,
    Request,
    RequestOrder,
)
from ragfleet.errors import InputChanged, RunError
from ragfleet.events import EventPipe
from ragfleet.index import read_lines
from ragfleet.journal import Journal
from ragfleet.launch import Launch, LaunchPaths, read_work
from ragfleet.plan import arrange
from ragfleet.poison import Suspicion
from ragfleet.pulse import Counters, Pulse
from ragfleet.records import (
    Answered,
    Fields,
    LazyRecord,
    Plain,
    encode_value,
    failed,
    microseconds,
    parse_sent,
    place_of,
    plain_row,
    repeats_all,
    result_row,
    sealed,
)
from ragfleet.shards import ShardWriter, finished_keys

log = logging.getLogger(__name__)

_IDLE_POLL_S: Final = 0.2
_STEP_S: Final = 1.0
_BLOCKING_TIMEOUT_S: Final = 600.0
_BREAKER: Final = 32
"""So many first requests all failing is a mistake in the set-up, not bad luck."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """A claimed chunk; `outstanding` requests are fed but not yet in the shard."""

    number: int
    generation: int
    rows: Iterator[tuple[int, bytes, int, int, bytes]]
    """(index row, line, line hash, line number, key)"""
    skip: set[bytes]
    """Keys that an earlier holder finished."""
    outstanding: int = 0
    exhausted: bool = False


class _Item(msgspec.Struct, eq=False):
    """One request on its way."""

    request: Request
    fields: Fields
    row: int
    line_no: int
    place: int
    chunk: _Chunk
    prepared: Prepared | None = None
    started_s: float = 0.0
    attempts: int = 1
    slot: int = -1
    """Of the journal, while in flight."""


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
        self.paths, self.launch, self.engine, self.events = paths, launch, engine, events
        self.rank, self.owner = rank, f"{rank}.{incarnation}"
        self.work = read_work(paths)
        self.board = self.work.board(launch.num_workers)
        self.store = ClaimStore(paths.claims)
        self.shard = ShardWriter(Path(launch.output_file), rank)
        self.observer = Observer(launch.beat_timeout_s)
        self.input_fd = os.open(launch.contexts_file, os.O_RDONLY | os.O_CLOEXEC)
        self.counters = Counters()
        self.pulse = Pulse(
            paths,
            self.owner,
            self.counters,
            self.shard,
            engine.progress,
            self.oldest_in_flight,
            launch.fsync_s,
        )
        self.journal = Journal(paths.journals / self.owner)
        self.suspicion = Suspicion.of([])
        self.draining = False
        self.timeout_s = launch.request_timeout_s
        self._in_flight: dict[bytes, _Item] = {}
        self._retries: deque[_Item] = deque()
        self._suspects: dict[int, _Item] = {}
        """Requests that were in flight at two deaths, by index row: see `try_suspects`."""
        self._on_trial = False
        self._next: _Item | None = None
        self._feeding: _Chunk | None = None
        self._completed: set[int] = set()
        self._withheld: list[tuple[_Item, Answered]] | None = []
        """Failures until the first success, then None: see `_BREAKER`."""
        self._failure_kinds: set[str] = set()
        self._is_first = True
        self._order: RequestOrder = "grouped"

    # ---- the loop

    def run(self) -> None:
        """Load; then fill, step and append until every chunk of the run is finished."""
        self.pulse.start()
        self.events.send("loading")
        info = self.engine.start()
        if self.timeout_s is None and info.may_block:
            self.timeout_s = _BLOCKING_TIMEOUT_S
        limit_s = self.timeout_s if info.may_block else None
        self._order = info.order
        self.events.send("ready", info.name, notes=list(info.notes), blocked_after_s=limit_s)
        self.refresh()
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

    def submit(self, item: _Item) -> None:
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
        rows = self.suspicion.next_trial(list(self._suspects))
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
            self.release_withheld()
        self.counters.state = "waiting"
        while not self.draining:
            self.refresh()
            for chunk in self._completed - self.board.done:
                self.store.finish(chunk)  # its mark was lost
            instruction = self.decide(may_steal=self.launch.may_steal)
            if isinstance(instruction, Leave):
                return False
            if isinstance(instruction, Claim):
                return True
            self.pulse.check()
            time.sleep(_IDLE_POLL_S)  # other workers' files are all there is to wait for
        return False

    # ---- claims

    def refresh(self) -> None:
        self.store.refresh(self.board)
        self.suspicion = Suspicion.of(self.board.deaths.values())

    def decide(self, may_steal: bool) -> Claim | Wait | Leave:
        now_s = time.monotonic()
        for beat in read_beats(self.paths.beats).values():
            self.observer.observe(beat.owner, beat.sequence, now_s)
        return decide(
            self.board,
            self.owner,
            self.rank,
            lambda owner: self.observer.is_alive(owner, now_s),
            may_steal=may_steal,
        )

    def claim(self, may_steal: bool) -> _Chunk | None:
        """Claim a chunk; None when nothing is free now."""
        while True:
            instruction = self.decide(may_steal)
            if not isinstance(instruction, Claim):
                return None
            shard = self.shard.open()
            holder = Holder(self.owner, shard.name, self.shard.size_bytes)
            if self.store.try_claim(instruction, holder):
                self.board.claims[instruction.chunk] = (instruction.generation, holder)
                return self.open_chunk(instruction)
            self.refresh()

    def open_chunk(self, claim: Claim) -> _Chunk:
        chunk = self.work.chunks[claim.chunk]
        place = slice(int(chunk["start"]), int(chunk["stop"]))
        rows = self.work.order[place]
        rows = rows[arrange(self.work.leads[place], self.work.records["length"][rows], self._order)]
        records = self.work.records[rows]
        keys = np.column_stack((records["key_hi"], records["key_lo"])).astype("<u8").tobytes()
        skip: set[bytes] = set()
        for holder in self.store.earlier_holders(claim):
            shard = self.shard.open().with_name(holder.shard)
            skip |= finished_keys(shard, holder.offset_bytes)
        log.debug(
            "claimed chunk %d, generation %d: %d requests, %d finished by others",
            claim.chunk,
            claim.generation,
            len(rows),
            len(skip),
        )
        self.counters.state = "generating"
        self.counters.chunk = claim.chunk
        self.counters.generations[claim.chunk] = claim.generation
        self.counters.stolen += claim.chunk not in self.board.slices[self.rank]
        return _Chunk(
            number=claim.chunk,
            generation=claim.generation,
            rows=zip(
                rows.tolist(),
                read_lines(self.input_fd, records["offset"], records["length"]),
                records["line_hash"].tolist(),
                records["line_no"].tolist(),
                [keys[i : i + 16] for i in range(0, len(keys), 16)],
                strict=True,
            ),
            skip=skip,
        )

    def close_if_complete(self, chunk: _Chunk) -> None:
        """Mark a chunk finished once its last request is in a shard."""
        if chunk.exhausted and chunk.outstanding == 0:
            if self.counters.generations.get(chunk.number) == chunk.generation:
                del self.counters.generations[chunk.number]
            if (chunk.number, chunk.generation) not in self.counters.superseded:
                self.store.finish(chunk.number)
                self._completed.add(chunk.number)
                self.board.done.add(chunk.number)

    # ---- requests

    def next_prepared(self, info: EngineInfo) -> _Item | None:
        """The next request to submit, from the chunk at hand or one claimed now."""
        if self._retries:
            return self._retries.popleft()
        while True:
            if self._feeding is None:
                hungry = len(self._in_flight) < info.batch_size
                self._feeding = self.claim(may_steal=self.launch.may_steal and hungry)
                if self._feeding is None:
                    return None
            chunk = self._feeding
            for row in chunk.rows:
                if self.draining:
                    return None
                self.pulse.check()
                item = self.prepare(chunk, *row)
                if (chunk.number, chunk.generation) in self.counters.superseded:
                    chunk.rows = iter(())  # somebody believed us dead: the rest is theirs
                if item is not None:
                    return item
            chunk.exhausted = True
            self._feeding = None
            self.close_if_complete(chunk)

    def prepare(
        self,
        chunk: _Chunk,
        row: int,
        line: bytes,
        line_hash: int,
        line_no: int,
        key: bytes,
    ) -> _Item | None:
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
            seed=self.seed_of(key),
        )
        place = place_of(line_hash, line_no, self.launch.include_context)
        item = _Item(request, fields, row, line_no, place, chunk)
        chunk.outstanding += 1
        if row in self.board.timed_out:
            self.fail(item, self.timeout_of(item), self.timeout_s)
            return None
        if self.suspicion.is_poison(row):
            self.fail(item, self.poison_of(item), 0.0)
            return None
        if self.suspicion.is_suspect(row):
            self._suspects[row] = item
            return None
        return item if self.render(item) else None

    def render(self, item: _Item) -> bool:
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
            self.fail(item, prepared, None)
            return False
        item.prepared = prepared
        return True

    def seed_of(self, key: bytes) -> int | None:
        return record_seed(self.launch.seed, key)

    def timeout_of(self, item: _Item) -> Failure:
        return Failure(
            key=item.request.key,
            error_type="timeout",
            error=f"no answer within {self.timeout_s:g} s (--request_timeout_s)",
        )

    def poison_of(self, item: _Item) -> Failure:
        owners = [owner for owner, rows in self.board.deaths.items() if item.row in rows]
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
            if self._is_first:
                self._is_first = False
                self.show_first(item, outcome, inference_time)
            self.release_withheld()
            self.counters.count(outcome)
            self.append_completion(item, outcome, inference_time)
        elif outcome.retryable and item.attempts <= self.launch.max_retries:
            item.attempts += 1
            self._retries.append(item)  # while draining: it is tried again by the next start
        else:
            self.fail(item, outcome, inference_time)

    def fail(self, item: _Item, failure: Failure, inference_time: float | None) -> None:
        """Append a failure row; `inference_time` None says that it was never sent."""
        self.counters.failed += 1
        log.info("line %d failed: %s: %s", item.line_no, failure.error_type, failure.error)
        if failure.error_type not in self._failure_kinds:
            self._failure_kinds.add(failure.error_type)
            self.events.send(
                "failure",
                failure.error,
                error_type=failure.error_type,
                id=name_of(item),
                line_no=item.line_no,
            )
        row = failed(failure.error_type, failure.error)
        if inference_time is not None:
            row = Answered(row.answer, inference_time, self.rank, False, row.own)
        # Costly prompts come first, so too-long ones may well stand together; the others were
        # found by killing a process, which must not be in vain.
        if self._withheld is None or failure.error_type in ("too_long", "timeout", "poison"):
            self.append(item, row)
            return
        self._withheld.append((item, row))
        if len(self._withheld) == _BREAKER:
            raise RunError(
                f"The first {_BREAKER} requests all failed and none succeeded. The last one, line"
                f" {item.line_no}: {failure.error_type}: {failure.error}\nNone of them counts as"
                " finished: mend it and run the same command again."
            )

    def release_withheld(self) -> None:
        """The set-up works, or there is no more to come: failures are results."""
        if self._withheld is not None:
            withheld, self._withheld = self._withheld, None
            for item, row in withheld:
                self.append(item, row)

    def append_completion(self, item: _Item, completion: Completion, inference_time: float) -> None:
        fields, prepared, row = item.fields, item.prepared, None
        assert prepared is not None
        if (
            isinstance(fields, Plain)
            and completion.reasoning is None
            and not prepared.truncated_tokens
        ):
            row = plain_row(
                fields,
                f"line:{item.line_no}",
                answer=completion.text,
                inference_time=inference_time,
                worker_rank=self.rank,
                finish_reason=completion.finish_reason,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
                request_key=item.request.key.hex(),
                finished_at_ns=time.time_ns(),
            )
        if row is None:
            self.append(item, completed(item, completion, inference_time, self.rank))
        else:
            self.write(item, sealed(row, item.place))

    def append(self, item: _Item, answered: Answered) -> None:
        key = item.request.key.hex().encode()
        row = result_row(
            item.fields,
            f"line:{item.line_no}",
            answered,
            include_context=self.launch.include_context,
            context_length=len(item.request.context),
            extra=b',"request_key":"%b","finished_at_ns":%d' % (key, time.time_ns()),
        )
        self.write(item, sealed(row, item.place) if repeats_all(item.fields) else row)

    def write(self, item: _Item, row: bytes) -> None:
        self.shard.append(row)
        chunk = item.chunk
        chunk.outstanding -= 1
        if chunk.exhausted:
            self.close_if_complete(chunk)

    def show_first(self, item: _Item, completion: Completion, seconds: float) -> None:
        assert item.prepared is not None
        self.events.send(
            "first",
            prompt=item.prepared.prompt[-300:],
            answer=completion.text[:300],
            id=name_of(item),
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            finish_reason=completion.finish_reason,
            seconds=seconds,
        )


def record_seed(seed: int | None, key: bytes) -> int | None:
    """Each record's own stream, from (seed, key): worker count and order don't matter."""
    return None if seed is None else xxhash.xxh3_64_intdigest(key, seed=seed % 2**64)


def name_of(item: _Item) -> str:
    """The record's id as in its result. The rest of the record may be more than Python can hold."""
    fields = item.fields
    value = msgspec.json.decode(
        fields.id if isinstance(fields, Plain) else fields.get("id", b"null")
    )
    return f"line:{item.line_no}" if value is None else str(value)


def completed(item: _Item, completion: Completion, inference_time: float, rank: int) -> Answered:
    """A success as JSON-ready bytes."""
    own = [
        ("finish_reason", encode_value(completion.finish_reason)),
        ("prompt_tokens", encode_value(completion.prompt_tokens)),
        ("completion_tokens", encode_value(completion.completion_tokens)),
    ]
    if completion.reasoning is not None:
        own.append(("reasoning", encode_value(completion.reasoning)))
    if item.prepared is not None and item.prepared.truncated_tokens:
        own.append(("truncated_tokens", encode_value(item.prepared.truncated_tokens)))
    return Answered(encode_value(completion.text), inference_time, rank, True, tuple(own))
