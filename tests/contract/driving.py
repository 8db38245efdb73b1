"""What engines are asked in the contract, and the loop that asks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ragfleet.engines.protocol import Engine, Failure, Outcome, Request

USER_CLASSES = Path(__file__).with_name("user_classes.py")
Make = Callable[..., Engine]
"""The `start` fixture: `start("transformers", max_new_tokens=8, batch_size=3, …)`."""


def ask(
    number: int,
    query: str = "What is it?",
    context: str = "A text.",
    seed: int | None = None,
    retrieval_method: str = "rag_fallback",
) -> Request:
    record = {"id": f"r-{number}", "query": query, "context": context}
    return Request(
        key=number.to_bytes(16, "big"),
        query=query,
        context=context,
        retrieval_method=retrieval_method,
        record=record,
        seed=seed,
    )


def drive(engine: Engine, requests: Sequence[Request]) -> dict[bytes, Outcome]:
    """The worker's loop in short: fill while there is room, step; every outcome exactly once."""
    outcomes: dict[bytes, Outcome] = {}
    waiting = list(requests)
    submitted = 0
    progress = engine.progress()
    for _ in range(100_000):
        while waiting:
            prepared = engine.prepare(waiting[0])
            if isinstance(prepared, Failure):
                assert prepared.key == waiting.pop(0).key
                outcomes[prepared.key] = prepared
                continue
            if not engine.has_room(prepared):
                break
            engine.submit(prepared)
            waiting.pop(0)
            submitted += 1
        if not submitted and not waiting:
            break
        for outcome in engine.step(1.0):
            assert outcome.key not in outcomes, "a second outcome for one request"
            outcomes[outcome.key] = outcome
            submitted -= 1
        assert engine.progress() >= progress, "progress went back"
        progress = engine.progress()
    assert set(outcomes) == {request.key for request in requests}
    assert engine.step(0.0) == []
    return outcomes
