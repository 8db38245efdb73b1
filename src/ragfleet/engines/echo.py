"""The public fake: answers every request with its query, at once and without a model.

For tests of everything around an engine, and for measuring what that costs.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from ragfleet.engines.protocol import (
    Completion,
    EngineInfo,
    EngineSpec,
    Failure,
    Outcome,
    Prepared,
    Request,
    RequestKey,
)

_WINDOW: Final = 256
"""Requests taken before `step` answers them, when no batch size is given."""


class EchoEngine:
    """Repeats the query. Deterministic, stateless, instant."""

    def __init__(self, spec: EngineSpec) -> None:
        self._window = spec.batch_size or _WINDOW
        self._queue: deque[Prepared] = deque()
        self._progress = 0

    def start(self) -> EngineInfo:
        return EngineInfo(name="echo", max_model_len=None, batch_size=self._window)

    def prepare(self, request: Request) -> Prepared | Failure:
        return Prepared(request=request, prompt=request.query)

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._queue) < self._window

    def submit(self, prepared: Prepared) -> None:
        self._queue.append(prepared)

    def step(self, timeout_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = [
            Completion(key=prepared.key, text=prepared.prompt, finish_reason="stop")
            for prepared in self._queue
        ]
        self._progress += len(self._queue)
        self._queue.clear()
        return outcomes

    def progress(self) -> int:
        return self._progress

    def abort(self, key: RequestKey) -> None:
        self._queue = deque(prepared for prepared in self._queue if prepared.key != key)

    def close(self) -> None:
        self._queue.clear()
