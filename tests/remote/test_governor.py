"""Rates, concurrency and the circuit, as pure state machines in virtual time."""

from __future__ import annotations

import heapq
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragfleet.errors import RemoteError
from ragfleet.remote.headers import duration_s, read_rates, retry_after_s
from ragfleet.remote.ledger import Budget, Report, budget_of, exchange, new_ledger
from ragfleet.remote.ledger_file import LedgerFile, write_ledger
from ragfleet.remote.pacing import (
    CREDIT,
    JITTER,
    UNLIMITED,
    Allowance,
    Concurrency,
    Pacer,
    backoff_s,
)
from ragfleet.remote.spec import RemoteSpec

CREDIT_S = CREDIT * JITTER * 60


def arrivals_of(
    budget: Budget, num_workers: int, seconds: float, sizes: list[int], seed: int
) -> list[tuple[float, int]]:
    """(moment, tokens) at the server of workers that always have work, on a slow, uneven way."""
    rng = random.Random(seed)
    ledger = new_ledger(budget)
    arrived: list[tuple[float, int]] = []
    events = [(rng.random(), rank) for rank in range(num_workers)]
    queues = {rank: deque(rng.choices(sizes, k=64)) for rank in range(num_workers)}
    leases = {
        rank: exchange(ledger, budget, Report(rank=rank, now_s=0.0)) for rank in range(num_workers)
    }
    heapq.heapify(events)
    while events[0][0] < seconds:
        now_s, rank = heapq.heappop(events)
        queue, lease = queues[rank], leases[rank]
        moments = lease.requests.at_s(now_s, CREDIT_S), lease.tokens.at_s(now_s, CREDIT_S)
        size = queue[0]
        if None in moments or lease.requests.amount < 1 or lease.tokens.amount < size - 1e-6:
            leases[rank] = exchange(
                ledger,
                budget,
                Report(
                    rank=rank,
                    now_s=now_s,
                    unused=(lease.requests.left, lease.tokens.left),
                    waiting=[(float(tokens), 0.0) for tokens in queue],
                ),
            )
            heapq.heappush(events, (now_s + 1e-4, rank))
            continue
        when_s = max(moment for moment in moments if moment is not None)
        if when_s > now_s:
            heapq.heappush(events, (when_s + rng.random() * 0.005, rank))
            continue
        lease.requests.spend(1)
        lease.tokens.spend(size)
        arrived.append((now_s + rng.random() * 0.5, size))
        queue.popleft()
        queue.append(rng.choice(sizes))
        heapq.heappush(events, (now_s, rank))
    return sorted(arrived)


def most_in_a_minute(arrived: list[tuple[float, int]], by_tokens: bool) -> int:
    window: deque[tuple[float, int]] = deque()
    total = most = 0
    for moment, size in arrived:
        window.append((moment, size))
        total += size if by_tokens else 1
        while window[0][0] <= moment - 60:
            _, gone = window.popleft()
            total -= gone if by_tokens else 1
        most = max(most, total)
    return most


@settings(max_examples=25, deadline=None)
@given(limit=st.integers(30, 2000), workers=st.integers(1, 8), seed=st.integers(0, 99))
def test_no_window_holds_more_requests_than_the_limit(limit: int, workers: int, seed: int) -> None:
    arrived = arrivals_of(Budget(requests_per_minute=limit), workers, 150, [1], seed)
    assert most_in_a_minute(arrived, by_tokens=False) <= limit
    after_warm_up = sum(60 < moment <= 120 for moment, _ in arrived)
    assert after_warm_up >= 0.95 * limit


@settings(max_examples=15, deadline=None)
@given(workers=st.integers(1, 8), seed=st.integers(0, 99))
def test_no_window_holds_more_tokens_than_the_limit(workers: int, seed: int) -> None:
    limit = 200_000
    sizes = [200, 500, 1000, 1500]
    arrived = arrivals_of(Budget(tokens_per_minute=limit), workers, 150, sizes, seed)
    assert most_in_a_minute(arrived, by_tokens=True) <= limit
    assert sum(size for moment, size in arrived if 60 < moment <= 120) >= 0.95 * limit


def test_moments_missed_are_gone() -> None:
    ledger = new_ledger(Budget(requests_per_minute=60))
    lease = exchange(ledger, Budget(), Report(rank=0, now_s=0.0, waiting=[(1.0, 1.0)] * 9))
    lease.requests.amount = 9.0
    assert lease.requests.at_s(5.02, CREDIT_S) == pytest.approx(5.02 - CREDIT_S)
    assert lease.requests.amount < 5


