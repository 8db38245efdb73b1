"""Records and results: the two JSONL formats, their validation, and the key that joins them.

Owns which fields exist, their order in a result, what makes an input line invalid, and
`request_key`. It knows nothing of files, workers, prompts or models. Everything here runs once per
record in a run of millions, so values that are only passed on stay the raw JSON bytes they came as.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import xxhash
from msgspec import UNSET, Raw, UnsetType

RequestKey = bytes

INPUT_FIELDS: Final = (
    "id",
    "original_item_id",
    "query_index",
    "dedup_key",
    "query",
    "target_api",
    "dependencies",
    "retrieval_method",
    "context",
    "context_length",
    "retrieval_time",
    "success",
)
"""Documented fields of a context record; only `query` and `context` are needed."""

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

UNASKED_FIELDS: Final = frozenset({"retrieval_time", "context_length", "success"})
"""Fields that don't change what is asked, even where a user's class may read the whole record."""

SHARD_FIELDS: Final = frozenset({"request_key", "finished_at_ns", "row_check"})
"""A shard line's own bookkeeping: a record's fields of these names only stand in the output."""

_NOT_PASSED_THROUGH: Final = frozenset({*INPUT_FIELDS, *OUTPUT_FIELDS, *OWN_FIELDS})
_COPIED: Final = OUTPUT_FIELDS[:8]

_ABSENT: Final = Raw(b"null")

_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class _Head(msgspec.Struct):
    """The fields that decide what happens to a record; the rest is skipped unread."""

    query: Any = None
    context: Any = None
    id: Any = None
    retrieval_method: Any = None
    success: Any = True
    error: Any = None


_decode_head = msgspec.json.Decoder(_Head).decode


class Head(msgspec.Struct, frozen=True):
    """A valid line's deciding fields. `error` is set when its context could not be generated."""

    id: str | int | None
    query: str
    context: str
    retrieval_method: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class InvalidRecord:
    """A line that can't be answered: `id` is its own where it has one."""

    id: str | int | None
    reason: str
    undecodable: bool = False
    """The line is not UTF-8: many of these mean that the file is in another encoding."""


def parse_head(line: bytes) -> Head | InvalidRecord:
    """Decode and check one non-blank input line (bytes, with or without its line end)."""
    try:
        head = _decode_head(line)
        if not line.isascii():
            line.decode()  # msgspec skips over unread strings without checking their encoding
    except UnicodeDecodeError as error:
        return InvalidRecord(None, f"not UTF-8 (byte {error.start} of the line)", True)
    except msgspec.ValidationError as error:
        return InvalidRecord(None, f"not a JSON object of a record ({error})")
    except msgspec.DecodeError as error:
        return InvalidRecord(None, f"not valid JSON ({error})")
    except RecursionError:
        return InvalidRecord(None, "not valid JSON (nested too deeply)")
    identifier, query, context = head.id, head.query, head.context
    if type(identifier) is not str and identifier is not None and type(identifier) is not int:
        return InvalidRecord(None, f"`id` is {_type_name(identifier)}, not a string or an integer")
    method = head.retrieval_method
    if type(method) is not str and method is not None:
        return InvalidRecord(
            identifier, f"`retrieval_method` is {_type_name(method)}, not a string"
        )
    failed = head.success is not True
    if failed and type(head.success) is not bool:
        if head.success is not None:
            return InvalidRecord(
                identifier, f"`success` is {_type_name(head.success)}, not true or false"
            )
        failed = False
    if type(query) is not str:
        return InvalidRecord(identifier, f"`query` is {_type_name(query)}, not a string")
    if failed:
        reason = head.error if type(head.error) is str and head.error else "no reason given"
        if type(context) is not str:
            context = ""
        return Head(identifier, query, context, method, f"context generation failed: {reason}")
    if type(context) is not str:
        return InvalidRecord(identifier, f"`context` is {_type_name(context)}, not a string")
    if not query or query.isspace():
        return InvalidRecord(identifier, "`query` is blank")
    return Head(identifier, query, context, method, None)


