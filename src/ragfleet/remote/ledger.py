"""The run-wide account: what all workers together may still ask, and whether the server is there.

Pure: a worker's report and its wishes in, what it may do out. `ledger_file` keeps the one account
of a launch in a locked file. Times are seconds of one machine's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from ragfleet.remote.pacing import WINDOW_S, Allowance, Pacer
from ragfleet.remote.spec import RemoteSpec

BLOCK_S: Final = 0.25
"""Worth of the whole run's rate that one worker takes at a time."""
LEASE_S: Final = 0.5
"""How long a lease without a rate is good."""
_DOWN: Final = 16
"""So many failures in a row, whoever saw them, mean that the server is dead."""
_LONGEST_PAUSE_S: Final = 60.0
_PROBE_S: Final = 30.0
_NEVER_UP_S: Final = 300.0
"""How long to wait for the first reply: loading a model takes minutes."""
_FREE_RETRIES: Final = 500
_FREE_ROUNDS: Final = 4
"""Retries of everything that may be under way at once: a server that dies makes one round of them.
"""
_RETRIES_PER_ANSWER: Final = 2
_FULL_S: Final = 0.5
"""The first pause for a server that refuses even the fewest requests."""
_REQUEST_S: Final = 600.0
_LATE_S: Final = 60.0

Stop = Literal["", "spent", "outage", "retries"]
News = Literal["", "down", "up"]


class Held(msgspec.Struct):
    """Tokens that a worker's requests under way may cost, as of its last report."""

    tokens: tuple[float, float]
    at_s: float


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What the user set for the whole run."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    max_tokens_total: int | None = None
    max_outage_s: float = 3600.0
    free_retries: int = _FREE_RETRIES
    longest_s: float = _REQUEST_S + _LATE_S
    """A worker that has not reported for so long has nothing on its way any more."""
    window_s: float = WINDOW_S

    def cost(self, tokens: tuple[float, float]) -> float:
        return (tokens[0] * self.price_in + tokens[1] * self.price_out) / 1e6

    @property
    def is_limited(self) -> bool:
        return self.max_cost is not None or self.max_tokens_total is not None

    def allows(self, tokens: tuple[float, float]) -> bool:
        return (self.max_cost is None or self.cost(tokens) <= self.max_cost) and (
            self.max_tokens_total is None or sum(tokens) <= self.max_tokens_total
        )


def budget_of(
    spec: RemoteSpec,
    num_workers: int = 1,
    request_timeout_s: float = _REQUEST_S,
    window_s: float = WINDOW_S,
) -> Budget:
    return Budget(
        free_retries=max(_FREE_RETRIES, _FREE_ROUNDS * num_workers * spec.max_concurrency),
        longest_s=request_timeout_s + _LATE_S,
        requests_per_minute=spec.requests_per_minute,
        tokens_per_minute=spec.tokens_per_minute,
        price_in=spec.price_in or 0.0,
        price_out=spec.price_out or 0.0,
        max_cost=spec.max_cost,
        max_tokens_total=spec.max_tokens_total,
        max_outage_s=spec.max_outage_s,
        window_s=window_s,
    )


class Report(msgspec.Struct, kw_only=True):
    """What one worker has seen since its last report, and what it wants.

    Attributes:
        spent: tokens of prompts and of answers that were charged.
        reserved: the same for what is on its way, at worst; it replaces the last.
        is_first: of its process. What an earlier process of the rank had reserved may be charged.
        good: replies of a server that is there; `down`: tries that found none.
        full: refusals while it asked as little as it can.
        reached: whether a reply of any status came.
        after_s: the longest Retry-After among `down` and `full`.
        fault: the last of `down`, for people.
        unused: (requests, tokens) of its last lease that it did not use.
        waiting: the same as `spent`, at worst, of the next requests in its queue.
        draw: uniform in [0, 1): the account has no randomness of its own.
    """

    rank: int
    now_s: float
    draw: float = 0.5
    answered: int = 0
    retried: int = 0
    good: int = 0
    down: int = 0
    full: int = 0
    reached: bool = False
    after_s: float = 0.0
    fault: str = ""
    is_first: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    pause_s: float = 0.0
    spent: tuple[float, float] = (0.0, 0.0)
    reserved: tuple[float, float] = (0.0, 0.0)
    unused: tuple[float, float] = (0.0, 0.0)
    waiting: list[tuple[float, float]] = []


