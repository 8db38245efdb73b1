"""Deaths that records explain, and deaths that they don't."""

from __future__ import annotations

from collections.abc import Sequence

from ragfleet.launchers.restarts import MOST_IN_A_ROW, Restarts, Verdict
from ragfleet.poison import Suspicion


class Deaths:
    def __init__(self, most: int = 3) -> None:
        self.restarts = Restarts(most)
        self.sets: list[Sequence[int]] = []

    def died(self, *rows: int, answered: int = 0) -> Verdict:
        before = Suspicion.of(self.sets)
        self.sets.append(rows)
        return self.restarts.died(
            rows,
            num_answered=answered,
            before=before,
            after=Suspicion.of(self.sets),
        )


def test_deaths_without_a_cause_count() -> None:
    deaths = Deaths()
    assert [deaths.died(n, n + 1, answered=9) for n in (0, 10, 20, 30)] == [
        "restart",
        "restart",
        "restart",
        "give up",
    ]
    assert deaths.restarts.count == 4


def test_nothing_in_flight_counts_too() -> None:
    deaths = Deaths(1)
    assert [deaths.died(), deaths.died()] == ["restart", "give up"]


def test_who_has_proved_itself_counts_anew() -> None:
    deaths = Deaths(1)
    for number in range(5):
        assert deaths.died(number, answered=100) == "restart"
        assert deaths.restarts.count == 1


def test_records_that_kill_explain_their_deaths() -> None:
    """Each is in flight at two before it is tried alone, at the end of its chunk."""
    deaths = Deaths()
    bad = range(10)
    for row in bad:
        assert deaths.died(row, answered=3) == "restart"
        assert deaths.died(row) == "restart"
        assert deaths.restarts.count <= 1
    for row in bad:
        assert deaths.died(row) == "trial"


def test_of_many_in_flight_one_is_found() -> None:
    deaths = Deaths()
    rows = list(range(32))
    assert deaths.died(*rows) == "restart"
    assert deaths.died(*rows) == "restart"
    while len(rows) > 1:
        rows = rows[: len(rows) // 2]
        assert deaths.died(*rows) == "trial"
    assert deaths.died(32, 33, answered=30) == "restart"


def test_an_engine_that_answers_nothing_is_given_up() -> None:
    """However it looks as if every record killed it."""
    deaths = Deaths()
    rows = list(range(32))
    deaths.died(*rows)
    deaths.died(*rows)
    while len(rows) > 1:
        rows = rows[: len(rows) // 2]
        assert deaths.died(*rows) == "trial"
    verdicts = [deaths.died(row) for row in (1, 2, 3)]  # row 0 was the first alone
    assert verdicts == ["trial", "trial", "give up"]


def test_an_engine_that_breaks_later_does_not_poison_everything() -> None:
    deaths = Deaths()
    deaths.died(*range(100, 140), answered=50)
    deaths.died(*range(100, 140))
    verdicts = [deaths.died(row) for row in range(100, 140)]
    assert verdicts.index("give up") == MOST_IN_A_ROW


def test_other_records_first_and_never_an_answer() -> None:
    deaths = Deaths()
    verdicts = []
    for row in range(5):
        verdicts += [deaths.died(row), deaths.died(row)]
    assert verdicts.index("give up") == 6, "four that were the first to die teach nothing"
