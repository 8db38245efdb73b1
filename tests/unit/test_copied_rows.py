"""A row that was written for a line is copied by the merge; it must be what would be made anew.

And what a worker writes of a request, and when.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ragfleet.engines.protocol import Completion, Failure, Prepared, Request
from ragfleet.errors import RunError
from ragfleet.outcomes import Item, Outcomes
from ragfleet.pulse import Counters
from ragfleet.records import Fields, Plain, parse_fields, parse_sent
from ragfleet.rows import (
    Answered,
    encode_value,
    failed,
    place_of,
    plain_row,
    repeats_all,
    result_row,
    sealed,
    unsealed,
)

KEY = bytes(range(16))
RECORD: dict[str, Any] = {
    "id": "r1",
    "original_item_id": "o1",
    "query_index": 3,
    "dedup_key": "d",
    "query": "how?",
    "target_api": "numpy.sum",
    "dependencies": {"numpy": "1.16.6"},
    "retrieval_method": "exact",
    "context": "the\ncontext",
    "context_length": 11,
    "retrieval_time": 0.25,
    "success": True,
}


def as_line(record: dict[str, Any], ensure_ascii: bool = False) -> bytes:
    return json.dumps(record, ensure_ascii=ensure_ascii).encode() + b"\n"


def slow_row(fields: Fields, text: str, **options: Any) -> bytes:
    own = (("finish_reason", b'"stop"'), ("prompt_tokens", b"7"), ("completion_tokens", b"null"))
    answered = Answered(encode_value(text), 0.5, 2, True, own)
    return result_row(fields, "line:4", answered, **options)


def fast_row(fields: Plain, text: str) -> bytes | None:
    return plain_row(
        fields,
        "line:4",
        answer=text,
        inference_time=0.5,
        worker_rank=2,
        finish_reason="stop",
        prompt_tokens=7,
        completion_tokens=None,
        request_key=KEY.hex(),
        finished_at_ns=123,
    )


EXTRA = b',"request_key":"%b","finished_at_ns":123' % KEY.hex().encode()


@given(
    st.sets(st.sampled_from(sorted(RECORD.keys() - {"query", "context"}))),
    st.text(),
    st.text(st.characters(codec="utf-8")),
    st.booleans(),
    st.sampled_from([0.25, 1, -1, None, "soon", 1e400]),
)
@settings(max_examples=150)
def test_the_row_made_at_once_is_the_row_made_in_parts(
    left_out: set[str], text: str, query: str, ensure_ascii: bool, time: Any
) -> None:
    record = {**RECORD, "query": query, "retrieval_time": time}
    line = as_line({name: record[name] for name in record if name not in left_out}, ensure_ascii)
    line = line.replace(b"Infinity", b"1e400")
    fields, _, context, _ = parse_sent(line)
    assert isinstance(fields, Plain)
    fast = fast_row(fields, text)
    slow = slow_row(parse_fields(line), text, extra=EXTRA, context_length=len(context))
    assert slow == slow_row(fields, text, extra=EXTRA, context_length=len(context))
    assert fast in (slow, None)
    if fast is None:
        assert b"\\u" in line or b"\\u" in encode_value(text)


def test_a_missing_length_is_told_by_both() -> None:
    line = as_line({"query": "q", "context": "abc"})
    fields = parse_sent(line)[0]
    assert isinstance(fields, Plain)
    assert fast_row(fields, "a") == slow_row(fields, "a", extra=EXTRA, context_length=3)


@pytest.mark.parametrize("text", ["a\ud800b", "\x00"])
def test_what_only_the_slow_way_can_write_is_left_to_it(text: str) -> None:
    fields = parse_sent(as_line(RECORD))[0]
    assert isinstance(fields, Plain)
    assert fast_row(fields, text) is None


def test_a_line_with_fields_of_its_own_is_not_plain() -> None:
    assert not isinstance(parse_sent(as_line({**RECORD, "mine": 1}))[0], Plain)
    assert not isinstance(parse_sent(as_line(RECORD), with_context=True)[0], Plain)


@given(st.text(), st.integers(0, 2**64 - 1), st.integers(1, 2**32 - 1), st.booleans())
@settings(max_examples=100)
def test_a_sealed_row_gives_back_the_result(text: str, hash_: int, no: int, context: bool) -> None:
    for answered in (
        Answered(encode_value(text), 0.5, 2, True, (("finish_reason", b'"stop"'),)),
        failed("oom", text),
    ):
        fields = parse_fields(as_line({**RECORD, "mine": text}))
        row = result_row(fields, "line:4", answered, include_context=context, extra=EXTRA)
        line = sealed(row, place_of(hash_, no, context))
        assert json.loads(line)["request_key"] == KEY.hex()
        result = result_row(fields, "line:4", answered, include_context=context)
        assert unsealed(line, place_of(hash_, no, context)) == result
        assert unsealed(line, place_of(hash_, no + 1, context)) is None
        assert unsealed(line, place_of(hash_ ^ 1, no, context)) is None
        assert unsealed(line, place_of(hash_, no, not context)) is None
        assert unsealed(line, place_of(hash_, no + 1, not context)) is None
        assert unsealed(line, place_of(hash_, no - 1, not context)) is None


def test_a_sealed_row_that_was_touched_is_not_copied() -> None:
    place = place_of(xxhash.xxh3_64_intdigest(b"line"), 4, False)
    line = sealed(slow_row(parse_fields(as_line(RECORD)), "answer", extra=EXTRA), place)
    assert unsealed(line, place) is not None
    for position in range(len(line) - 1):
        changed = line[:position] + bytes([line[position] ^ 1]) + line[position + 1 :]
        assert unsealed(changed, place) is None
        assert unsealed(line[:position], place) is None
    assert unsealed(slow_row(parse_fields(as_line(RECORD)), "answer", extra=EXTRA), place) is None


@pytest.mark.parametrize("name", ["request_key", "finished_at_ns", "row_check"])
def test_a_row_that_lacks_a_field_of_the_record_is_not_for_copying(name: str) -> None:
    assert repeats_all(parse_fields(as_line({**RECORD, "mine": 1})))
    assert not repeats_all(parse_fields(as_line({**RECORD, name: 1})))


# ---- what becomes of a request


class Written:
    """What one worker writes, and what its supervisor hears."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.counters = Counters()
        shard: Any = SimpleNamespace(append=lambda row: self.rows.append(json.loads(row)))
        events: Any = SimpleNamespace(send=lambda kind, *_, **__: self.said.append(kind))
        self.outcomes = Outcomes(
            2, shard, self.counters, events, lambda item: None, include_context=False
        )

    def item(self, **fields: Any) -> Item:
        request = Request(key=KEY, query="q", context="c", retrieval_method=None, record={})
        line = parse_sent(as_line({**RECORD, **fields}))[0]
        prepared = Prepared(request=request, prompt="q")
        nowhere: Any = None
        return Item(request, line, 0, 4, 0, nowhere, prepared)

    def fail(self, error_type: str) -> None:
        self.outcomes.fail(self.item(), Failure(key=KEY, error_type=error_type, error="no"), 0.5)

    def complete(self, **fields: Any) -> None:
        found = Completion(key=KEY, text="yes", finish_reason="stop", prompt_tokens=3)
        self.outcomes.complete(self.item(**fields), found, 0.5)


def test_failures_are_withheld_until_the_first_success() -> None:
    worker = Written()
    worker.fail("request_error")
    assert worker.rows == []
    worker.fail("too_long")
    assert [row["error_type"] for row in worker.rows] == ["too_long"]
    worker.complete()
    worker.fail("request_error")
    worker.complete(mine=1)
    assert [row["success"] for row in worker.rows] == [False, False, True, False, True]
    assert [row.get("error_type") for row in worker.rows[1::2]] == ["request_error"] * 2
    assert {row["worker_rank"] for row in worker.rows} == {2}
    assert not any("truncated_tokens" in row or "reasoning" in row for row in worker.rows)
    assert (worker.counters.succeeded, worker.counters.failed) == (2, 3)
    assert worker.said == ["failure", "failure", "first"], "each kind once"


def test_failures_of_the_end_are_written_though_nothing_succeeded() -> None:
    worker = Written()
    for _ in range(31):
        worker.fail("request_error")
    worker.outcomes.release_withheld()
    worker.fail("request_error")
    assert len(worker.rows) == 32
    worker = Written()
    for _ in range(31):
        worker.fail("request_error")
    with pytest.raises(RunError, match="The first 32 requests all failed"):
        worker.fail("request_error")
    assert worker.rows == []