def _type_name(value: object) -> str:
    if value is None:
        return "missing or null"
    return {bool: "a boolean", int: "a number", float: "a number", list: "a list"}.get(
        type(value), "an object" if isinstance(value, dict) else "a string"
    )


def parse_fields(line: bytes) -> dict[str, Raw]:
    """All top-level fields as raw JSON. Raises msgspec.DecodeError for an invalid line."""
    return _decode_fields(line)


def decode_object(line: bytes) -> dict[str, Any]:
    """A line's object as Python values; a number beyond a float's range becomes an infinity."""
    try:
        value = _decode_any(line)
    except msgspec.DecodeError:
        value = json.loads(line, parse_int=_parse_int)
    assert isinstance(value, dict)
    return value


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)  # Python refuses longer ones


class LazyRecord(Mapping[str, Any]):
    """The whole record as Python values, decoded when somebody first looks."""

    __slots__ = ("_fields", "_line")

    def __init__(self, line: bytes) -> None:
        self._line = line
        self._fields: dict[str, Any] | None = None

    def _decoded(self) -> dict[str, Any]:
        if self._fields is None:
            try:
                self._fields = decode_object(self._line)
            except RecursionError:
                raise ValueError("the record is nested too deeply to be decoded") from None
        return self._fields

    def __getitem__(self, name: str) -> Any:
        return self._decoded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __len__(self) -> int:
        return len(self._decoded())


_decode_text = msgspec.json.Decoder(str).decode
_decode_method = msgspec.json.Decoder(str | None).decode


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    """A valid line that has documented fields alone, as most have: the context is decoded with it.

    Its other values stay as they are written, like those of `parse_fields`.
    """

    query: Raw
    context: str
    id: Raw = _ABSENT
    original_item_id: Raw = _ABSENT
    query_index: Raw = _ABSENT
    dedup_key: Raw = _ABSENT
    target_api: Raw = _ABSENT
    dependencies: Raw = _ABSENT
    retrieval_method: Raw = _ABSENT
    context_length: Raw | UnsetType = UNSET
    retrieval_time: Raw = _ABSENT
    success: Raw = _ABSENT

    def raw(self) -> dict[str, Raw]:
        """What a result repeats of it, as `parse_fields` gives it."""
        values = msgspec.structs.asdict(self)
        return {name: value for name, value in values.items() if isinstance(value, Raw)}


_decode_plain = msgspec.json.Decoder(Plain).decode

Fields = Mapping[str, Raw] | Plain
"""What a result repeats of its record."""


def parse_sent(line: bytes, with_context: bool = False) -> tuple[Fields, str, str, str | None]:
    """(fields, query, context, retrieval_method) of a line that is known to be valid.

    Args:
        with_context: the fields must have the context too, as it is written.
    """
    fields: Fields
    if not with_context:
        try:
            fields = plain = _decode_plain(line)
        except msgspec.ValidationError:
            pass  # it has fields of its own
        else:
            query, method, context = plain.query, plain.retrieval_method, plain.context
            return fields, _decode_text(query), context, _decode_method(method)
    fields = _decode_fields(line)
    query, method = fields["query"], fields.get("retrieval_method", _ABSENT)
    context = _decode_text(fields["context"])
    return fields, _decode_text(query), context, _decode_method(method)


# --------------------------------------------------------------------------------------- keys


_pack_lengths = struct.Struct("<4q").pack


