"""What an earlier start already retrieved: an append-only log of rows, and when one is still good.

A row is good while its query, the settings and its versions are the same, every document in it
still says the same, and, unless it matched a path exactly, the corpora hold the same documents
under the same names. So an edited document costs exactly the rows that quote it. Like a shard it is
only ever appended to, by one process; a torn last line is skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import xxhash

from ragfleet.contexts.queries import Query
from ragfleet.contexts.store import CorpusStore
from ragfleet.corpus.download import normal_name
from ragfleet.errors import RagfleetError, StorageError

LOG_VERSION: Final = 2
CUT_VERSION: Final = 2
"""Goes up where documents that are too long are cut in another way: only rows that hold such ones
are made again. (1 lost all of a document that is one long line.)"""

_encode = msgspec.json.Encoder().encode


class _Entry(msgspec.Struct):
    key: str
    names: dict[str, str]
    """package==version → hash of which documents there were, under which names."""
    row: msgspec.Raw
    cut: int = 1
    """How documents that were too long were cut."""


class _Checked(msgspec.Struct):
    resolved_versions: dict[str, str] = {}
    match_kind: str = "search"
    documents: list[dict[str, Any]] = []
    success: bool = True
    dependencies: dict[str, Any] = {}
    missing_dependencies: list[str] = []


def row_key(query: Query, settings: dict[str, Any]) -> str:
    """Of everything a row's content is made from, but for the corpora."""
    parts = [LOG_VERSION, settings, query.query, query.target_api]
    parts += [sorted(query.dependencies.items()), query.error]
    return xxhash.xxh3_128_hexdigest(_encode(parts))


class RowLog:
    """Opened by one process at a time (the caller holds the lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO | None = None
        self._stale: set[str] = set()
        self._failed: dict[str, tuple[int, int, int]] = {}
        """Failure rows: place and hash. Tried again, most come out the same: not written again."""

    def load(self, is_good: Callable[[_Checked, dict[str, str]], bool]) -> int:
        """Index the rows that are still good; how many."""
        try:
            with open(self.path, "rb") as file:
                offset = 0
                for line in file:
                    self._take(line, offset, is_good)
                    offset += len(line)
        except FileNotFoundError:
            return 0
        return len(self._places)

    def _take(
        self, line: bytes, offset: int, is_good: Callable[[_Checked, dict[str, str]], bool]
    ) -> None:
        try:
            entry = msgspec.json.decode(line, type=_Entry)
            checked = msgspec.json.decode(entry.row, type=_Checked)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if not line.endswith(b"\n"):
            return
        is_cut_as_now = entry.cut == CUT_VERSION or not any(
            document.get("shortened") for document in checked.documents
        )
        if is_cut_as_now and is_good(checked, entry.names):
            self._places[entry.key] = (offset, len(line))
            self._stale.discard(entry.key)
        else:  # a later line of a key replaces an earlier one
            self._places.pop(entry.key, None)
            if checked.success:
                self._stale.add(entry.key)
            else:
                self._failed[entry.key] = (offset, len(line), xxhash.xxh3_64_intdigest(line))

    @property
    def stale(self) -> frozenset[str]:
        """Keys whose row a change of the corpora touched."""
        return frozenset(self._stale)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, key: str, names: dict[str, str], row: dict[str, Any]) -> None:
        line = _encode(_Entry(key, names, msgspec.Raw(_encode(row)), CUT_VERSION)) + b"\n"
        *place, digest = self._failed.get(key, (0, 0, None))
        if digest == xxhash.xxh3_64_intdigest(line):
            self._places[key] = (place[0], place[1])
            return
        if self._file is None:
            self._open()
        assert self._file is not None
        with self._storage():
            offset = self._file.tell()
            self._file.write(line)
        self._places[key] = (offset, len(line))

    def _open(self) -> None:
        with self._storage():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115 (closed by close)
            self._file.seek(0, os.SEEK_END)
            if self._file.tell():
                with open(self.path, "rb") as file:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        self._file.write(b"\n")  # closes a line that a crash tore

    def flush(self) -> None:
        if self._file is not None:
            with self._storage():
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # what couldn't be written was said before
                file.close()

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"Can't write {self.path}: {error.strerror}. What it holds is kept."
            ) from error

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], dict[str, Any]]]:
        """Reads rows back by key."""
        self.flush()

        def read(key: str) -> dict[str, Any]:
            offset, length = self._places[key]
            file.seek(offset)
            entry = msgspec.json.decode(file.read(length), type=_Entry)
            row: dict[str, Any] = msgspec.json.decode(entry.row)
            return row

        if not self._places:
            yield read
            return
        with open(self.path, "rb") as file:
            yield read


class Freshness:
    """Whether a logged row is what would be retrieved now."""

    def __init__(self, store: CorpusStore, nearest_version: bool) -> None:
        self._store, self._nearest = store, nearest_version
        self._hashes: dict[tuple[str, str], dict[str, str]] = {}

    def __call__(self, row: _Checked, names: dict[str, str]) -> bool:
        if not row.success:
            return False  # cheap to try again, and a corpus may have come
        try:
            for package, version in row.resolved_versions.items():
                wanted = _wanted(row.dependencies, package)
                if self._store.resolve(package, wanted, self._nearest) != version:
                    return False
                if row.match_kind != "path" and (
                    names.get(f"{package}=={version}")
                    != self._store.load(package, version).names_hash
                ):
                    return False
            if any(self._is_there(row, package) for package in row.missing_dependencies):
                return False
            return all(
                self._hash_of(document).get(document["path"]) == document["doc_sha1"]
                for document in row.documents
            )
        except (RagfleetError, KeyError, TypeError):
            return False

    def _is_there(self, row: _Checked, package: str) -> bool:
        try:
            wanted = _wanted(row.dependencies, normal_name(package))
            version = self._store.resolve(package, wanted, self._nearest)
            self._store.load_usable(normal_name(package), version)
        except RagfleetError:
            return False
        return True

    def _hash_of(self, document: dict[str, Any]) -> dict[str, str]:
        key = (document["package"], document["version"])
        if key not in self._hashes:
            corpus = self._store.load(*key)
            self._hashes[key] = {
                path: corpus.documents[number].doc_sha1 for path, number in corpus.paths.items()
            }
        return self._hashes[key]


def _wanted(dependencies: dict[str, Any], package: str) -> list[str]:
    for name, versions in dependencies.items():
        if normal_name(name) == package:
            listed = versions if isinstance(versions, list) else [versions]
            return [str(version) for version in listed if version]
    return []