def test_what_is_given_back_is_there_for_the_next() -> None:
    pacer = Pacer(60.0)
    first = pacer.take(100.0, 10.0)
    assert (first.start_s, first.step_s) == pytest.approx((100 - CREDIT_S / 2, 1.02))
    first.spend(4)
    assert first.left == 6
    pacer.give_back(101.0, first.left)
    assert pacer.take(101.0, 1.0).start_s == pytest.approx(first.start_s)
    pacer.give_back(200.0, 9.0)
    assert pacer.take(200.0, 1.0).start_s == pytest.approx(200 - CREDIT_S / 2), "not the past's"
    free = Pacer().take(1.0, 5.0)
    assert (free.amount, free.left) == (UNLIMITED, 0.0)
    assert Allowance(step_s=0.5, amount=3.0).left == 3


def test_concurrency_grows_slowly_and_halves() -> None:
    flow = Concurrency(64)
    for _ in range(8 + 8 + 16 + 32):
        flow.count(refused=False)
    assert flow.limit == 64
    for _ in range(64):
        flow.count(refused=True)
    assert flow.limit == 32
    for number in range(32):
        flow.count(refused=number % 20 == 0)  # noise
    assert flow.limit == 33
    for _ in range(10_000):
        flow.count(refused=False)
    assert flow.limit == 64
    flow = Concurrency(64, limit=1.0, is_starting=False)
    for limit in (2, 2, 3):
        flow.count(refused=False)
        assert flow.limit == limit


def test_the_circuit_opens_probes_and_closes() -> None:
    budget = Budget()
    ledger = new_ledger(budget)
    work = [(10.0, 10.0)]

    def ask(now_s: float, rank: int = 0, **seen: int) -> tuple[bool, bool]:
        lease = exchange(ledger, budget, Report(rank=rank, now_s=now_s, waiting=work, **seen))
        return lease.requests.amount > 0, lease.is_probe

    assert ask(0.0, down=15) == (True, False)
    assert ask(0.1, down=1) == (False, False)  # open
    assert ask(1.5, rank=1) == (True, True)  # one probe
    assert ask(1.5, rank=2) == (False, False)  # for all workers
    assert ask(1.6, rank=1, down=1) == (False, False)  # longer now
    assert ask(2.9, rank=2) == (False, False)
    assert ask(4.0, rank=2) == (True, True)
    assert ask(4.1, rank=2, good=1) == (True, False)
    assert ledger.openings == 0


def test_how_long_the_server_was_away_is_said_once_it_is_back() -> None:
    budget = Budget()
    ledger = new_ledger(budget)

    def ask(now_s: float, **seen: int) -> tuple[str, float]:
        lease = exchange(ledger, budget, Report(rank=0, now_s=now_s, reached=True, **seen))
        return lease.news, lease.down_s

    assert ask(5.0) == ("", 0)
    assert ask(10.0, down=16) == ("down", 0)
    assert ask(14.0, down=1) == ("", 4)
    assert ask(19.0, good=1) == ("up", 9)
    assert ask(7000.0) == ("", 0), "and the next outage begins anew"


def test_an_outage_ends_the_run() -> None:
    budget = Budget(max_outage_s=100)
    ledger = new_ledger(budget)
    assert exchange(ledger, budget, Report(rank=0, now_s=1.0, down=20)).stop == ""
    assert exchange(ledger, budget, Report(rank=1, now_s=102.0, down=1)).stop == "outage"


@pytest.mark.parametrize(("ever_up", "stop"), [(0, "outage"), (1, "")])
def test_a_server_that_never_answered_is_not_waited_for_long(ever_up: int, stop: str) -> None:
    ledger = new_ledger(Budget())
    exchange(ledger, Budget(), Report(rank=0, now_s=0.5, good=ever_up, reached=bool(ever_up)))
    exchange(ledger, Budget(), Report(rank=0, now_s=1.0, down=20))
    assert exchange(ledger, Budget(), Report(rank=0, now_s=400.0, down=1)).stop == stop


def test_too_many_retries_end_the_run() -> None:
    ledger = new_ledger(Budget())
    seen = Report(rank=0, now_s=1.0, answered=100, retried=701)
    assert exchange(ledger, Budget(), seen).stop == "retries"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90)), max_size=60))
