"""Processes that outlive the worker or the start they belong to, found and ended.

A worker's group is killed with it; but a child can leave the group, and when the supervisor itself
is killed nobody kills groups. So workers carry the launch and their name in one environment
variable, which whatever they fork or start inherits: what carries the name of something dead is
left over. The kernel shows the environment a process was started with, so it can't be borrowed;
but it can be emptied, or written over. So a process that is there for nothing but the run adopts
what its workers' children leave behind, and ends that with the run (`Orphanage`).
Where there is no /proc nothing is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

VARIABLE: Final = "RAGFLEET_WORKER"
_ROUNDS: Final = 20
"""A process may fork while it is being ended."""
_DEATH_S: Final = 5.0
_ENDED: Final = os.WEXITED | os.WNOWAIT | os.WNOHANG
_PR_SET_CHILD_SUBREAPER: Final = 36


def tag(launch_id: str, owner: str = "") -> str:
    """Value of the variable; a tag without an owner is a prefix of those of all its workers."""
    return f"{launch_id}/{owner}" + ("/" if owner else "")


def end_tagged(prefix: str) -> list[int]:
    """Kill every process of this user whose tag begins so; returns their process ids.

    A handle is taken before the environment is read, so that a number used again hits nobody else.
    """
    ended: list[int] = []
    wanted = f"{VARIABLE}={prefix}".encode()
    for _ in range(_ROUNDS):
        # One that hangs in a driver dies when it can; it is not waited for again.
        found = list(_tagged(wanted, set(ended)))
        if not found:
            break
        for pid, pidfd in found:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            ended.append(pid)
        _wait([pidfd for _, pidfd in found])
    return sorted(set(ended))


def _tagged(wanted: bytes, known: set[int]) -> Iterator[tuple[int, int]]:
    """(pid, handle) of each process with such a variable; but for this one and the known ones."""
    if not hasattr(os, "pidfd_open"):
        return
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in known or int(name) == os.getpid():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        environment = b""
        with contextlib.suppress(OSError):  # another user's, or gone
            environment = Path("/proc", name, "environ").read_bytes()
        if any(part.startswith(wanted) for part in environment.split(b"\0")):
            yield int(name), pidfd
        else:
            os.close(pidfd)


def _wait(pidfds: list[int]) -> None:
    """Until these processes have ended, or it takes too long (one may hang in a driver)."""
    deadline_s = time.monotonic() + _DEATH_S
    for pidfd in pidfds:
        select.select([pidfd], [], [], max(0.0, deadline_s - time.monotonic()))
        os.close(pidfd)


class Orphanage:
    """Makes this process the parent of whatever outlives its own parent among its descendants.

    Only for a process whose children are all known.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def reap(self, own: Collection[int] = ()) -> None:
        """Let go of adopted processes that have ended; `own` ones are left to their owner."""
        with contextlib.suppress(ChildProcessError):  # it has none
            while (ended := os.waitid(os.P_ALL, 0, _ENDED)) is not None:
                if ended.si_pid in own:
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)

    def end(self) -> None:
        """End every child there is, and what they leave in turn."""
        tried: set[int] = set()
        for _ in range(_ROUNDS):
            found = _children() - tried
            if not found:
                return
            tried |= found  # one that hangs in a driver is not waited for again
            handles = []
            for pid in found:  # a child's number is not used again before it is waited for
                with contextlib.suppress(OSError):  # another user's, or no such handles here
                    os.kill(pid, signal.SIGKILL)
                    if hasattr(os, "pidfd_open"):
                        handles.append(os.pidfd_open(pid))
            _wait(handles)
            self.reap()


def _children() -> set[int]:
    """Process ids of this process's children, ended ones too; none where there is no /proc."""
    me, found = str(os.getpid()), set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                stat = Path("/proc", name, "stat").read_text()
                if stat.rpartition(")")[2].split()[1] == me:
                    found.add(int(name))
    return found


class Starter(msgspec.Struct, frozen=True):
    """The process that holds a run's lock, so that another one can tell whether it lives."""

    pid: int
    started: str
    """Start time of the process, in clock ticks since boot: process ids are used again."""
    place: str
    """Boot and namespace in which `pid` means anything."""
    launch_id: str = ""

    @classmethod
    def this(cls, launch_id: str) -> Starter:
        return cls(os.getpid(), _started(os.getpid()) or "", _place(), launch_id)

    def is_dead(self) -> bool:
        """Whether it certainly is: False for one on another machine or in another container."""
        if not self.started or self.place != _place():
            return False
        with contextlib.suppress(ProcessLookupError):
            try:
                os.kill(self.pid, 0)
            except PermissionError:
                return False  # another user's, whose start time /proc may hide
        return _started(self.pid) != self.started


def _started(pid: int) -> str | None:
    """None for a process that is gone, or has ended and waits to be reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
