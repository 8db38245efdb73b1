"""What becomes of a request: its row in the shard, and what people hear of it.

Owns the worker's shard lines and the breaker that keeps a mistake in the set-up from becoming
failure rows. It knows nothing of engines and claims.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec
import xxhash

from ragfleet.engines.protocol import Completion, Failure, Prepared, Request
from ragfleet.errors import RunError
from ragfleet.events import EventPipe
from ragfleet.holdings import Chunk
from ragfleet.pulse import Counters
from ragfleet.records import Fields, Plain
from ragfleet.rows import Answered, encode_value, failed, plain_row, repeats_all, result_row, sealed
from ragfleet.shards import ShardWriter

log = logging.getLogger(__name__)

_BREAKER: Final = 32
"""So many first requests all failing is a mistake in the set-up, not bad luck."""


class Item(msgspec.Struct, eq=False):
    """One request on its way."""

    request: Request
    fields: Fields
    row: int
    line_no: int
    place: int
    chunk: Chunk
    prepared: Prepared | None = None
    started_s: float = 0.0
    attempts: int = 1
    slot: int = -1
    """Of the journal, while in flight."""


class Outcomes:
    """Appends what one worker finishes. `on_written` is told of every item that is in the shard."""

    def __init__(
        self,
        rank: int,
        shard: ShardWriter,
        counters: Counters,
        events: EventPipe,
        on_written: Callable[[Item], None],
        *,
        include_context: bool,
    ) -> None:
        self._rank, self._shard, self._counters, self._events = rank, shard, counters, events
        self._on_written, self._include_context = on_written, include_context
        self._withheld: list[tuple[Item, Answered]] | None = []
        """Failures until the first success, then None: see `_BREAKER`."""
        self._failure_kinds: set[str] = set()
        self._is_first = True

    def complete(self, item: Item, completion: Completion, inference_time: float) -> None:
        """Append a success."""
        if self._is_first:
            self._is_first = False
            self._show_first(item, completion, inference_time)
        self.release_withheld()
        self._counters.count(completion)
        self._append_completion(item, completion, inference_time)

    def fail(self, item: Item, failure: Failure, inference_time: float | None) -> None:
        """Append a failure row; `inference_time` None says that it was never sent."""
        self._counters.failed += 1
        log.info("line %d failed: %s: %s", item.line_no, failure.error_type, failure.error)
        if failure.error_type not in self._failure_kinds:
            self._failure_kinds.add(failure.error_type)
            self._events.send(
                "failure",
                failure.error,
                error_type=failure.error_type,
                id=name_of(item),
                line_no=item.line_no,
            )
        row = failed(failure.error_type, failure.error)
        if inference_time is not None:
            row = Answered(row.answer, inference_time, self._rank, False, row.own)
        # Costly prompts come first, so too-long ones may well stand together; the others were
        # found by killing a process, which must not be in vain.
        if self._withheld is None or failure.error_type in ("too_long", "timeout", "poison"):
            self._append(item, row)
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
                self._append(item, row)

    def _append_completion(self, item: Item, completion: Completion, inference_time: float) -> None:
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
                worker_rank=self._rank,
                finish_reason=completion.finish_reason,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
                request_key=item.request.key.hex(),
                finished_at_ns=time.time_ns(),
            )
        if row is None:
            self._append(item, completed(item, completion, inference_time, self._rank))
        else:
            self._write(item, sealed(row, item.place))

    def _append(self, item: Item, answered: Answered) -> None:
        key = item.request.key.hex().encode()
        row = result_row(
            item.fields,
            f"line:{item.line_no}",
            answered,
            include_context=self._include_context,
            context_length=len(item.request.context),
            extra=b',"request_key":"%b","finished_at_ns":%d' % (key, time.time_ns()),
        )
        self._write(item, sealed(row, item.place) if repeats_all(item.fields) else row)

    def _write(self, item: Item, row: bytes) -> None:
        self._shard.append(row)
        self._on_written(item)

    def _show_first(self, item: Item, completion: Completion, seconds: float) -> None:
        assert item.prepared is not None
        self._events.send(
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


def name_of(item: Item) -> str:
    """The record's id as in its result. The rest of the record may be more than Python can hold."""
    fields = item.fields
    value = msgspec.json.decode(
        fields.id if isinstance(fields, Plain) else fields.get("id", b"null")
    )
    return f"line:{item.line_no}" if value is None else str(value)


def completed(item: Item, completion: Completion, inference_time: float, rank: int) -> Answered:
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