def test_totals_are_never_passed(steps: list[tuple[int, int]]) -> None:
    """Whatever the answers cost, up to what was reserved for them."""
    budget = Budget(max_tokens_total=1000)
    ledger = new_ledger(budget)
    held = dict.fromkeys(range(4), 0)
    total = 0.0
    for rank, cost in steps:
        spent = float(min(cost, 50)) * held[rank]
        total += spent
        lease = exchange(
            ledger,
            budget,
            Report(rank=rank, now_s=0.0, spent=(spent, 0.0), waiting=[(50.0, 50.0)] * 3),
        )
        held[rank] = int(lease.requests.amount)
        assert ledger.spent[0] + 100 * sum(held.values()) <= 1000
    assert total <= 1000


@given(st.integers(1, 20), st.one_of(st.none(), st.floats(0, 100)), st.floats(0, 0.999))
def test_retry_after_is_a_floor(attempt: int, after_s: float | None, draw: float) -> None:
    wait_s = backoff_s(attempt, after_s, draw)
    assert wait_s >= (after_s or 0.25)
    assert wait_s <= 60 + 1.25 * (after_s or 0)


def test_waits_double_up_to_a_minute() -> None:
    assert [backoff_s(attempt, None, 0.0) for attempt in (1, 2, 3, 8, 9)] == [0.25, 0.5, 1, 30, 30]
    assert [backoff_s(attempt, None, 0.5) for attempt in (1, 8)] == [0.375, 45]
    assert [backoff_s(attempt, 40.0, 0.5) for attempt in (1, 8)] == [45, 70]


def test_headers_of_several_providers() -> None:
    openai = {
        "x-ratelimit-limit-requests": "5000",
        "x-ratelimit-remaining-requests": "4999",
        "x-ratelimit-reset-requests": "12ms",
        "x-ratelimit-limit-tokens": "160000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6s",
    }
    rates = read_rates(openai)
    assert (rates.requests_per_minute, rates.tokens_per_minute) == (5000, 160_000)
    assert rates.pause_s == 1
    daily = {
        "x-ratelimit-limit-requests": "14400",
        "x-ratelimit-remaining-requests": "14370",
        "x-ratelimit-reset-requests": "2m59.56s",
    }
    assert read_rates(daily).requests_per_minute is None
    together = {"x-ratelimit-limit": "10", "x-tokenlimit-limit": "3000"}
    assert read_rates(together, period_s=1.0).requests_per_minute == 600
    assert read_rates(together, period_s=1.0).tokens_per_minute == 180_000
    assert duration_s("6m0s") == 360
    assert duration_s("soon") is None
    assert retry_after_s({"retry-after": "1.5"}) == 1.5
    assert retry_after_s({"retry-after-ms": "200", "retry-after": "9"}) == 0.2
    assert retry_after_s({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}) == 0
    assert retry_after_s({"retry-after": "whenever"}) is None


def test_without_locks_each_worker_has_its_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    account = LedgerFile(tmp_path / "rates.json", Budget(requests_per_minute=600), 4)
    lease = account.exchange(Report(rank=0, now_s=100.0, waiting=[(1.0, 1.0)] * 64))
    assert not account.is_shared
    assert lease.requests.step_s == pytest.approx(1.02 * 60 / 150)
    account.close()


def test_without_locks_a_share_of_what_was_spent_counts_and_outlives_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    budget = Budget(max_tokens_total=4000)
    write_ledger(tmp_path / "rates.json", budget, (1600.0, 0.0))
    wish = [(100.0, 0.0)] * 64
    granted = 0.0
    for _ in range(2):  # the second is a restarted worker; what the first held counts as spent
        account = LedgerFile(tmp_path / "rates.json", budget, 4, rank=1)
        first = Report(rank=1, now_s=1.0, waiting=wish, is_first=True)
        granted += account.exchange(first).requests.amount
        account.close()
    assert granted == (4000 - 1600) / 4 / 100