class Lease(msgspec.Struct, kw_only=True):
    """What a worker may do until `until_s`, or when to ask again."""

    requests: Allowance
    tokens: Allowance
    until_s: float
    pause_until_s: float = 0.0
    is_probe: bool = False
    stop: Stop = ""
    is_down: bool = False
    news: News = ""
    """What this report changed for the whole run, for one worker to say."""
    fault: str = ""
    """The last failure of a server that is down."""
    down_s: float = 0.0


class Ledger(msgspec.Struct, kw_only=True):
    """The account itself."""

    requests: Pacer
    tokens: Pacer
    spent: tuple[float, float] = (0.0, 0.0)
    reserved: dict[int, Held] = {}
    answered: int = 0
    retried: int = 0
    was_reached: bool = False
    """The server replied once, be it with an error."""
    pause_until_s: float = 0.0
    full_s: float = 0.0
    """The last pause for a server that refuses even the fewest requests."""
    last_fault: str = ""
    failures: int = 0
    openings: int = 0
    """How often in a row the circuit was opened; 0 is closed."""
    open_until_s: float = 0.0
    down_since_s: float = 0.0
    probe_until_s: float = 0.0


def new_ledger(budget: Budget, spent: tuple[float, float] = (0.0, 0.0)) -> Ledger:
    requests, tokens = budget.requests_per_minute, budget.tokens_per_minute
    return Ledger(requests=Pacer(requests, requests), tokens=Pacer(tokens, tokens), spent=spent)


def exchange(ledger: Ledger, budget: Budget, report: Report) -> Lease:
    """Book a report and grant a lease; changes the ledger."""
    since_s = ledger.down_since_s
    news = _book(ledger, budget, report)
    lease = _grant(ledger, budget, report)
    lease.news, lease.fault = news, ledger.last_fault
    lease.down_s = report.now_s - (ledger.down_since_s or since_s or report.now_s)
    return lease


def _grant(ledger: Ledger, budget: Budget, report: Report) -> Lease:
    now_s = report.now_s
    until_s = now_s + LEASE_S
    nothing = Allowance(now_s, 0.0, 0.0)
    stop = _stopped(ledger, budget, report)
    if stop:
        return Lease(requests=nothing, tokens=nothing, until_s=until_s, stop=stop)
    resume_s, is_probe = _circuit(ledger, report)
    count = _block(ledger, report)
    if resume_s > now_s or not count:
        return Lease(
            requests=nothing,
            tokens=nothing,
            until_s=until_s,
            pause_until_s=resume_s,
            is_down=ledger.openings > 0,
        )
    count = _affordable(ledger, budget, report, 1 if is_probe else count)
    if not count:  # others hold what is left, and may give some of it back
        return Lease(requests=nothing, tokens=nothing, until_s=until_s, pause_until_s=until_s)
    granted = report.waiting[:count]
    total = _sum(granted)
    ledger.reserved[report.rank] = Held(_sum([report.reserved, total]), now_s)
    window_s = budget.window_s
    requests = ledger.requests.take(now_s, count, window_s=window_s)
    if is_probe or budget.is_limited:
        requests.amount = min(requests.amount, float(count))
    largest = max(map(sum, granted))
    tokens = ledger.tokens.take(now_s, sum(total), largest, window_s=window_s)
    return Lease(requests=requests, tokens=tokens, until_s=until_s, is_probe=is_probe)


def _book(ledger: Ledger, budget: Budget, report: Report) -> News:
    ledger.answered += report.answered
    ledger.retried += report.retried
    ledger.was_reached |= report.reached
    ledger.spent = _sum([ledger.spent, report.spent])
    _release(ledger, budget, report)
    ledger.requests.give_back(report.now_s, report.unused[0], budget.window_s)
    ledger.tokens.give_back(report.now_s, report.unused[1], budget.window_s)
    if report.requests_per_minute is not None:
        ledger.requests.learn(report.requests_per_minute)
    if report.tokens_per_minute is not None:
        ledger.tokens.learn(report.tokens_per_minute)
    pause_s = report.pause_s
    if report.full:
        ledger.full_s = min(_LONGEST_PAUSE_S, max(_FULL_S, 2 * ledger.full_s))
        pause_s = max(pause_s, report.after_s or ledger.full_s * (0.75 + report.draw / 2))
    elif report.answered:  # by halves: a limit a minute lets some through after each pause
        ledger.full_s /= 2
    if pause_s:
        ledger.pause_until_s = max(ledger.pause_until_s, report.now_s + pause_s)
    return _look_at_server(ledger, report)


