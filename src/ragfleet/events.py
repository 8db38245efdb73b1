"""What a run says while it goes on: to an `on_event` callable, and from a worker to its launcher.

Owns the event type and the pipe that carries it as JSON lines. Drawing is somebody else's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True):
    """One thing that happened.

    Kinds from a worker: loading, ready, first (first answer), failure (first of its kind), note,
    fatal. Kinds from a run: reading, header, note, progress, died, gave_up, interrupted, merging,
    writing, summary.
    """

    kind: str
    message: str = ""
    rank: int | None = None
    data: dict[str, Any] = {}


OnEvent = Callable[[Event], None]


def reading(say: OnEvent) -> Callable[[int, float], None]:
    """The `on_progress` of an index: (records so far, share of the file)."""
    return lambda count, share: say(
        Event("reading", f"read {count:,} records ({share:.0%} of the file)")
    )


class EventPipe:
    """A worker's end of the pipe. A launcher that is gone must not stop a worker by it."""

    def __init__(self, fd: int, rank: int) -> None:
        self._fd = fd
        self._rank = rank

    def send(self, kind: str, message: str = "", **data: Any) -> None:
        event = Event(kind, message, self._rank, data)
        try:
            line = msgspec.json.encode(event)
        except UnicodeEncodeError:  # a lone surrogate in what a model or a user's code said
            text = json.dumps(msgspec.to_builtins(event), ensure_ascii=False)
            line = text.encode("utf-8", "replace")
        try:
            os.write(self._fd, line + b"\n")
        except (BrokenPipeError, BlockingIOError):
            self._fd = os.open(os.devnull, os.O_WRONLY)


class EventReader:
    """A launcher's end: bytes in, whole events out."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._rest = b""

    def read(self) -> list[Event] | None:
        """What has arrived; None at the end of the pipe."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            try:
                events.append(msgspec.json.decode(line, type=Event))
            except msgspec.DecodeError:
                events.append(Event("note", line.decode("utf-8", "replace")))
        return events
