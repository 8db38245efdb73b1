"""One process plans and merges an output at a time.

An flock on `results.run/lock`. Workers inherit the descriptor, so the lock lives until the last of
them is gone, even when the process that took it was killed: two runs never hold the GPUs at once.
What a killed start left behind is ended by the next one, which finds its launch id in the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import socket
import time
from pathlib import Path
from typing import Final

import msgspec

from ragfleet.errors import OutputError
from ragfleet.identity import now
from ragfleet.launch import RunPaths
from ragfleet.leftovers import Starter, end_tagged, tag

_WAIT_S: Final = 5.0
"""Workers of a killed run end with it; this is more than they take."""
_OPENINGS: Final = 5
"""Starts that are refused at the same moment are few; a link to nowhere stays one."""


class RunLock:
    """Context manager; `fd` is to be inherited by workers.

    Attributes:
        ended: process ids that an earlier start had left behind, ended by this one.
    """

    def __init__(self, paths: RunPaths, launch_id: str = "", *, private: bool = False) -> None:
        self._paths = paths
        self._launch_id = launch_id
        self._mode = 0o700 if private else 0o777
        self._made: list[Path] = []
        self.ended: list[int] = []
        self.fd = -1

    def __enter__(self) -> RunLock:
        self._open()
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    break
                os.close(self.fd)
                self._open()
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    message = _held_message(self._paths, *_read(self.fd))
                    os.close(self.fd)
                    raise OutputError(message) from None
                self._end_leftovers()
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: shards keep runs apart all the same
        # Also what no longer holds the lock may still hold a GPU.
        self._end_leftovers()
        holder = f"pid {os.getpid()} on {socket.gethostname()}, {_user()}, since {now()}\n"
        starter = msgspec.json.encode(Starter.this(self._launch_id))
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, holder.encode() + starter + b"\n", 0)
        return self

    def _open(self) -> None:
        for attempt in range(_OPENINGS):
            wanted = self._paths.directory
            try:
                self._make_folders()
                wanted = self._paths.lock
                self.fd = os.open(wanted, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                return
            except OSError as error:
                # Another start, refused, may have taken its new folders back in between.
                if not isinstance(error, FileNotFoundError) or attempt == _OPENINGS - 1:
                    raise OutputError(f"Can't create {wanted}: {error.strerror}.") from None

    def _make_folders(self) -> None:
        directory = self._paths.directory
        for folder in (directory.parent, directory):
            if not folder.exists():
                with contextlib.suppress(FileExistsError):  # another start was quicker
                    folder.mkdir(mode=self._mode, parents=True)
                    if folder not in self._made:
                        self._made.append(folder)

    def _is_current(self) -> bool:
        """Whether what is locked is still the file of that name: a refused start takes its new one
        back, and who waited for that would hold nothing."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self._paths.lock))
        except FileNotFoundError:
            return False

    def _end_leftovers(self) -> None:
        starter = _read(self.fd)[1]
        if starter is not None and starter.launch_id and starter.is_dead():
            self.ended += end_tagged(tag(starter.launch_id))

    def discard_new(self) -> None:
        """Take back the folders made for a run that was refused before it began."""
        if self._paths.directory in self._made:
            with contextlib.suppress(OSError):
                self._paths.lock.unlink()
                for folder in reversed(self._made):
                    folder.rmdir()

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)


def check_free(paths: RunPaths) -> None:
    """Raises OutputError where a start that lives has this output: for whoever has much to do
    before its own `RunLock`, which alone keeps starts apart.
    """
    try:
        if holder_of(paths) is None:
            return
        fd = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # no locks on this file system, or its holder took it back
    try:
        holder, starter = _read(fd)
    finally:
        os.close(fd)
    if starter is None or not starter.is_dead():  # what a dead one left behind is ended later
        raise OutputError(_held_message(paths, holder, starter))


def holder_of(paths: RunPaths) -> str | None:
    """Who plans, answers or merges there now, for people; None when nobody does.

    Raises OSError where that can't be told: no locks on this file system, no right to read it.
    """
    try:
        fd = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        first = os.pread(fd, 4000, 0).decode("utf-8", "replace").partition("\n")[0]
        return first.strip() or "a process that is just starting"
    finally:
        os.close(fd)
    return None


def _read(fd: int) -> tuple[str, Starter | None]:
    """(who holds it, for people; the same for us) as the lock's file says."""
    first, _, second = os.pread(fd, 4000, 0).decode("utf-8", "replace").partition("\n")
    try:
        return first.strip(), msgspec.json.decode(second, type=Starter)
    except msgspec.DecodeError:  # an earlier version's, or just being written
        return first.strip(), None


def _held_message(paths: RunPaths, holder: str, starter: Starter | None) -> str:
    output = paths.output_file
    if starter is not None and starter.is_dead():
        return (
            f"{output} is locked by a process that {holder} left behind when it died. Find it"
            f" with: fuser {paths.lock}"
        )
    return (
        f"{output} is being written by {holder or 'another process'}. Wait for it, or stop it;"
        f" to look at it: ragfleet status --output_file {output}; for what is finished by now:"
        f" ragfleet merge --partial --output_file {output}"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
