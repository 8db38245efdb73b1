"""Signals, and the death of a parent, as something a selector can wait for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Signals:
    """Turns signals into readable bytes while a run goes on; what nohup ignores stays ignored."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._old: dict[int, Any] = {}
        self.fd: int | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._handle)
        # Where whoever started us ignores it, the kernel would reap workers before we can.
        self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        os.write(self._write_fd, bytes([number]))

    def read(self) -> None:
        assert self.fd is not None
        for number in os.read(self.fd, 64):
            self._on_signal(number)

    def __exit__(self, *exception: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        if self.fd is not None:
            os.close(self.fd)
            os.close(self._write_fd)


class ParentWatch:
    """A handle of the parent process, readable when it has died; None where there are none."""

    def __init__(self, pid: int | None) -> None:
        self._fd: int | None = None
        if pid is not None and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # gone, or no handles here: its number is asked then
                self._fd = os.pidfd_open(pid)

    def __enter__(self) -> int | None:
        return self._fd

    def __exit__(self, *exception: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
