"""No process that an engine started outlives its worker.

Owns a watcher, one `sh`, that kills the worker's process group as soon as the worker is gone,
however it went. The launcher kills the group of a worker that it reaps; this is for when the
launcher itself was killed: the kernel then ends the worker, but not what the worker started, and
an inference process would hold its GPU for ever (vllm#34643).

It is told twice: by the kernel's signal for the death of a parent, and by the end of a pipe, which
forks of the worker keep open, but which is there on any system.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None)
# The shell does what a signal says only while it waits for a child, so another one reads. Nobody
# else sends URG, and it is harmless before there is a trap.
_WATCH: Final = """
exec 3<&0
trap 'kill -KILL 0' URG
echo ready
exec >/dev/null
{ read -r line && [ -n "$line" ]; } <&3 &
wait $! || kill -KILL 0
"""


def _signal_at_parents_death() -> None:
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGURG)


class GroupGuard:
    """Watches from its making until `close`. Only where the process leads its group, as workers do:
    elsewhere the group is somebody's shell."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None
        if os.getpgrp() == os.getpid():
            # The pipe's other end is ours alone (close-on-exec), so it closes when we end.
            self._watcher = subprocess.Popen(
                ["/bin/sh", "-c", _WATCH],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # One call, which takes no lock: harmless where there are threads.
                preexec_fn=_signal_at_parents_death,  # noqa: PLW1509
            )
            assert self._watcher.stdout is not None
            self._watcher.stdout.readline()  # from here on it watches
            self._watcher.stdout.close()

    def close(self) -> None:
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._watcher.stdin as pipe:
                pipe.write(b"done\n")
            self._watcher.wait()
            self._watcher = None
