"""Shards: the append-only results files that are the only truth of a run.

Owns their names, the single writer of each, the tolerant reader, and the rule that picks one answer
per key. It knows nothing of plans or claims: what a shard says holds whoever planned it.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from ragfleet.errors import StorageError

ANSWER: Final = np.dtype(
    [
        ("key_hi", "<u8"),
        ("key_lo", "<u8"),
        ("finished_at_ns", "<i8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("shard", "<u2"),
        ("success", "u1"),
        ("_", "u1"),
    ]
)
"""Where one finished line is: 40 bytes."""

_pack_answer = struct.Struct("<16sqQIHBB").pack
_BUFFER_BYTES: Final = 1 << 20


class _ScanRow(msgspec.Struct):
    """Strict in all that the merge reads, so that no line it can't use is ever chosen."""

    request_key: str
    finished_at_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    success: bool
    answer: str | None
    inference_time: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    worker_rank: int | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_type: str | UnsetType = UNSET


_decode_scan_row = msgspec.json.Decoder(_ScanRow).decode


def shard_path(output_file: Path, rank: int, copy: int = 0) -> Path:
    """`output_rank0.jsonl` beside `output.jsonl`; further copies are `output_rank0.1.jsonl`, …"""
    suffix = f".{copy}" if copy else ""
    return output_file.with_name(f"{output_file.stem}_rank{rank}{suffix}.jsonl")


def partial_path(output_file: Path) -> Path:
    """Where `merge --partial` writes."""
    return output_file.with_name(f"{output_file.stem}.partial.jsonl")