class Keyer:
    """Computes request keys: `xxh3_128(run_key, query, context, other fields, method, sample)`.

    Each part is preceded by its length, so no two different records read as the same bytes. Neither
    a tokenizer nor a template is needed, so planning costs no model.

    Args:
        run_key: 16 bytes that cover everything the run as a whole fixes.
        fields: further fields that the prompt template names; None for all that can matter.
        distinct: also cover the id, so that equal records are answered one by one.
    """

    def __init__(self, run_key: bytes, fields: Iterable[str] | None, distinct: bool) -> None:
        self._run_key = run_key
        self._fields = None if fields is None else tuple(sorted(fields))
        self._distinct = distinct

    def key(self, head: Head, line: bytes) -> RequestKey:
        query = head.query.encode()
        context = head.context.encode()
        method = b"-" if head.retrieval_method is None else b"=" + head.retrieval_method.encode()
        tail = b"" if self._fields == () else self._other_fields(line)
        if self._distinct:
            tail += b"id" + _encode(head.id)
        lengths = _pack_lengths(len(query), len(context), len(method), len(tail))
        return xxhash.xxh3_128_digest(
            b"".join((self._run_key, lengths, query, context, method, tail))
        )

    def _other_fields(self, line: bytes) -> bytes:
        fields = _decode_fields(line)
        if self._fields is None:
            skipped = UNASKED_FIELDS | {"query", "context", "retrieval_method"}
            names: tuple[str, ...] = tuple(sorted(fields.keys() - skipped))
        else:
            names = self._fields
        parts = []
        for name in names:
            value = b"" if name not in fields else normalise_json(fields[name])
            parts.append(_encode([name, len(value)]) + value)
        return b"".join(parts)


def repeat_key(key: RequestKey, occurrence: int) -> RequestKey:
    """The key of the n-th further line that is equal to one of `key` but is its own draw."""
    if occurrence == 0:
        return key
    return xxhash.xxh3_128_digest(key + b"#" + occurrence.to_bytes(8, "little"))


def normalise_json(value: Raw | bytes) -> bytes:
    """The same JSON value in one spelling; what msgspec can't hold stays as it is written."""
    try:
        return _encode(_decode_any(value))
    except (msgspec.DecodeError, RecursionError):
        return bytes(value)


# -------------------------------------------------------------------------------------- rows


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
        own.append(("error_type", _encode(row.error_type)))
    return Answered(bytes(row.answer), row.inference_time, row.worker_rank, row.success, tuple(own))


def encode_value(value: Any) -> bytes:
    """JSON of one value; a lone surrogate that a model produced becomes U+FFFD."""
    try:
        return _encode(value)
    except UnicodeEncodeError:
        return _encode(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


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
    identifier = get("id", _ABSENT)
    retrieval_time = _seconds(get("retrieval_time", _ABSENT))
    documented = _Documented(
        Raw(_encode(line_id)) if identifier == _ABSENT else identifier,
        get("original_item_id", _ABSENT),
        get("query_index", _ABSENT),
        get("dedup_key", _ABSENT),
        get("query", _ABSENT),
        get("target_api", _ABSENT),
        get("dependencies", _ABSENT),
        get("retrieval_method", _ABSENT),
        get("context_length", context_length),
        Raw(answered.answer),
        retrieval_time,
        answered.inference_time,
        microseconds(retrieval_time + answered.inference_time),
        answered.worker_rank,
        answered.success,
    )
    parts: list[Raw | bytes] = [_encode(documented)[:-1]]
    if include_context and "context" in fields:
        parts += (b',"context":', fields["context"])
    if not fields.keys() <= _NOT_PASSED_THROUGH:
        for name in fields:
            if name not in _NOT_PASSED_THROUGH and not (extra and name in SHARD_FIELDS):
                parts += (b"," + _encode(name) + b":", fields[name])
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
        Raw(_encode(line_id)) if identifier == _ABSENT else identifier,
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
        line = _encode(row) + b"\n"
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
    """A record's retrieval time in seconds; missing or nonsense counts as 0."""
    try:
        seconds = _decode_any(value)
    except msgspec.DecodeError:
        return 0.0
    if (type(seconds) is float or type(seconds) is int) and abs(seconds) < _MOST_SECONDS:
        return float(seconds)
    return 0.0
