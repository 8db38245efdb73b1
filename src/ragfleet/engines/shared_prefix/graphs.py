"""Steps captured as CUDA graphs.

Owns the memory that they share, and what becomes of them where a capture fails: the steps go on
one operation at a time. For want of memory that step alone does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ragfleet.engines.shared_prefix.decoder import Step

log = logging.getLogger(__name__)


class Graphs:
    """Captures on one device, one after the other."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        """Why steps are no longer captured."""
        self.degrade: Callable[[str], None] | None = None
        """See `EngineSpec.degrade`. None while captures are on trial: then `why_not` tells."""
        self._has_lacked_memory = False
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        """Those that somebody may still repeat."""
        self._pool: Any = None
        """That they share: nothing in it outlives a step."""
        self._stream: Any = None

    def capture(self, step: Step) -> Step:
        """See `decoder.Capture`. `step` runs once beforehand, and must not be harmful then."""
        if self.why_not is not None:
            return step
        try:
            return self._captured(step)
        except Exception as error:  # a model's forward, and every operation in it, can refuse
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        # Out of the handler, so that the traceback no longer holds what was captured.
        self._end_allocation()
        if self.degrade is not None and "out of memory" in reason:
            # Other steps may be smaller, or come when there is more of it.
            log.warning("a step is not captured as a CUDA graph: %s", reason)
            if not self._has_lacked_memory:
                self.degrade("decoding goes without CUDA graphs at times, for want of memory")
            self._has_lacked_memory = True
            return step
        self.why_not = reason
        log.warning("decoding goes on without CUDA graphs: %s", reason)
        if self.degrade is not None:
            self.degrade(f"decoding goes without CUDA graphs: {reason}")
        return step

    def _end_allocation(self) -> None:
        """Before its pull request 180395 torch does not tell its allocator that a capture is over
        which became invalid, and within one no memory is given back: `empty_cache` raises."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # torch < 2.8
        end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        if end is not None:
            with suppress(Exception):  # it was told already; private, it can refuse in other ways
                end(torch.cuda.current_device(), self._pool)

    def _captured(self, step: Step) -> Step:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._graphs:  # torch takes no graph into a pool that has lost its last one
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            # Around both: a capture that fails does not give back the stream that was current.
            with torch.cuda.stream(self._stream):
                # Libraries allocate at their first call on a stream. Within a capture what they
                # keep would come out of the pool.
                step()
                # Other threads of the worker do not touch the device, but the default forbids it.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    step()
        finally:  # what ran of a step that failed must not write after what comes now
            torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs.add(graph)
        replay: Step = graph.replay
        return replay
