"""The chunks that one worker holds: claimed from the board, opened for reading, marked finished.

Owns the worker's view of the board and of who is alive. It knows requests only by their numbers;
what is done with them is `worker`'s.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ragfleet.beats import Observer, read_beats
from ragfleet.claims import Claim, ClaimStore, Holder, Leave, Wait, decide
from ragfleet.engines.protocol import RequestOrder
from ragfleet.index import read_lines
from ragfleet.launch import Launch, LaunchPaths, read_work
from ragfleet.plan import arrange
from ragfleet.poison import Suspicion
from ragfleet.pulse import Counters
from ragfleet.shards import ShardWriter, finished_keys

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Chunk:
    """A claimed chunk; `outstanding` requests are fed but not yet in the shard."""

    number: int
    generation: int
    rows: Iterator[tuple[int, bytes, int, int, bytes]]
    """(index row, line, line hash, line number, key)"""
    skip: set[bytes]
    """Keys that an earlier holder finished."""
    outstanding: int = 0
    exhausted: bool = False

    def forget_rest(self) -> None:
        """Somebody believed us dead: what was not read yet is theirs."""
        self.rows = iter(())


class Holdings:
    """What one worker may work on. `order` is the engine's wish, known once it is loaded."""

    def __init__(
        self, paths: LaunchPaths, launch: Launch, rank: int, owner: str, shard: ShardWriter
    ) -> None:
        self._paths, self._rank, self._owner = paths, rank, owner
        self._may_steal = launch.may_steal
        self._work = read_work(paths)
        self.board = self._work.board(launch.num_workers)
        self._store = ClaimStore(paths.claims)
        self._shard = shard
        self._observer = Observer(launch.beat_timeout_s)
        self._input_fd = os.open(launch.contexts_file, os.O_RDONLY | os.O_CLOEXEC)
        self.counters = Counters()
        self.suspicion = Suspicion.of([])
        self.order: RequestOrder = "grouped"
        self._completed: set[int] = set()

    def refresh(self) -> None:
        """See what others did since, and say again what they may not have seen."""
        marked = self._store.refresh(self.board)
        for chunk in self._completed - marked:
            self._store.finish(chunk)  # its mark was lost, and others would wait for it for ever
        self.suspicion = Suspicion.of(self.board.deaths.values())

    def next_step(self) -> Claim | Wait | Leave:
        """What a worker should do that has nothing in flight."""
        return self._decide(self._may_steal)

    def _decide(self, may_steal: bool) -> Claim | Wait | Leave:
        now_s = time.monotonic()
        for beat in read_beats(self._paths.beats).values():
            self._observer.observe(beat.owner, beat.sequence, now_s)
        return decide(
            self.board,
            self._owner,
            self._rank,
            lambda owner: self._observer.is_alive(owner, now_s),
            may_steal=may_steal,
        )

    def claim(self, *, is_hungry: bool) -> Chunk | None:
        """Claim a chunk; None when nothing is free now. Only the hungry take from others."""
        while True:
            instruction = self._decide(self._may_steal and is_hungry)
            if not isinstance(instruction, Claim):
                return None
            shard = self._shard.open()
            holder = Holder(self._owner, shard.name, self._shard.size_bytes)
            if self._store.try_claim(instruction, holder):
                self.board.claims[instruction.chunk] = (instruction.generation, holder)
                return self._open(instruction)
            self.refresh()

    def _open(self, claim: Claim) -> Chunk:
        chunk = self._work.chunks[claim.chunk]
        place = slice(int(chunk["start"]), int(chunk["stop"]))
        rows = self._work.order[place]
        lengths = self._work.records["length"][rows]
        rows = rows[arrange(self._work.leads[place], lengths, self.order)]
        records = self._work.records[rows]
        keys = np.column_stack((records["key_hi"], records["key_lo"])).astype("<u8").tobytes()
        skip: set[bytes] = set()
        for holder in self._store.earlier_holders(claim):
            shard = self._shard.open().with_name(holder.shard)
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
        self.counters.stolen += claim.chunk not in self.board.slices[self._rank]
        return Chunk(
            number=claim.chunk,
            generation=claim.generation,
            rows=zip(
                rows.tolist(),
                read_lines(self._input_fd, records["offset"], records["length"]),
                records["line_hash"].tolist(),
                records["line_no"].tolist(),
                [keys[i : i + 16] for i in range(0, len(keys), 16)],
                strict=True,
            ),
            skip=skip,
        )

    def close_if_complete(self, chunk: Chunk) -> None:
        """Mark a chunk finished once its last request is in a shard."""
        if chunk.exhausted and chunk.outstanding == 0:
            if self.counters.generations.get(chunk.number) == chunk.generation:
                del self.counters.generations[chunk.number]
            if not self.is_superseded(chunk):
                self._store.finish(chunk.number)
                self._completed.add(chunk.number)
                self.board.done.add(chunk.number)

    def is_superseded(self, chunk: Chunk) -> bool:
        """Whether somebody took it over, who believed us dead."""
        return (chunk.number, chunk.generation) in self.counters.superseded
