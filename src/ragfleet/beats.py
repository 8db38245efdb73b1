"""Heartbeats: what each worker says of itself once a second, and who is believed to be alive.

A beat only copies progress; it never makes any. `Observer` judges by the observer's own monotonic
clock, so clocks of machines need not agree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

BEAT_S: Final = 1.0
BEAT_TIMEOUT_S: Final = 10.0
"""Silence after which an owner counts as gone. A loaded machine can hold a thread back, and a
false death only costs work. A reaped process is known to be gone at once (`ClaimStore.bury`)."""
NETWORK_EXTRA_S: Final = 60.0
"""Added on network file systems, whose attribute caches may show old files for that long."""

_NETWORK_FILESYSTEMS: Final = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse",
    "9p",
)

State = Literal["loading", "generating", "waiting", "draining", "left"]


class Beat(msgspec.Struct, kw_only=True):
    """One worker's state. Counts are of this process."""

    owner: str
    sequence: int
    state: State = "loading"
    progress: int = 0
    """Tokens or calls, monotone: what liveness is judged by."""
    succeeded: int = 0
    failed: int = 0
    in_flight: int = 0
    chunk: int | None = None
    stolen: int = 0
    busy_s: float = 0.0
    """Time with something in flight."""
    span_s: float = 0.0
    """From the loaded model to the last answer."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`, those whose prefill was there already."""
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers whose engine did not say how many prompt tokens were cached."""
    degraded: str | None = None
    """Why the engine works slower than it could."""
    oldest_s: float = 0.0
    """Age of the oldest request in flight."""
    oldest_row: int | None = None
    """Its row in the index."""


def write_beat(directory: Path, beat: Beat) -> None:
    """One file per owner, so that a stopped process and its replacement never share one."""
    temporary = directory / f".{beat.owner}.tmp"
    temporary.write_bytes(msgspec.json.encode(beat))
    os.replace(temporary, directory / beat.owner)


def read_beats(directory: Path) -> dict[str, Beat]:
    """The last beat of each owner; what can't be read is left out."""
    beats = {}
    for name in os.listdir(directory):
        if not name.startswith("."):
            try:
                beats[name] = msgspec.json.decode((directory / name).read_bytes(), type=Beat)
            except (OSError, msgspec.DecodeError):
                continue
    return beats


@dataclass(slots=True)
class Observer:
    """Who is alive, from beats and a monotonic clock that the caller reads."""

    timeout_s: float
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def observe(self, owner: str, sequence: int, now_s: float) -> None:
        known = self._seen.get(owner)
        if known is None or known[0] != sequence:
            self._seen[owner] = (sequence, now_s)

    def is_alive(self, owner: str, now_s: float) -> bool:
        """An owner never heard of is given the benefit of the doubt once."""
        self._seen.setdefault(owner, (-1, now_s))
        return now_s - self._seen[owner][1] < self.timeout_s


def beat_timeout_s(directory: Path) -> float:
    """How long silence may last on the file system that holds `directory`."""
    filesystem = _filesystem(directory)
    slow = filesystem is not None and filesystem.startswith(_NETWORK_FILESYSTEMS)
    return BEAT_TIMEOUT_S + (NETWORK_EXTRA_S if slow else 0.0)


def _filesystem(directory: Path) -> str | None:
    """Type of the mount that holds a path, from /proc/mounts; None where there is none."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return None
    target = str(directory.resolve())
    best, kind = "", None
    for line in lines:
        _, mount, filesystem, *_ = line.split()
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, filesystem
    return kind
