"""Query files in their documented and their found forms, as one stream of queries.

    {"id", "query", "target_api", "target_dependency" | "dependencies"}     a line, or an element
    {"id", "queries": [{"query", "target_api"} | "text", …], …}             several of one item
    {"0": {"id", "queries": […], "original_data": {"target_dependency": {}}}, …}    the dict form

It knows nothing of corpora. What can't be read becomes a query with `error`, in its place.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from ragfleet.errors import InputError
from ragfleet.index import UTF8_BOM, check_is_text, encoding_message

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


def check_queries(path: Path, start_index: int = 0) -> None:
    """Raises InputError where the file as a whole is no good, or has nothing from `start_index` on.

    Some bad queries are rows that say so; a file of nothing else is a mistake.
    """
    first = None
    number = -1
    for number, query in enumerate(read_queries(path)):
        first = first or query.error
        if query.error is None and number >= start_index:
            return
    if number < start_index:
        raise InputError(f"--start_index is {start_index}, and {path} has {number + 1} queries.")
    if first is None:
        raise InputError(f"{path}: no query from --start_index {start_index} on can be used.")
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError:
                raise InputError(encoding_message(path, line)) from None
    raise InputError(
        f"{path}: none of its queries can be used; {first}. A query is an object with `query` and,"
        " where known, `target_api` and `dependencies`."
    )


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """(position, item or why it is none, as _Broken)."""
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):  # opened, a pipe would wait
        raise InputError(f"{path} is not a regular file; it is read more than once: save it first.")
    try:
        with open(path, "rb") as file:
            start = file.read(4096).removeprefix(UTF8_BOM).lstrip()
    except FileNotFoundError:
        raise InputError(f"There is no queries file {path}.") from None
    except OSError as error:
        raise InputError(f"Can't read the queries file {path}: {error.strerror}.") from None
    if not start:
        raise InputError(f"The queries file {path} is empty.")
    check_is_text(path, start)
    if start[:1] == b"[" or (start[:1] == b"{" and _is_one_object(path)):
        yield from _whole(path)
        return
    for line_no, line in _lines(path):
        try:
            yield line_no, msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield line_no, _Broken(f"line {line_no} is not valid JSON ({error})")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank."""
    with open(path, "rb") as file:
        for line_no, line in enumerate(file, 1):
            text = line.removeprefix(UTF8_BOM) if line_no == 1 else line
            if text.strip():
                yield line_no, text


@dataclass(frozen=True)
class _Broken:
    reason: str


def _is_one_object(path: Path) -> bool:
    """Whether the file is one object, over many lines or as the dict form on one line."""
    lines = [line for _, line in itertools.islice(_lines(path), 2)]
    try:
        value = msgspec.json.decode(lines[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # A broken first line is followed by a whole object, the start of one object is not.
        return len(lines) > 1 and not _is_object(lines[1])
    return len(lines) == 1 and isinstance(value, dict) and all(map(_is_item, value.values()))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _is_item(value: Any) -> bool:
    return isinstance(value, dict) and bool({"query", "queries"} & value.keys())


def _whole(path: Path) -> Iterator[tuple[int, Any]]:
    if path.stat().st_size > _MAX_WHOLE_BYTES:
        raise InputError(
            f"{path} is one JSON value of more than 1 GiB; write it as JSONL, one object a line."
        )
    data = path.read_bytes().removeprefix(UTF8_BOM)
    try:
        data.decode()
        value = msgspec.json.decode(data)
    except UnicodeDecodeError:
        raise InputError(encoding_message(path, data)) from None
    except (msgspec.DecodeError, RecursionError) as error:
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
    if several is None or (several == [] and "query" in item):
        original = item.get("original_item_id", identifier)
        index = item.get("query_index", 0)
        yield _query(identifier, original, index if isinstance(index, int) else 0, item, item)
        return
    if not isinstance(several, list):
        yield Query(identifier, identifier, 0, "", error="`queries` is not a list")
        return
    if not several:
        yield Query(identifier, identifier, 0, "", error="`queries` is empty")
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
    extra = {name: value for name, value in {**item, **one}.items() if name not in _KNOWN}
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
