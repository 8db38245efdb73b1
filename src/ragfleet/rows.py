"""Rows: the output format, from a record's raw values and what is known of its answer.

Owns which keys a result has and in which order, a shard's line around it, and the check that lets
the merge copy such a line. Like `records` it passes raw JSON bytes on where it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import xxhash
from msgspec import UNSET, Raw, UnsetType

from ragfleet.records import (
    ABSENT,
    INPUT_FIELDS,
    Fields,
    Plain,
    decode_any,
    encode,
    normalise_json,
)

OUTPUT_FIELDS: Final = (
    "id",
    "original_item_id",
    "query_index",
    "dedup_key",
    "query",
    "target_api",
    "dependencies",
    "retrieval_method",
    "context_length",
    "answer",
    "retrieval_time",
    "inference_time",
    "total_time",
    "worker_rank",
    "success",
)
"""Documented keys of a result, in this order; every row has all of them."""

OWN_FIELDS: Final = (
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "reasoning",
    "truncated_tokens",
    "error",
    "error_type",
)
"""Keys this project adds after the pass-through fields. The last four only where they apply."""

SHARD_FIELDS: Final = frozenset({"request_key", "finished_at_ns", "row_check"})
"""A shard line's own bookkeeping: a record's fields of these names only stand in the output."""

_NOT_PASSED_THROUGH: Final = frozenset({*INPUT_FIELDS, *OUTPUT_FIELDS, *OWN_FIELDS})


class ShardRow(msgspec.Struct):
    """What the merge takes from a shard's line; the rest of that line is for people."""

    request_key: str
    finished_at_ns: int
    success: bool
    answer: Raw
    inference_time: float
    worker_rank: int | None
    finish_reason: Raw = Raw(b"null")
    prompt_tokens: Raw = Raw(b"null")
    completion_tokens: Raw = Raw(b"null")
    reasoning: Raw | UnsetType = UNSET
    truncated_tokens: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    error_type: str | UnsetType = UNSET


_decode_shard_row = msgspec.json.Decoder(ShardRow).decode


def parse_shard_row(line: bytes) -> ShardRow:
    """Raises msgspec.DecodeError (ValidationError among them) for anything else."""
    return _decode_shard_row(line)


class Answered(msgspec.Struct, frozen=True):
    """What is known of one answered (or failed) request, as JSON-ready bytes."""

    answer: bytes
    inference_time: float
    worker_rank: int | None
    success: bool
    own: tuple[tuple[str, bytes], ...]


def failed(error_type: str, error: str, worker_rank: int | None = None) -> Answered:
    """A failure of something never sent to a model."""
    return Answered(
        b"null",
        0.0,
        worker_rank,
        False,
        (
            ("finish_reason", b"null"),
            ("prompt_tokens", b"null"),
            ("completion_tokens", b"null"),
            ("error", encode_value(error)),
            ("error_type", encode_value(error_type)),
        ),
    )


def from_shard(row: ShardRow) -> Answered:
    own: list[tuple[str, bytes]] = [
        ("finish_reason", bytes(row.finish_reason)),
        ("prompt_tokens", bytes(row.prompt_tokens)),
        ("completion_tokens", bytes(row.completion_tokens)),
    ]
    for name in ("reasoning", "truncated_tokens", "error"):
        value = getattr(row, name)
        if value is not UNSET:
            own.append((name, bytes(value)))
    if row.error_type is not UNSET:
        own.append(("error_type", encode(row.error_type)))
    return Answered(bytes(row.answer), row.inference_time, row.worker_rank, row.success, tuple(own))


