"""Steps captured as CUDA graphs.

Owns the memory that they share, and what becomes of them where a capture fails: the steps go on
one operation at a time.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from ragfleet.engines.shared_prefix.decoder import Step

log = logging.getLogger(__name__)


class Graphs:
    """Captures on one device, one after the other."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        """Why steps are no longer captured."""
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
            self.why_not = reason
            log.warning("decoding goes on without CUDA graphs: %s", reason)
            return step

    def _captured(self, step: Step) -> Step:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._graphs:  # torch takes no graph into a pool that has lost its last one
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # Around both: a capture that fails does not give back the stream that was current.
        with torch.cuda.stream(self._stream):
            # Libraries allocate at their first call on a stream. Within a capture what they keep
            # would come out of the pool.
            step()
            # The worker's other threads do not touch the device, but the default forbids it to all.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs.add(graph)
        replay: Step = graph.replay
        return replay
