"""Records: the input format, its validation, and the key that joins a record to its answer.

Owns which fields a record has, what makes a line invalid, and request keys; `rows` owns what comes
of it. It knows nothing of files, workers, prompts or models. Everything here runs once per record
in a run of millions, so values that are only passed on stay the raw JSON bytes they came as.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import xxhash
from msgspec import UNSET, Raw, UnsetType

from ragfleet.nesting import MAX_DEPTH, is_too_deep

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

UNASKED_FIELDS: Final = frozenset({"retrieval_time", "context_length", "success"})
"""Fields that don't change what is asked, even where a user's class may read the whole record."""

ABSENT: Final = Raw(b"null")

_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode
decode_any = msgspec.json.Decoder().decode
encode = msgspec.json.Encoder().encode


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
        if is_too_deep(line):
            line.decode()
            return InvalidRecord(None, f"nested more than {MAX_DEPTH} deep")
        head = _decode_head(line)
        if not line.isascii():
            line.decode()  # msgspec skips over unread strings without checking their encoding
    except UnicodeDecodeError as error:
        return InvalidRecord(None, f"not UTF-8 (byte {_where(line, error)} of the line)", True)
    except msgspec.ValidationError as error:
        return InvalidRecord(None, f"not a JSON object of a record ({error})")
    except msgspec.DecodeError as error:
        return InvalidRecord(None, f"not valid JSON ({error}{_hint(line)})")
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


def _where(line: bytes, error: UnicodeDecodeError) -> int:
    """Where in the line; msgspec counts from where its string begins."""
    try:
        line.decode()
    except UnicodeDecodeError as of_the_line:
        error = of_the_line
    return error.start


def _hint(line: bytes) -> str:
    """What Python's own writer may have put there, and reads again."""
    found: list[str] = []
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(line.decode(), parse_constant=found.append)  # of bytes it guesses the encoding
    return f"; JSON has no {found[0]}: write null" if found else ""


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
        value = decode_any(line)
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
            self._fields = decode_object(self._line)
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
    id: Raw = ABSENT
    original_item_id: Raw = ABSENT
    query_index: Raw = ABSENT
    dedup_key: Raw = ABSENT
    target_api: Raw = ABSENT
    dependencies: Raw = ABSENT
    retrieval_method: Raw = ABSENT
    context_length: Raw | UnsetType = UNSET
    retrieval_time: Raw = ABSENT
    success: Raw = ABSENT

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
    query, method = fields["query"], fields.get("retrieval_method", ABSENT)
    context = _decode_text(fields["context"])
    return fields, _decode_text(query), context, _decode_method(method)


# ---- keys


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
            tail += b"id" + encode(head.id)
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
            parts.append(encode([name, len(value)]) + value)
        return b"".join(parts)


def repeat_key(key: RequestKey, occurrence: int) -> RequestKey:
    """The key of the n-th further line that is equal to one of `key` but is its own draw."""
    if occurrence == 0:
        return key
    return xxhash.xxh3_128_digest(key + b"#" + occurrence.to_bytes(8, "little"))


def normalise_json(value: Raw | bytes) -> bytes:
    """The same JSON value in one spelling; what msgspec can't hold stays as it is written."""
    try:
        return encode(decode_any(value))
    except (msgspec.DecodeError, RecursionError):
        return bytes(value)
