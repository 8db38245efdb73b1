"""Which requests a worker has in flight, so that its death can be laid at a record's door.

A memory-mapped file of slots, one per request in flight, and a count of answers: an entry costs a
memory write, and what was written outlives a killed process (not a power loss, after which nobody
asks).
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

from ragfleet.errors import StorageError

NUM_SLOTS: Final = 1 << 11
_slot = struct.Struct("<I")
_EMPTY: Final = _slot.pack(0)
_NUM_BYTES: Final = (NUM_SLOTS + 1) * _slot.size
"""The last one is the count."""


class LastWords(NamedTuple):
    """What the journal of a dead process says."""

    in_flight: list[int]
    num_answered: int


class Journal:
    """The slots of one process. Rows are index rows."""

    def __init__(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                # Reserved, because writing to a mapped hole of a full disk is a SIGBUS.
                os.posix_fallocate(fd, 0, _NUM_BYTES)
                self._map = mmap.mmap(fd, _NUM_BYTES)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError(f"Can't write {path}: {error.strerror}.") from error
        self._free = list(range(NUM_SLOTS - 1, -1, -1))
        self._num_answered = 0

    def add(self, row: int) -> int:
        """Note a row as in flight; returns its slot, -1 when there are none left to note it in."""
        if not self._free:
            return -1
        slot = self._free.pop()
        _slot.pack_into(self._map, slot * _slot.size, row + 1)
        return slot

    def remove(self, slot: int) -> None:
        if slot >= 0:
            self._map[slot * _slot.size : (slot + 1) * _slot.size] = _EMPTY
            self._free.append(slot)

    def count_answer(self) -> None:
        self._num_answered += 1
        _slot.pack_into(self._map, NUM_SLOTS * _slot.size, self._num_answered)


def read_journal(path: Path) -> LastWords:
    """Nothing in flight and no answers when the process never got so far."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) != _NUM_BYTES:  # the disk was full
        return LastWords([], 0)
    *slots, count = (number for (number,) in _slot.iter_unpack(data))
    return LastWords([row - 1 for row in slots if row], count)