def encode_value(value: Any) -> bytes:
    """JSON of one value; a lone surrogate that a model produced becomes U+FFFD."""
    try:
        return encode(value)
    except UnicodeEncodeError:
        return encode(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


class _Documented(msgspec.Struct):
    """The documented part of a result: OUTPUT_FIELDS."""

    id: Raw
    original_item_id: Raw
    query_index: Raw
    dedup_key: Raw
    query: Raw
    target_api: Raw
    dependencies: Raw
    retrieval_method: Raw
    context_length: Raw | int | None
    answer: Raw | str
    retrieval_time: float
    inference_time: float
    total_time: float
    worker_rank: int | None
    success: bool


class _Plain(_Documented):
    """All of a shard's line, but for its check, where a `Plain` record was simply answered."""

    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    request_key: str
    finished_at_ns: int


_OWN_PREFIXES: Final = {name: b',"%b":' % name.encode() for name in OWN_FIELDS}


def result_row(
    fields: Fields | None,
    line_id: str,
    answered: Answered,
    *,
    include_context: bool = False,
    context_length: int | None = None,
    extra: bytes = b"",
) -> bytes:
    """One result line, its line end included.

    Args:
        fields: the input line's raw fields; None where it could not be read at all.
        line_id: id for a record without one, `line:<n>`.
        answered: what came of it.
        include_context: repeat the context among the pass-through fields.
        context_length: characters of the context, for records that do not say.
        extra: further raw members, each led by a comma (the shard's own bookkeeping).
    """
    raw = fields.raw() if isinstance(fields, Plain) else fields or {}
    row = _join_row(raw, line_id, answered, include_context, context_length, extra)
    if _has_escapes(row):  # they came in with the raw values: spell those in plain UTF-8
        raw = {name: Raw(normalise_json(value)) for name, value in raw.items()}
        row = _join_row(raw, line_id, answered, include_context, context_length, extra)
    return row


def _has_escapes(row: bytes) -> bool:
    # The search for one byte is much the faster, and most rows have none.
    return b"\\" in row and b"\\u" in row


def _join_row(
    fields: Mapping[str, Raw],
    line_id: str,
    answered: Answered,
    include_context: bool,
    context_length: int | None,
    extra: bytes,
) -> bytes:
    get = fields.get
    identifier = get("id", ABSENT)
    retrieval_time = _seconds(get("retrieval_time", ABSENT))
    documented = _Documented(
        Raw(encode(line_id)) if identifier == ABSENT else identifier,
        get("original_item_id", ABSENT),
        get("query_index", ABSENT),
        get("dedup_key", ABSENT),
        get("query", ABSENT),
        get("target_api", ABSENT),
        get("dependencies", ABSENT),
        get("retrieval_method", ABSENT),
        get("context_length", context_length),
        Raw(answered.answer),
        retrieval_time,
        answered.inference_time,
        microseconds(retrieval_time + answered.inference_time),
        answered.worker_rank,
        answered.success,
    )
    parts: list[Raw | bytes] = [encode(documented)[:-1]]
    if include_context and "context" in fields:
        parts += (b',"context":', fields["context"])
    if not fields.keys() <= _NOT_PASSED_THROUGH:
        for name in fields:
            if name not in _NOT_PASSED_THROUGH and not (extra and name in SHARD_FIELDS):
                parts += (b"," + encode(name) + b":", fields[name])
    for name, value in answered.own:
        parts += (_OWN_PREFIXES[name], value)
    parts += (extra, b"}\n")
    return b"".join(parts)


def plain_row(
    fields: Plain,
    line_id: str,
    *,
    answer: str,
    inference_time: float,
    worker_rank: int,
    finish_reason: str,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    request_key: str,
    finished_at_ns: int,
) -> bytes | None:
    """A shard's line at once: what `result_row` makes of the same; None where only that can."""
    identifier, retrieval_time = fields.id, _seconds(fields.retrieval_time)
    length = fields.context_length
    row = _Plain(
        Raw(encode(line_id)) if identifier == ABSENT else identifier,
        fields.original_item_id,
        fields.query_index,
        fields.dedup_key,
        fields.query,
        fields.target_api,
        fields.dependencies,
        fields.retrieval_method,
        len(fields.context) if length is UNSET else length,
        answer,
        retrieval_time,
        inference_time,
        microseconds(retrieval_time + inference_time),
        worker_rank,
        True,
        finish_reason,
        prompt_tokens,
        completion_tokens,
        request_key,
        finished_at_ns,
    )
    try:
        line = encode(row) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in the answer
        return None
    return None if _has_escapes(line) else line


_ROW_FORMAT: Final = 1
"""To be raised with any change of what `result_row` makes of the same record and answer."""

_CHECK: Final = b',"row_check":"%b"}\n'
_CHECK_BYTES: Final = len(_CHECK % bytes(16))


def repeats_all(fields: Fields) -> bool:
    """Whether a shard's row has everything of the record that a result has: see SHARD_FIELDS."""
    return isinstance(fields, Plain) or fields.keys().isdisjoint(SHARD_FIELDS)


def place_of(line_hash: int, line_no: int, include_context: bool) -> int:
    """What a result depends on besides its answer, in 64 bits."""
    return (line_hash + 2 * line_no + include_context + (_ROW_FORMAT << 40)) % 2**64


def sealed(row: bytes, place: int) -> bytes:
    """A shard's line: the row with its bookkeeping, and a check that it is this row for `place`."""
    body = row[:-2]
    return b"".join((body, _CHECK % xxhash.xxh3_64_hexdigest(body, place).encode()))


def unsealed(line: bytes, place: int) -> bytes | None:
    """The result in a shard's line; None unless it was written, as it is, for just this place."""
    body = line[:-_CHECK_BYTES]
    if line[-_CHECK_BYTES:] != _CHECK % xxhash.xxh3_64_hexdigest(body, place).encode():
        return None
    return body[: body.rindex(b',"request_key":')] + b"}\n"


_MOST_SECONDS: Final = 1e12


def microseconds(seconds: float) -> float:
    """Rounded to the microsecond; `round` takes ten times as long."""
    return int(seconds * 1e6 + 0.5) / 1e6


def _seconds(value: Raw) -> float:
    """A record's retrieval time in seconds; missing, negative or nonsense counts as 0."""
    try:
        seconds = decode_any(value)
    except msgspec.DecodeError:
        return 0.0
    if (type(seconds) is float or type(seconds) is int) and 0 < seconds < _MOST_SECONDS:
        return float(seconds)
    return 0.0
