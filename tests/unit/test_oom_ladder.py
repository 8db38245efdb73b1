"""The ladder of batch sizes when memory runs out: down fast, up slowly, never below one request."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ragfleet.engines.oom_ladder import GROW_AFTER, OomLadder


def test_nothing_is_limited_until_memory_runs_out() -> None:
    ladder = OomLadder()
    assert ladder.fit(10_000, 32) == 32
    assert not ladder.succeeded(320_000)


def test_the_rungs_from_a_full_batch_to_the_failure_row() -> None:
    ladder = OomLadder()
    assert ladder.failed(8, 8000, was_alone=False) == "smaller"
    assert ladder.fit(1000, 8) == 4
    assert ladder.failed(4, 4000, was_alone=False) == "smaller"
    assert ladder.failed(2, 2000, was_alone=False) == "smaller"
    assert ladder.fit(1000, 8) == 1
    assert ladder.failed(1, 1000, was_alone=False) == "alone"
    assert ladder.failed(1, 1000, was_alone=True) == "oom"
    assert ladder.budget_tokens == 1000, "a record that never fits makes no batch smaller"


def test_the_budget_grows_back_slowly_until_it_is_gone() -> None:
    ladder = OomLadder()
    ladder.failed(8, 8000, was_alone=False)
    budgets = []
    while ladder.budget_tokens is not None:
        budgets.append(ladder.budget_tokens)
        grew = [ladder.succeeded(ladder.budget_tokens or 0) for _ in range(GROW_AFTER)]
        assert grew == [False] * (GROW_AFTER - 1) + [True]
    assert budgets[0] == 4000
    assert all(before < after <= before * 9 // 8 for before, after in pairwise(budgets))


def test_small_batches_prove_nothing() -> None:
    ladder = OomLadder()
    ladder.failed(8, 8000, was_alone=False)
    assert not any(ladder.succeeded(100) for _ in range(1000))


def test_a_relapse_makes_it_more_patient_but_a_descent_does_not() -> None:
    ladder = OomLadder()
    for count, tokens in ((8, 8000), (4, 4000), (2, 2000)):
        ladder.failed(count, tokens, was_alone=False)

    def batches_until_it_grows() -> int:
        count = 1
        while not ladder.succeeded(ladder.budget_tokens or 0):
            count += 1
        return count

    assert batches_until_it_grows() == GROW_AFTER
    ladder.failed(2, 1100, was_alone=False)
    assert batches_until_it_grows() == 2 * GROW_AFTER


@given(
    capacity=st.integers(1, 5000),
    widths=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    batch_size=st.integers(1, 64),
)
def test_whatever_fits_alone_is_answered(capacity: int, widths: list[int], batch_size: int) -> None:
    """Against a memory of `capacity` tokens: what fits alone is answered, all else is `oom`."""
    ladder, attempts = OomLadder(), 0

    def answer(rows: list[int], was_alone: bool = False) -> list[tuple[int, bool]]:
        nonlocal attempts
        attempts += 1
        width, tokens = max(rows), len(rows) * max(rows)
        if tokens <= capacity:
            ladder.succeeded(tokens)
            return [(row, True) for row in rows]
        rung = ladder.failed(len(rows), tokens, was_alone=was_alone)
        if rung == "oom":
            return [(rows[0], False)]
        if rung == "alone":
            return answer(rows, was_alone=True)
        size = min(ladder.fit(width, len(rows)), (len(rows) + 1) // 2)
        return [
            outcome
            for start in range(0, len(rows), size)
            for outcome in answer(rows[start : start + size])
        ]

    waiting, answered = sorted(widths, reverse=True), []
    while waiting:
        count = ladder.fit(waiting[0], batch_size)
        answered += answer(waiting[:count])
        waiting = waiting[count:]
    assert sorted(answered) == sorted((width, width <= capacity) for width in widths)
    assert attempts <= 4 * len(widths)
