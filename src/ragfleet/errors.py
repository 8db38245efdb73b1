"""Every error that ragfleet raises on purpose.

    RagfleetError
    ├── UsageError            exit 2: found before anything is spent, nothing was written
    │   ├── ConfigError         a flag, a TOML key or a combination that means nothing
    │   ├── InputError          the contexts file
    │   ├── ModelError          the model folder or the Hub model
    │   ├── DeviceError         GPUs, drivers, allocation
    │   └── OutputError         the output path, or a run that is already there
    ├── RunError              exit 1: the run stopped; what is finished is safe
    │   ├── InputChanged        the contexts file was edited while the run read it
    │   ├── WorkersFailed       no worker is left to do the rest
    │   ├── RemoteError         an API that refuses the run, a budget that is spent
    │   └── StorageError        disk full, file system gone read-only
    ├── EngineDead            an engine cannot go on; it ends its worker and the chunk goes back
    └── Interrupted           a signal ended the run; exit 128 + signal

A message says what, where and what to do next; the class says which exit code it earns.
"""

from __future__ import annotations

import errno
import signal as _signal
from typing import Final


class RagfleetError(Exception):
    """Base of all; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(RagfleetError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class InputError(UsageError):
    pass


class ModelError(UsageError):
    pass


class DeviceError(UsageError):
    pass


class OutputError(UsageError):
    pass


class RunError(RagfleetError):
    exit_code = 1


class InputChanged(RunError):
    pass


class WorkersFailed(RunError):
    pass


class RemoteError(RunError):
    pass


class StorageError(RunError):
    """See `STORAGE_ERRNOS`."""


STORAGE_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What an OSError of full, read-only or broken storage says."""


class EngineDead(RagfleetError):
    """Raised by an engine that cannot answer anything any more."""


class Interrupted(RagfleetError):
    """A signal ended the run after it flushed; `signal_number` decides the exit code."""

    def __init__(self, message: str, signal_number: int = _signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 128 + self.signal_number


def error_named(name: str, message: str) -> RagfleetError:
    """The error of this module that another process named; RunError where there is none."""
    kind = globals().get(name, RunError)
    if isinstance(kind, type) and issubclass(kind, RagfleetError) and kind is not Interrupted:
        return kind(message)
    return RunError(message)


def cannot_go_on(error: OSError) -> RunError:
    """What a failing system call in the launcher means for the run."""
    where = f" {error.filename}" if error.filename else ""
    kind = StorageError if error.errno in STORAGE_ERRNOS else RunError
    found = kind(f"Can't go on with workers{where}: {error.strerror or error}.")
    found.__cause__ = error
    return found
