"""One process plans and merges an output at a time.

An flock on `results.run/lock`. Workers inherit the descriptor, so the lock lives until the last of
them is gone, even when the process that took it was killed: two runs never hold the GPUs at once.
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

from ragfleet.errors import OutputError
from ragfleet.identity import now
from ragfleet.launch import RunPaths

_WAIT_S: Final = 5.0
"""Workers of a killed run end with it; this is more than they take."""


class RunLock:
    """Context manager; `fd` is to be inherited by workers."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._made: list[Path] = []
        self.fd = -1

    def __enter__(self) -> RunLock:
        directory = self._paths.directory
        try:
            for folder in (directory.parent, directory):
                if not folder.exists():
                    folder.mkdir(parents=True)
                    self._made.append(folder)
            self.fd = os.open(self._paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"Can't create {self._paths.lock}: {error.strerror}.") from None
        deadline_s = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise OutputError(self._held_message()) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: shards keep runs apart all the same
        os.ftruncate(self.fd, 0)
        os.pwrite(
            self.fd,
            f"pid {os.getpid()} on {socket.gethostname()}, {_user()}, since {now()}\n".encode(),
            0,
        )
        return self

    def _held_message(self) -> str:
        holder = os.pread(self.fd, 1000, 0).decode("utf-8", "replace").strip() or "another process"
        output = self._paths.output_file
        return (
            f"{output} is being written by {holder}. Wait for it, or stop it; to look at it:"
            f" ragfleet status --output_file {output}"
        )

    def discard_new(self) -> None:
        """Take back the folders made for a run that was refused before it began."""
        if self._paths.directory in self._made:
            with contextlib.suppress(OSError):
                self._paths.lock.unlink()
                for folder in reversed(self._made):
                    folder.rmdir()

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