def _release(ledger: Ledger, budget: Budget, report: Report) -> None:
    """What was reserved and nobody will report on any more may have been charged."""
    own = ledger.reserved.get(report.rank)
    gone = [own.tokens] if own is not None and report.is_first else []
    ledger.reserved[report.rank] = Held(report.reserved, report.now_s)
    for rank, held in list(ledger.reserved.items()):
        if held.at_s < report.now_s - budget.longest_s:
            gone.append(ledger.reserved.pop(rank).tokens)
    ledger.spent = _sum([ledger.spent, *gone])


def _look_at_server(ledger: Ledger, report: Report) -> News:
    """Open the circuit of a server that is not there, close it when it is."""
    if report.good:
        was_open = ledger.openings > 0
        ledger.failures = ledger.openings = 0
        ledger.open_until_s = ledger.down_since_s = ledger.probe_until_s = 0.0
        return "up" if was_open else ""
    if not report.down:
        return ""
    ledger.failures += report.down
    ledger.down_since_s = ledger.down_since_s or report.now_s
    ledger.last_fault = report.fault or ledger.last_fault
    was_probe = ledger.probe_until_s > 0
    if ledger.failures < _DOWN or not (was_probe or ledger.openings == 0):
        return ""
    pause_s = min(_LONGEST_PAUSE_S, 2.0**ledger.openings) * (0.75 + report.draw / 2)
    ledger.openings += 1
    ledger.open_until_s = report.now_s + max(pause_s, report.after_s)
    ledger.probe_until_s = 0.0
    return "down" if ledger.openings == 1 else ""


def _circuit(ledger: Ledger, report: Report) -> tuple[float, bool]:
    """(when to ask again, whether this is the one probe of a server that was dead)."""
    now_s = report.now_s
    until_s = max(ledger.open_until_s, ledger.pause_until_s)
    if until_s > now_s or not ledger.openings:
        return until_s, False
    if ledger.probe_until_s > now_s:
        return now_s + LEASE_S, False
    ledger.probe_until_s = now_s + _PROBE_S
    return now_s, True


def _stopped(ledger: Ledger, budget: Budget, report: Report) -> Stop:
    # A server that never replied is more likely a wrong --base_url than an outage.
    patience_s = budget.max_outage_s
    if not ledger.was_reached:
        patience_s = min(patience_s, _NEVER_UP_S)
    if ledger.down_since_s and report.now_s - ledger.down_since_s > patience_s:
        return "outage"
    if ledger.retried > budget.free_retries + _RETRIES_PER_ANSWER * ledger.answered:
        return "retries"
    if (
        budget.is_limited
        and report.waiting
        and not any(any(held.tokens) for held in ledger.reserved.values())
        and not budget.allows(_sum([ledger.spent, report.waiting[0]]))
    ):
        return "spent"
    return ""


def _block(ledger: Ledger, report: Report) -> int:
    """Requests of one block: a quarter of a second of the tighter rate, one at least."""
    most = len(report.waiting)
    for pacer, used in (
        (ledger.requests, 1.0),
        (ledger.tokens, sum(_sum(report.waiting)) / max(most, 1)),
    ):
        if pacer.per_minute is not None and used > 0:
            most = min(most, max(1, int(pacer.per_minute * BLOCK_S / 60 / used)))
    return most


def _affordable(ledger: Ledger, budget: Budget, report: Report, count: int) -> int:
    """How many of the waiting requests may be let go before a total is passed."""
    if not budget.is_limited:
        return count
    held = _sum([ledger.spent, *(held.tokens for held in ledger.reserved.values())])
    while count >= 1 and not budget.allows(_sum([held, *report.waiting[:count]])):
        count -= 1
    return count


def _sum(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
