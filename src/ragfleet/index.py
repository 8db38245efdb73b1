"""The one streaming pass over the input: where each record is, its key, its prefix group, its size.

Owns the in-memory index of a contexts file (48 bytes a record) and the file-level complaints. It
keeps no text: whoever needs a record reads it again at its offset and compares the line's hash.
"""

from __future__ import annotations

import os
import shlex
import stat
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from ragfleet.errors import InputError
from ragfleet.records import Head, InvalidRecord, Keyer, parse_head

RECORD: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("line_hash", "<u8"),
        ("key_hi", "<u8"),
        ("key_lo", "<u8"),
        ("length", "<u4"),
        ("line_no", "<u4"),
        ("leader", "<u4"),
        ("kind", "<u4"),
    ]
)
"""One row per record, in file order. `leader` is the row that is generated for this one's key."""

GROUPING: Final = np.dtype([("group", "<u8"), ("prefix_bytes", "<u4"), ("suffix_bytes", "<u4")])
"""What planning needs beside it, dropped afterwards."""

_pack_record = struct.Struct("<QQ16sIIII").pack
_pack_grouping = struct.Struct("<QII").pack
_PROGRESS_EVERY: Final = 1 << 16
_BUFFER_BYTES: Final = 1 << 20
_READ_BYTES: Final = 1 << 18
UTF8_BOM: Final = b"\xef\xbb\xbf"


class Kind(IntEnum):
    """What a record is, before anything is generated."""

    SEND = 0
    INVALID = 1
    FAILED_CONTEXT = 2


@dataclass(frozen=True)
class Index:
    """All records of one contexts file.

    Attributes:
        num_bytes: size of the file as far as it was read.
        records: [num_records] of RECORD. Keys are those of the line alone: `plan` tells repeats
        apart. grouping: [num_records] of GROUPING. num_missing_ids: records without an id, which
        are called line:<n>. num_repeated_ids: records whose id an earlier one has too.
        first_invalid: (line number, reason) of the first invalid lines, at most ten.
    """

    path: Path
    num_bytes: int
    records: np.ndarray[Any, np.dtype[np.void]]
    grouping: np.ndarray[Any, np.dtype[np.void]]
    num_missing_ids: int
    num_repeated_ids: int
    first_invalid: tuple[tuple[int, str], ...]

    def __len__(self) -> int:
        return len(self.records)


def build_index(
    path: Path, keyer: Keyer, on_progress: Callable[[int, float], None] | None = None
) -> Index:
    """Read the whole file once.

    Args:
        on_progress: called now and then with (records so far, share of the file read).

    Raises:
        InputError: no such file, empty, another encoding, not JSONL, or not one valid record.
    """
    size = _checked_size(path)
    rows, grouping, id_hashes = bytearray(), bytearray(), array("Q")
    num_valid = num_undecodable = 0
    first_invalid: list[tuple[int, str]] = []
    undecodable_sample = b""
    key_of = keyer.key
    line_hash = group_hash = id_hash = xxhash.xxh3_64_intdigest
    offset = line_no = num_records = 0
    with open(path, "rb", buffering=_BUFFER_BYTES) as file:
        if file.read(3) == UTF8_BOM:
            offset = 3
        else:
            file.seek(0)
        for line in file:
            line_no += 1
            length = len(line)
            head = parse_head(line)
            if type(head) is Head:
                num_valid += 1
                if head.error is None:
                    context = head.context.encode()
                    method = head.retrieval_method
                    rows += _pack_record(
                        offset, line_hash(line), key_of(head, line), length, line_no, num_records, 0
                    )
                    grouping += _pack_grouping(
                        group_hash(context if method is None else context + method.encode()),
                        len(context),
                        len(head.query.encode()),
                    )
                else:
                    rows += _pack_record(
                        offset, line_hash(line), b"", length, line_no, num_records, 2
                    )
                    grouping += _pack_grouping(0, 0, 0)
                num_records += 1
            elif not line.isspace():
                assert isinstance(head, InvalidRecord)
                rows += _pack_record(offset, line_hash(line), b"", length, line_no, num_records, 1)
                grouping += _pack_grouping(0, 0, 0)
                num_records += 1
                if len(first_invalid) < 10:
                    first_invalid.append((line_no, head.reason))
                if head.undecodable:
                    num_undecodable += 1
                    undecodable_sample = undecodable_sample or line
            offset += length
            if head.id is not None:
                id_hashes.append(id_hash(str(head.id).encode()))
            if on_progress is not None and line_no % _PROGRESS_EVERY == 0:
                on_progress(num_records, offset / max(size, 1))
    if num_records == 0:
        raise InputError(f"{path} has no records: every line is blank.")
    if num_undecodable * 2 > num_records or (num_valid == 0 and num_undecodable):
        raise InputError(encoding_message(path, undecodable_sample))
    if num_valid == 0:
        number, reason = first_invalid[0]
        raise InputError(
            f"{path}: not one of {num_records} lines is a record; line {number}: {reason}."
        )
    return Index(
        path=path,
        num_bytes=offset,
        records=np.frombuffer(rows, RECORD),
        grouping=np.frombuffer(grouping, GROUPING),
        num_missing_ids=num_records - len(id_hashes),
        num_repeated_ids=len(id_hashes) - len(np.unique(np.array(id_hashes, np.uint64))),
        first_invalid=tuple(first_invalid),
    )


