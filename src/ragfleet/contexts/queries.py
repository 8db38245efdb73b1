"""Query files in their documented and their found forms, as one stream of queries.

    {"id", "query", "target_api", "target_dependency" | "dependencies"}     a line, or an element
    {"id", "queries": [{"query", "target_api"} | "text", …], …}             several of one item
    {"0": {"id", "queries": […], "original_data": {"target_dependency": {}}}, …}    the dict form

It knows nothing of corpora. What can't be read becomes a query with `error`, in its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from ragfleet.errors import InputError

_DEPENDENCY: Final = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(.*)")
_KNOWN: Final = frozenset(
    {"id", "query", "queries", "target_api", "target_dependency", "dependencies", "original_data"}
    | {"original_item_id", "query_index", "dedup_key", "question"}
)
_MAX_WHOLE_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Query:
    """One question.

    `dependencies` maps a package to the versions it may have, the preferred one first.
    """

    id: str | int
    original_item_id: str | int
    query_index: int
    query: str
    target_api: str | None = None
    dependencies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def dedup_key(self) -> str:
        """Equal for equal (query, target, dependencies), in every run and process."""
        parts = [self.query, self.target_api, sorted(self.dependencies.items())]
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode(parts))


def read_queries(path: Path) -> Iterator[Query]:
    """Every query of the file, in order. Raises InputError when the file as a whole is no good."""
    number = 0
    for position, item in _items(path):
        for query in _queries_of(position, item):
            number += 1
            yield query
    if number == 0:
        raise InputError(f"{path} has no queries.")


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """(position, item or an error text wrapped in _Broken)."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    except FileNotFoundError:
        raise InputError(f"There is no queries file {path}.") from None
    except OSError as error:
        raise InputError(f"Can't read the queries file {path}: {error.strerror}.") from None
    if not start:
        raise InputError(f"The queries file {path} is empty.")
    if start[:1] == b"[" or _is_whole_object(start):
        yield from _whole(path)
        return
    with open(path, "rb") as file:
        for line_no, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if line_no == 1 else line
            if text.strip():
                try:
                    yield line_no, msgspec.json.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    yield line_no, _Broken(f"line {line_no} is not valid JSON ({error})")


@dataclass(frozen=True)
class _Broken:
    reason: str


def _is_whole_object(start: bytes) -> bool:
    """Whether the file is one object over many lines, or the dict form on one line."""
    first = start.partition(b"\n")[0]
    try:
        value = msgspec.json.decode(first)
    except msgspec.DecodeError:
        return start[:1] == b"{" and (b'"query"' not in first or b"\n" not in start)
    return isinstance(value, dict) and bool(value) and all(map(_is_item, value.values()))


def _is_item(value: Any) -> bool:
    return isinstance(value, dict) and bool({"query", "queries"} & value.keys())


def _whole(path: Path) -> Iterator[tuple[int, Any]]:
    if path.stat().st_size > _MAX_WHOLE_BYTES:
        raise InputError(
            f"{path} is one JSON value of more than 1 GiB; write it as JSONL, one object a line."
        )
    try:
        value = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if isinstance(value, list):
        yield from enumerate(value, 1)
    elif isinstance(value, dict) and _is_item(value):
        yield 1, value
    elif isinstance(value, dict):
        for position, (key, item) in enumerate(value.items(), 1):
            named = isinstance(item, dict) and "id" not in item
            yield position, {"id": key, **item} if named else item
    else:
        raise InputError(f"{path} holds neither a list nor an object of queries.")


def _queries_of(position: int, item: Any) -> Iterator[Query]:
    name = f"line:{position}"
    if isinstance(item, _Broken):
        yield Query(name, name, 0, "", error=item.reason)
        return
    if not isinstance(item, dict):
        yield Query(name, name, 0, "", error=f"item {position} is not an object")
        return
    identifier = item.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        identifier = name
    several = item.get("queries")
    if several is None:
        original = item.get("original_item_id", identifier)
        index = item.get("query_index", 0)
        yield _query(identifier, original, index if isinstance(index, int) else 0, item, item)
        return
    if not isinstance(several, list):
        yield Query(identifier, identifier, 0, "", error="`queries` is not a list")
        return
    for index, entry in enumerate(several):
        one = entry if isinstance(entry, dict) else {"query": entry}
        yield _query(f"{identifier}_{index}", identifier, index, one, item)


def _query(
    identifier: str | int,
    original: Any,
    index: int,
    one: Mapping[str, Any],
    item: Mapping[str, Any],
) -> Query:
    original = original if isinstance(original, str | int) else identifier
    text = one.get("query", one.get("question"))
    target = one.get("target_api", item.get("target_api"))
    error = None
    dependencies: dict[str, tuple[str, ...]] = {}
    if not isinstance(text, str):
        error, text = "`query` is missing or not a string", ""
    elif not text.strip():
        error = "`query` is blank"
    if target is not None and not isinstance(target, str):
        error, target = error or "`target_api` is not a string", None
    try:
        dependencies = _dependencies(one, item)
    except ValueError as problem:
        error = error or str(problem)
    extra = {name: value for name, value in one.items() if name not in _KNOWN}
    return Query(identifier, original, index, text, target or None, dependencies, extra, error)


def _dependencies(one: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    original = item.get("original_data")
    places = [one, item, original if isinstance(original, dict) else {}]
    for place in places:
        for name in ("target_dependency", "dependencies"):
            if place.get(name):
                return _parse_dependencies(place[name])
    return {}


def _parse_dependencies(value: Any) -> dict[str, tuple[str, ...]]:
    if isinstance(value, str):
        value = [part for part in re.split(r"[,;\n]", value) if part.strip()]
    found: dict[str, tuple[str, ...]] = {}
    if isinstance(value, list):
        for text in value:
            match = _DEPENDENCY.fullmatch(text) if isinstance(text, str) else None
            if match is None:
                raise ValueError(f"{text!r} in `dependencies` is not `package==version`")
            found[match[1]] = (match[2].removeprefix("==").strip(),) if match[2] else ()
        return found
    if not isinstance(value, dict):
        raise ValueError("`dependencies` is neither an object nor a list")
    for package, versions in value.items():
        listed = versions if isinstance(versions, list) else [versions]
        if not all(isinstance(version, str | int | float | None) for version in listed):
            raise ValueError(f"the version of {package} in `dependencies` is not a string")
        texts = [str(version).strip().removeprefix("==") for version in listed if version]
        found[package] = tuple(texts)
    return found
