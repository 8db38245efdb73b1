"""The journal of a run's batches: what was done, written down before and after it is done.

    results.run/batch/
      journal.jsonl             one event a line, synced; a torn last line is skipped
      part-0001.jsonl           requests, whole before their first event
      part-0001.output.jsonl    replies, whole before theirs
      part-0001.errors.jsonl

A part goes built → uploading → uploaded → submitting → submitted → ended → downloaded. The two
`-ing` events say that the server may know more than the journal: the next process looks there
first. One process writes at a time (the run's lock).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from ragfleet.shards import fsync_directory

State = Literal[
    "built",
    "uploading",
    "uploaded",
    "submitting",
    "submitted",
    "ended",
    "downloaded",
]
DONE: Final = "downloaded"


class Part(msgspec.Struct, kw_only=True):
    """One batch; also the form of its events, of which each holds all that is known."""

    name: str
    state: State
    nonce: str
    """Names the part at the server, so that it is found there again."""
    num_requests: int
    length_field: str = "max_tokens"
    """What its requests call the most tokens of an answer."""
    file_id: str = ""
    batch_id: str = ""
    status: str = ""
    output_file_id: str = ""
    error_file_id: str = ""


class Journal:
    """Parts by name, and their files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "journal.jsonl"
        self.parts: dict[str, Part] = {}
        data = self._path.read_bytes() if self._path.exists() else b""
        for line in data.splitlines():
            try:
                part = msgspec.json.decode(line, type=Part)
            except msgspec.DecodeError:
                continue  # torn by a kill: what it said is found out again
            self.parts[part.name] = part
        self._fd = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if data and not data.endswith(b"\n"):
            os.write(self._fd, b"\n")

    def build(self, lines: Iterable[bytes], length_field: str = "max_tokens") -> Part:
        """Write the requests of a new part, whole, and its first event."""
        name = f"part-{len(self.parts) + 1:04}"
        count = 0
        temporary = self._directory / f".{name}.tmp"
        with open(temporary, "wb") as file:
            for line in lines:
                file.write(line)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._directory / f"{name}.jsonl")
        fsync_directory(self._directory)
        part = Part(
            name=name,
            state="built",
            nonce=uuid.uuid4().hex,
            num_requests=count,
            length_field=length_field,
        )
        self.write(part)
        return part

    def write(self, part: Part) -> None:
        """Append what is known of a part now, and sync it."""
        os.write(self._fd, msgspec.json.encode(part) + b"\n")
        os.fsync(self._fd)
        self.parts[part.name] = part

    def requests(self, part: Part) -> Path:
        return self._directory / f"{part.name}.jsonl"

    def replies(self, part: Part) -> list[Path]:
        """The files of replies that were downloaded."""
        names = [f"{part.name}.{kind}.jsonl" for kind in ("output", "errors")]
        return [path for name in names if (path := self._directory / name).exists()]

    def save_replies(self, part: Part, kind: Literal["output", "errors"], data: bytes) -> None:
        temporary = self._directory / f".{part.name}.{kind}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._directory / f"{part.name}.{kind}.jsonl")
        fsync_directory(self._directory)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