def read_lines(fd: int, offsets: NDArray[Any], lengths: NDArray[Any]) -> Iterator[bytes]:
    """Lines at these places of a file; neighbours are read together, up to `_READ_BYTES`."""
    if not len(offsets):
        return
    ends = offsets + lengths
    last_of_run = np.flatnonzero(np.r_[ends[:-1] != offsets[1:], True])
    run_ends = np.repeat(ends[last_of_run], np.diff(last_of_run, prepend=-1))
    blocks = np.maximum(lengths, np.minimum(run_ends - offsets, _READ_BYTES))
    block, begin, end = b"", 0, 0
    for start, stop, num_bytes in zip(
        offsets.tolist(), ends.tolist(), blocks.tolist(), strict=True
    ):
        if start < begin or stop > end:
            block = os.pread(fd, num_bytes, start)
            begin, end = start, start + num_bytes
        yield block[start - begin : stop - begin]


def check_is_file(path: Path) -> None:
    """Raises InputError for what is no regular file, without opening it: a pipe would wait."""
    if is_stream(path):
        raise InputError(
            f"The contexts file {path} is another file to each process, and workers read it too;"
            " give its own name."
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"There is no contexts file {path}.") from None
    except OSError as error:
        raise InputError(f"Can't read the contexts file {path}: {error.strerror}.") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"The contexts file {path} is a folder; name a file in it.")
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise InputError(
            f"{path} is {kind}, not a regular file; it is read more than once, so save it first."
        )


def is_stream(path: Path) -> bool:
    """Whether a name like /dev/stdin stands for a regular file that this process has open."""
    folder = Path(os.path.realpath(path.parent))
    return os.path.isfile(path) and (folder == Path("/dev") or folder.is_relative_to("/proc"))


def _checked_size(path: Path) -> int:
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"Can't read the contexts file {path}: {error.strerror}.") from None
    if not start:
        raise InputError(f"The contexts file {path} is empty.")
    check_is_text(path, start)
    if _is_array(start.removeprefix(UTF8_BOM)):
        raise InputError(
            f"{path} is a JSON array, not JSONL with one object a line; convert it:"
            f" jq -c '.[]' {_quoted(path)} > {_quoted(path.with_suffix('.lines.jsonl'))}"
        )
    return size


def check_is_text(path: Path, start: bytes) -> None:
    """Raises InputError for a file whose first bytes say that it is UTF-16 or compressed."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(_convert(path, "UTF-16"))
    if start[:2] == b"\x1f\x8b":
        target = path.with_suffix("" if path.suffix == ".gz" else ".unpacked.jsonl")
        raise InputError(
            f"{path} is gzip-compressed; unpack it first:"
            f" gunzip -c {_quoted(path)} > {_quoted(target)}"
        )


def _is_array(start: bytes) -> bool:
    """Whether a file that begins so is one array, and not JSONL whose first line is a wrong one."""
    first, _, rest = start.lstrip().partition(b"\n")
    if not first.startswith(b"["):
        return False
    if not rest.strip():
        return True
    try:
        msgspec.json.decode(first)
    except (msgspec.DecodeError, RecursionError):
        return True
    return False


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def encoding_message(path: Path, line: bytes) -> str:
    """What to do about a file of which `line` is not UTF-8."""
    for encoding in ("gb18030", "big5", "shift_jis"):
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            continue
        return _convert(path, encoding.upper().replace("_", "-"))
    return _convert(path, "ISO-8859-1")


def _convert(path: Path, encoding: str) -> str:
    target = path.with_suffix(".utf8.jsonl")
    return (
        f"{path} is not UTF-8 (it looks like {encoding}); convert it:"
        f" iconv -f {encoding} -t UTF-8 {_quoted(path)} > {_quoted(target)}"
    )