def list_shards(output_file: Path) -> list[Path]:
    """All shards of an output, by rank and age; none where there is no such folder."""
    pattern = re.compile(re.escape(output_file.stem) + r"_rank(\d+)(?:\.(\d+))?\.jsonl")
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(output_file.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and entry.is_file():
                found.append((int(match[1]), int(match[2] or 0), output_file.parent / entry.name))
    return [path for *_, path in sorted(found)]


def is_own_name(path: Path, output_file: Path) -> bool:
    """Whether a file would be taken for a shard, a partial merge or the run folder of an output."""
    stem = re.escape(output_file.stem)
    own = re.compile(stem + r"(_rank\d+(\.\d+)?\.jsonl|\.partial\.jsonl)")
    folder = output_file.absolute().parent
    inside = folder / f"{output_file.stem}.run"
    path = path.absolute()
    return (
        path.parent == folder and own.fullmatch(path.name) is not None
    ) or inside in path.parents


def rank_of(path: Path) -> int:
    match = re.search(r"_rank(\d+)(?:\.\d+)?\.jsonl$", path.name)
    assert match is not None
    return int(match[1])


class ShardWriter:
    """The one writer of one shard: one `write` per finished request, `fsync` from another thread.

    The file is created on `open`, never reopened by anyone: a stopped zombie and its replacement
    have a file each.
    """

    def __init__(self, output_file: Path, rank: int) -> None:
        self._output_file = output_file
        self._rank = rank
        self._fd = -1
        self._unsynced = False
        self.path: Path | None = None
        self.size_bytes = 0

    def open(self) -> Path:
        """Create the file: the first free name of this rank. Idempotent."""
        if self.path is None:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
            copy = 0
            while self._fd < 0:
                path = shard_path(self._output_file, self._rank, copy)
                try:
                    self._fd = os.open(path, flags, 0o666)
                except FileExistsError:
                    copy += 1
                except OSError as error:
                    raise StorageError(f"Can't create {path}: {error.strerror}.") from error
            self.path = path
            fsync_directory(path.parent)
        return self.path

    def append(self, row: bytes) -> None:
        """Write one line at once. A line that does not fit on the disk is torn; readers skip it."""
        try:
            written = os.write(self._fd, row)
        except OSError as error:
            raise StorageError(f"Can't write {self.path}: {error.strerror}.") from error
        if written != len(row):
            raise StorageError(f"Can't write {self.path}: no space left on the device.")
        self.size_bytes += written
        self._unsynced = True

    def sync(self) -> None:
        """Make what was appended survive a power loss."""
        if self._fd >= 0 and self._unsynced:
            self._unsynced = False
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise StorageError(f"Can't sync {self.path}: {error.strerror}.") from error

    def close(self) -> None:
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1


def fsync_directory(path: Path) -> None:
    """Make a created or renamed name in `path` survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class ShardIndex:
    """Where all finished lines of some shards are.

    Attributes:
        paths: `answers["shard"]` is a position here.
        answers: [num_lines] of ANSWER, in reading order.
        num_invalid: lines that are not a result: torn, foreign, garbled.
    """

    paths: tuple[Path, ...]
    answers: NDArray[Any]
    num_invalid: int


def scan_shards(paths: Sequence[Path]) -> ShardIndex:
    """Read every line of the shards once; invalid lines are counted and skipped."""
    rows = bytearray()
    num_invalid = 0
    for number, path in enumerate(paths):
        for offset, line, key, row in _rows(path):
            if row is None:
                num_invalid += 1
                continue
            rows += _pack_answer(
                key,
                row.finished_at_ns,
                offset,
                len(line),
                number,
                row.success,
                0,
            )
    return ShardIndex(tuple(paths), np.frombuffer(rows, ANSWER), num_invalid)


def finished_keys(path: Path, start_bytes: int) -> set[bytes]:
    """Keys of the lines of one shard from `start_bytes` on; a shard that is gone has none."""
    try:
        return {key for *_, key, row in _rows(path, start_bytes) if row}
    except FileNotFoundError:
        return set()


def _rows(path: Path, start_bytes: int = 0) -> Iterator[tuple[int, bytes, bytes, _ScanRow | None]]:
    """(offset, line, key, row) of each line that is not blank; the row is None if it is none."""
    offset = start_bytes
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        file.seek(start_bytes)
        for line in file:
            row: _ScanRow | None
            try:
                row = _decode_scan_row(line)
                key = bytes.fromhex(row.request_key)
                if not line.isascii():
                    line.decode()  # msgspec does not look into values that nobody asks for
                # What types can't say. `fromhex` reads over spaces, so both lengths count.
                is_key = len(key) == 16 and len(row.request_key) == 32
                if not is_key or (row.success and row.answer is None):
                    row = None
            except (msgspec.DecodeError, ValueError, RecursionError):
                row, key = None, b""
            if row is not None or not line.isspace():
                yield offset, line, key, row
            offset += len(line)


@dataclass(frozen=True)
class Winners:
    """One finished line per key, sorted by key: see `choose`."""

    paths: tuple[Path, ...]
    answers: NDArray[Any]
    num_superseded: int = 0

    def find(self, key_hi: NDArray[np.uint64], key_lo: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Position in `answers` for each key, -1 where it has none."""
        hi, lo = self.answers["key_hi"], self.answers["key_lo"]
        if not len(hi):
            return np.full(len(key_hi), -1, np.int64)
        position = np.searchsorted(hi, key_hi).astype(np.int64)
        last = len(hi) - 1
        while True:
            here = np.minimum(position, last)
            same_hi = (position <= last) & (hi[here] == key_hi)
            on = same_hi & (lo[here] != key_lo)
            if not on.any():
                return np.where(same_hi, here, -1)
            position[on] += 1


def choose(index: ShardIndex) -> Winners:
    """Pick the line that counts for each key, whatever order the shards are read in.

    Success beats failure; among successes the least (finished_at_ns, shard, offset), among failures
    the latest. So merging is idempotent, and a retry only ever appends.
    """
    answers = index.answers
    order = np.lexsort((answers["key_lo"], answers["key_hi"]))
    answers = answers[order]
    hi, lo = answers["key_hi"], answers["key_lo"]
    same_as_previous = np.r_[False, (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])]
    if not same_as_previous.any():
        return Winners(index.paths, answers)
    contested = same_as_previous | np.r_[same_as_previous[1:], False]
    rivals = answers[contested]
    success = rivals["success"].astype(bool)
    age = np.where(success, rivals["finished_at_ns"], -rivals["finished_at_ns"])
    # Names, not positions, so that the choice does not depend on which shards were listed.
    by_name = np.argsort(np.argsort([path.name for path in index.paths]))
    shard = by_name[rivals["shard"]]
    ranking = np.lexsort(
        (rivals["offset"], shard, age, ~success, rivals["key_lo"], rivals["key_hi"])
    )
    rivals = rivals[ranking]
    hi, lo = rivals["key_hi"], rivals["key_lo"]
    first = np.r_[True, (hi[1:] != hi[:-1]) | (lo[1:] != lo[:-1])]
    kept = np.concatenate([answers[~contested], rivals[first]])
    kept = kept[np.lexsort((kept["key_lo"], kept["key_hi"]))]
    return Winners(index.paths, kept, num_superseded=len(answers) - len(kept))
