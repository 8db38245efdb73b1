"""No process that an engine started outlives its worker.

Owns a watcher, one `sh`, that kills the worker's process group as soon as the worker is gone,
however it went. The launcher kills the group of a worker that it reaps; this is for when the
launcher itself was killed: the kernel then ends the worker, but not what the worker started, and
an inference process would hold its GPU for ever (vllm#34643).
"""

from __future__ import annotations

import contextlib
import os
import subprocess


class GroupGuard:
    """Watches from its making until `close`. Only where the process leads its group, as workers do:
    elsewhere the group is somebody's shell."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None
        if os.getpgrp() == os.getpid():
            # The pipe's other end is ours alone (close-on-exec), so it closes when we end.
            self._watcher = subprocess.Popen(
                ["/bin/sh", "-c", 'read line; [ -n "$line" ] || kill -KILL 0'],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        if self._watcher is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watcher.communicate(b"done\n")
            self._watcher = None
