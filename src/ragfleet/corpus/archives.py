"""Reading wheels and sdists that nobody vouches for.

Only regular files with a wanted suffix are copied out, under names that stay inside the target
folder; links, devices and anything outside are counted, never followed. Nothing is executed. Sizes
are counted while decompressing, so a header that lies about them gains nothing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Final

from ragfleet.errors import RagfleetError

WANTED_SUFFIXES: Final = (".py", ".pyi", ".pyx", ".pxi")
MAX_FILE_BYTES: Final = 16 << 20
MAX_TOTAL_BYTES: Final = 512 << 20
MAX_STREAM_BYTES: Final = 8 << 30
MAX_MEMBERS: Final = 200_000
_BLOCK: Final = 1 << 16
_ENCRYPTED: Final = 0x1
"""Bit of a zip member's flags; zipfile raises a plain RuntimeError for it."""


class ArchiveError(RagfleetError):
    """An archive that can't be read, or that is built to do harm."""


@dataclass
class Extracted:
    """What came out of an archive. `names` are all its members' names, unwanted ones too."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def extract(archive: Path, folder: Path) -> Extracted:
    """Copy the wanted files of `archive` to `folder`, which must not exist yet.

    Raises ArchiveError when the archive is broken or passes a limit; then `folder` is removed.
    """
    extracted = Extracted(folder)
    folder.mkdir(parents=True)
    total = 0
    try:
        for name, kind, open_member in _members(archive):
            extracted.names.append(name)
            if len(extracted.names) > MAX_MEMBERS:
                raise ArchiveError(f"{archive.name} has more than {MAX_MEMBERS:,} members.")
            if kind != "file":
                if kind != "folder":
                    extracted.refused.append(f"{name} (a {kind})")
                continue
            if not name.endswith(WANTED_SUFFIXES):
                continue
            target = _inside(folder, name)
            if target is None:
                extracted.refused.append(f"{name} (outside the folder)")
                continue
            out = _create(target)
            if out is None:
                extracted.refused.append(f"{name} (in the way of another member)")
                continue
            with out:
                total += _copy(open_member, out, archive.name, MAX_TOTAL_BYTES - total)
            extracted.files.append(target)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        NotImplementedError,  # unknown compressions
        ValueError,
    ) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArchiveError(f"{archive.name} can't be read: {error}") from error
    except ArchiveError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return extracted


def _members(archive: Path) -> Iterator[tuple[str, str, Callable[[], IO[bytes] | None]]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                kind = "file" if mode in (0, stat.S_IFREG) else "link or device"
                if info.is_dir():
                    kind = "folder"
                yield info.filename, kind, partial(_opened, zipped, info)
        return
    # A stream ("r|"): members come one after another and nothing is sought, so a bomb stops at the
    # limit instead of being unpacked to find the next header.
    with (
        open(archive, "rb") as raw,
        _decompressed(raw) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            kind = "file" if member.isreg() else "link or device"
            if member.isdir():
                kind = "folder"
            yield member.name, kind, partial(tar.extractfile, member)


def _opened(zipped: zipfile.ZipFile, member: zipfile.ZipInfo) -> IO[bytes]:
    if member.flag_bits & _ENCRYPTED:
        name = PurePosixPath(zipped.filename or "").name
        raise ArchiveError(f"{name} can't be read: {member.filename} is encrypted.")
    return zipped.open(member)


class _Limited(io.RawIOBase):
    """A stream that ends in an error after MAX_STREAM_BYTES."""

    def __init__(self, inner: IO[bytes]) -> None:
        self._inner, self._read = inner, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._inner.read(min(len(buffer), _BLOCK))
        self._read += len(data)
        if self._read > MAX_STREAM_BYTES:
            raise ArchiveError(f"the archive unpacks to more than {MAX_STREAM_BYTES >> 30} GiB.")
        buffer[: len(data)] = data
        return len(data)


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    start = raw.read(6)
    raw.seek(0)
    inner: IO[bytes]
    if start.startswith(b"\x1f\x8b"):
        inner = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
    elif start.startswith(b"BZh"):
        inner = bz2.BZ2File(raw)
    elif start.startswith(b"\xfd7zXZ"):
        inner = lzma.LZMAFile(raw)  # noqa: SIM115
    else:
        inner = raw
    return io.BufferedReader(_Limited(inner), _BLOCK)


def _inside(folder: Path, name: str) -> Path | None:
    """Where a member goes; None for a name that leaves the folder or is none."""
    if "\\" in name or "\0" in name or name.startswith("/"):
        return None
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or any(len(part.encode()) > 255 for part in parts):
        return None
    return folder.joinpath(*parts)


def _create(target: Path) -> BinaryIO | None:
    """The file, opened; None where an earlier member is in its place, which stays."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return open(target, "xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return None


def _copy(
    open_member: Callable[[], IO[bytes] | None], out: BinaryIO, archive: str, left: int
) -> int:
    source = open_member()
    assert source is not None
    size = 0
    with source:
        while block := source.read(_BLOCK):
            size += len(block)
            if size > MAX_FILE_BYTES:
                raise ArchiveError(
                    f"{archive}: {Path(out.name).name} is larger than {MAX_FILE_BYTES >> 20} MiB;"
                    " source files are not, so this archive is not read."
                )
            if size > left:
                raise ArchiveError(
                    f"{archive} holds more than {MAX_TOTAL_BYTES >> 20} MiB of source files; it is"
                    " not read."
                )
            out.write(block)
    return size