def test_a_damaged_account_is_noticed_where_money_depends_on_it(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(b"00000100{")
    wish = Report(rank=0, now_s=1.0, waiting=[(1.0, 1.0)])
    assert LedgerFile(path, Budget(), 1).exchange(wish).requests.amount >= 1
    path.write_bytes(b"")
    with pytest.raises(RemoteError, match="damaged"):
        LedgerFile(path, Budget(max_tokens_total=9), 1).exchange(wish)


def test_an_account_of_many_workers_that_grew_and_shrank_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    budget = Budget(max_tokens_total=10**9)
    write_ledger(path, budget, (7.0, 0.0))
    account = LedgerFile(path, budget, 200)
    for rank in range(200):
        account.exchange(Report(rank=rank, now_s=1.0, reserved=(123.456, 789.0123)))
    for rank in range(200):
        account.exchange(Report(rank=rank, now_s=2.0))
    assert account._read().spent == (7.0, 0.0)


def test_what_a_lost_worker_had_on_its_way_counts_as_spent() -> None:
    budget = Budget(max_tokens_total=1000, longest_s=60)
    ledger = new_ledger(budget)
    exchange(ledger, budget, Report(rank=0, now_s=0.0, waiting=[(300.0, 300.0)]))
    stop = exchange(ledger, budget, Report(rank=1, now_s=1.0, waiting=[(300.0, 300.0)]))
    assert (stop.stop, stop.requests.amount) == ("", 0.0)  # it may give some of it back
    stop = exchange(ledger, budget, Report(rank=1, now_s=99.0, waiting=[(300.0, 300.0)]))
    assert stop.stop == "spent"


def test_a_limit_that_the_server_raises_again_is_raised_here() -> None:
    given = Budget(requests_per_minute=100)
    for budget, expected in ((given, [60, 100]), (Budget(), [60, 300])):
        ledger = new_ledger(budget)
        for said, rate in zip((60.0, 300.0), expected, strict=True):
            exchange(ledger, budget, Report(rank=0, now_s=1.0, requests_per_minute=said))
            assert ledger.requests.per_minute == rate


def test_retry_after_holds_for_a_dead_and_for_a_full_server() -> None:
    work = [(1.0, 1.0)]
    for seen in ({"down": 16}, {"full": 1}):
        ledger = new_ledger(Budget())
        report = Report(rank=0, now_s=1.0, after_s=40.0, waiting=work, **seen)
        assert exchange(ledger, Budget(), report).pause_until_s == 41.0
        assert (
            exchange(ledger, Budget(), Report(rank=1, now_s=40.0, waiting=work)).requests.amount
            == 0
        )


def test_a_server_that_is_full_is_left_alone_for_longer_each_time() -> None:
    ledger, now_s, pauses = new_ledger(Budget()), 0.0, []
    for answered in (0, 0, 0, 1, 1, 0, *[0] * 9):
        now_s += 1000
        seen = Report(rank=0, now_s=now_s, full=1 - answered, answered=answered)
        exchange(ledger, Budget(), seen)
        pauses.append(max(0.0, ledger.pause_until_s - now_s))
    assert pauses == [0.5, 1, 2, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (Budget(requests_per_minute=2400), 10),
        (Budget(requests_per_minute=60), 1),
        (Budget(requests_per_minute=2400, tokens_per_minute=120_000), 5),
        (Budget(tokens_per_minute=60), 1),
    ],
)
def test_a_worker_takes_a_quarter_of_a_second_at_a_time(budget: Budget, count: int) -> None:
    work = [(60.0, 40.0)] * 64
    lease = exchange(new_ledger(budget), budget, Report(rank=0, now_s=1.0, waiting=work))
    if budget.requests_per_minute is not None:
        assert lease.requests.amount == count
    if budget.tokens_per_minute is not None:
        assert lease.tokens.amount == 100 * count


def test_what_a_budget_is_made_of() -> None:
    limits: dict[str, Any] = {
        "requests_per_minute": 7,
        "tokens_per_minute": 8,
        "price_in": 2.0,
        "price_out": 4.0,
        "max_cost": 3.0,
        "max_tokens_total": 2_000_000,
        "max_outage_s": 9.0,
    }
    spec = RemoteSpec(
        provider="openai", base_url="", model="", key_env="", max_concurrency=50, **limits
    )
    budget = budget_of(spec, 20, request_timeout_s=100.0, window_s=30.0)
    assert budget == Budget(**limits, free_retries=4 * 20 * 50, longest_s=160.0, window_s=30.0)
    assert budget_of(spec).free_retries == Budget().free_retries == 500
    assert budget_of(spec).longest_s == Budget().longest_s == 660
    tokens = (500_000.0, 500_000.0)
    assert budget.cost(tokens) == spec.cost(*tokens) == 3.0
    assert budget.allows(tokens)
    assert not budget.allows((500_000.0, 500_001.0))
    assert not budget.allows((1.5e6, 1.0)), "of the money"
    assert not Budget(max_tokens_total=9).allows((9.0, 1.0))


def test_one_request_a_minute() -> None:
    arrived = arrivals_of(Budget(requests_per_minute=1), 4, 600, [1], 0)
    assert most_in_a_minute(arrived, by_tokens=False) == 1
    assert len(arrived) >= 9
