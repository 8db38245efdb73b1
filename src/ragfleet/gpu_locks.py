"""Which GPUs other runs of ragfleet on this machine have, also before NVML shows anything of them.

A run that starts has its GPUs for minutes before its workers' memory can be seen on them, and two
that start together would choose the same. So whoever gives GPUs to workers holds an flock on a file
for each of them, until its process ends, however it ends. Workers don't inherit the descriptors:
when a launcher is killed its workers are dying too, and what they still hold NVML shows.

The folder is one for all users, so it is not TMPDIR, which jobs and users have their own of.
Anybody may write there; so links are not followed, only plain files are taken, and nothing is ever
written into one: an flock needs no more than the right to read, and who holds it the kernel knows.
Locks are advice: who wants to harm others there can keep GPUs from them, and nothing worse.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

DIRECTORY = Path("/tmp/ragfleet-gpus")
_WAIT_S: Final = 0.3
"""Who only looks holds a file for microseconds; this is more than that."""
_POLL_S: Final = 0.02
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class GpuLocks:
    """Context manager; what was taken is held until it ends, or the process does."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = DIRECTORY if directory is None else directory
        self._fds: dict[str, int] = {}
        self.note: str | None = None
        """Why GPUs can't be locked here, once that is known."""

    def __enter__(self) -> GpuLocks:
        return self

    def __exit__(self, *exception: object) -> None:
        self._release(list(self._fds))

    def holders(self, uuids: Iterable[str]) -> dict[str, str]:
        """Those of the GPUs that other runs have, and who they are. Only looks."""
        found: dict[str, str] = {}
        with contextlib.suppress(OSError):
            directory = os.open(self._directory, _OPEN | os.O_DIRECTORY)
            try:
                for uuid in set(uuids) - set(self._fds):
                    with contextlib.suppress(OSError):
                        fd = _open_plain(_file_name(uuid), directory)
                        try:
                            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        except BlockingIOError:
                            found[uuid] = _holder_of(fd)
                        finally:
                            os.close(fd)
            finally:
                os.close(directory)
        return found

    def take(self, uuids: Iterable[str], *, all_or_none: bool = True) -> dict[str, str]:
        """Lock these GPUs; returns those of them that other runs have, and who they are.

        With `all_or_none` no new one is kept then. Where nothing can be locked, `note` says why.
        """
        held: dict[str, str] = {}
        taken: list[str] = []
        try:
            directory = self._open_directory()
        except OSError as error:
            self._give_up(error)
            return {}
        try:
            # In the same order everywhere: of several that want the same, one gets all.
            for uuid in sorted(set(uuids) - set(self._fds)):
                holder = self._take_one(uuid, directory)
                if holder is None:
                    taken.append(uuid)
                else:
                    held[uuid] = holder
        except OSError as error:
            self._give_up(error)
        finally:
            os.close(directory)
        if held and all_or_none:
            self._release(taken)
        return held

    def _take_one(self, uuid: str, directory: int) -> str | None:
        """Who has it instead; None where it is ours now."""
        deadline_s = time.monotonic() + _WAIT_S
        name = _file_name(uuid)
        while True:
            fd = _open_plain(name, directory, create=True)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if os.path.samestat(os.fstat(fd), found):
                    self._fds[uuid] = fd
                    return None
            except FileNotFoundError:  # whoever tidies up /tmp was quicker
                pass
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    holder = _holder_of(fd)
                    os.close(fd)
                    return holder
            except OSError:
                os.close(fd)
                raise
            os.close(fd)
            time.sleep(_POLL_S)

    def _open_directory(self) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._directory)
        fd = os.open(self._directory, _OPEN | os.O_DIRECTORY)
        status = os.fstat(fd)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != 0o1777:
            os.fchmod(fd, 0o1777)  # whatever the umask: other users need it too
        return fd

    def _release(self, uuids: list[str]) -> None:
        for uuid in uuids:
            fd = self._fds.pop(uuid)
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for a child of somebody else's that inherited it
            os.close(fd)

    def _give_up(self, error: OSError) -> None:
        self.note = (
            "GPUs are not locked, so another ragfleet that starts at the same moment may choose the"
            f" same ones: {self._directory}: {error.strerror}."
        )


def _file_name(uuid: str) -> str:
    return re.sub(r"[^\w.-]", "_", uuid)


def _open_plain(name: str, directory: int, *, create: bool = False) -> int:
    try:
        fd = os.open(name, _OPEN, dir_fd=directory)
    except FileNotFoundError:
        if not create:
            raise
        try:
            fd = os.open(name, _OPEN | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=directory)
        except FileExistsError:
            fd = os.open(name, _OPEN, dir_fd=directory)
        else:
            os.fchmod(fd, 0o444)  # whatever the umask
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{name} is not a plain file of one name")
    return fd


def _holder_of(fd: int) -> str:
    """Who holds the flock on an open file, in words."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 4046 00:26:12345 0 EOF; -1 and 0 are of another container.
            words = line.split()
            if place in words[5:6] and words[1] == "FLOCK" and words[4].isdecimal():
                return "another ragfleet run" + (f", pid {words[4]}" if words[4] != "0" else "")
    return "another ragfleet run"
