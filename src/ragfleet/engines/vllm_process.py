"""vLLM's engine as a process of its own, as on a GPU: its death, and what it said last.

Owns nothing of how it is started or asked (`vllm_start`, `vllm`). Imports no vLLM.

vLLM's client waits for outputs without a limit, and its own monitor, which sees the process end,
sets a flag that nobody reads meanwhile. An engine that ends by itself says so before; one that the
kernel ends (out of memory, a segmentation fault) does not, and `step` would wait for ever.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_TAIL_BYTES: Final = 1 << 20
_ERROR_LINE: Final = re.compile(rb"(?:^|\] )((?:[A-Za-z_][\w.]*)?(?:Error|Exception): .+)$", re.M)
ELSEWHERE: Final = "root cause"
"""In the errors that vLLM raises for another process's error."""


class ProcessWatch:
    """Ends the wait of vLLM's client when one of `processes` is gone, until `close`.

    `client` is LLMEngine's `engine_core`. Calls raise whatever is in its `outputs_queue`, or wait
    for one of the futures in its `utility_results`. Where a later vLLM has no such queue, `end`
    ends this process, for its launcher to start another.
    """

    def __init__(
        self,
        client: Any,
        processes: Sequence[BaseProcess],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.death: str | None = None
        """What became of the process, once it is gone."""
        self.was_killed = False
        """By a signal: then it said nothing itself."""
        self._outputs = getattr(client, "outputs_queue", None)
        self._futures: dict[Any, Any] = getattr(client, "utility_results", {})
        self._processes = {process.sentinel: process for process in processes}
        self._end = end
        self._closing = threading.Event()
        # In this process vLLM's engine is no other, and has a watch over its workers.
        if self._processes and not hasattr(client, "engine_core"):
            threading.Thread(target=self._watch, name="vLLM watch", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def _watch(self) -> None:
        gone: list[Any] = []
        while not gone and not self._closing.is_set():
            gone = connection.wait(list(self._processes), timeout=_LOOK_S)
        if self._closing.is_set():
            return
        process = self._processes[gone[0]]
        end = _end_of(process)
        self.was_killed = (process.exitcode or 0) < 0
        self.death = f"its process {process.name} (pid {process.pid}) {end}"
        log.error("vLLM: %s", self.death)
        if self._outputs is None:
            logging.shutdown()
            self._end(1)
            return
        self._outputs.put_nowait(RuntimeError(self.death))  # what is in it is given out first
        while True:  # a call may just begin, for vLLM has its own moment of noticing
            for call in list(self._futures):
                if (future := self._futures.pop(call, None)) is not None:
                    future.set_exception(RuntimeError(self.death))
            if self._closing.wait(_LOOK_S):
                return


def _end_of(process: BaseProcess) -> str:
    # Another thread may be the one that gets the exit code from the kernel: a moment for it.
    until_s = time.monotonic() + 1
    while process.exitcode is None and time.monotonic() < until_s:
        time.sleep(0.05)
    code = process.exitcode
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the kernel does that where memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


class LogMark:
    """Where the log of this process stood: the file, if it is one, that its output goes to.

    vLLM's processes write there too, and why they ended is said nowhere else.
    """

    def __init__(self) -> None:
        self._starts: dict[tuple[int, int], tuple[int, int]] = {}
        """Descriptor and size, by file: usually it is one file."""
        for descriptor in (1, 2):
            try:
                status = os.fstat(descriptor)
            except OSError:  # closed
                continue
            if stat.S_ISREG(status.st_mode):
                self._starts[status.st_dev, status.st_ino] = (descriptor, status.st_size)

    def last_error(self) -> str | None:
        """The last line since then that names an error, without those that point elsewhere."""
        for descriptor, start in reversed(self._starts.values()):
            try:
                with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(start, size - _TAIL_BYTES))
                    said = file.read()
            except OSError:
                continue
            for line in reversed(_ERROR_LINE.findall(said)):
                text = " ".join(line.decode(errors="replace").split())
                if ELSEWHERE not in text:
                    return text
        return None
