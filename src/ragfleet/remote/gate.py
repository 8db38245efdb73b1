"""One worker's way to the server: requests wait here for their moment.

Owns the queue, the concurrency, what is known of request sizes, and the talk with the run-wide
account. Runs in the engine's event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import Callable
from typing import Final

from ragfleet.errors import RagfleetError, RemoteError
from ragfleet.remote.headers import RateHeaders
from ragfleet.remote.ledger import Lease, Report, Stop
from ragfleet.remote.pacing import CREDIT, JITTER, WINDOW_S, Allowance, Concurrency
from ragfleet.remote.replies import Answer, Fault

log = logging.getLogger(__name__)

Exchange = Callable[[Report], Lease]

_BYTES_PER_TOKEN: Final = 3.0
"""The first guess; replies teach better."""
_LEARNING: Final = 0.05
_SOONEST_S: Final = 0.01
_BLOCK: Final = 64
"""Requests of the queue's head that a wish names."""
_CHARGED: Final = frozenset({"bad_reply", "timeout"})
"""Faults of requests that the server may have answered and charged."""

STOPS: Final[dict[Stop, str]] = {
    "spent": "The run has spent what --max_cost or --max_tokens_total allows. Raise it to go on.",
    "outage": "The server does not answer. Check --base_url and the server (--max_outage_s).",
    "retries": (
        "The server makes more retries than answers: all requests' retries together are used up."
        " Ask it less (--max_concurrency, --max_requests_per_minute), or look at its log."
    ),
}


class Ticket:
    """One attempt's place in the queue and what it reserved: (prompt, answer) tokens."""

    __slots__ = ("future", "num_bytes", "reserved")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.reserved = (0.0, 0.0)
        self.future: asyncio.Future[None] | None = None


class Gate:
    """Lets requests through at their moments; oldest first."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        rank: int,
        max_concurrency: int,
        max_new_tokens: int,
        loop: asyncio.AbstractEventLoop,
        window_s: float = WINDOW_S,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """`say` is told what the person who waits should know, once for the whole run."""
        self._exchange, self._rank, self._loop = exchange, rank, loop
        self._max_new_tokens, self._say = max_new_tokens, say
        self._credit_s = CREDIT * JITTER * window_s
        self.concurrency = Concurrency(max_concurrency)
        self.error: RagfleetError | None = None
        """What ends the run; nothing passes any more."""
        self.is_down = False
        self._queue: list[tuple[int, int, Ticket]] = []
        self._count = 0
        self._active: set[Ticket] = set()
        self._lease: Lease | None = None
        self._report = Report(rank=rank, now_s=0.0, is_first=True)
        self._timer: asyncio.TimerHandle | None = None
        self._bytes_per_token = _BYTES_PER_TOKEN
        self._said: tuple[float | None, float | None] = (None, None)
        self._rng = random.Random()

    # ---- for the engine

    async def enter(self, order: int, num_bytes: int) -> Ticket:
        """Wait for a request's moment; older `order` first. Pair with `leave`."""
        ticket = Ticket(num_bytes)
        ticket.future = self._loop.create_future()
        self._count += 1
        heapq.heappush(self._queue, (order, self._count, ticket))
        self._pump()
        try:
            await ticket.future
        except asyncio.CancelledError:
            if ticket in self._active:
                self.leave(ticket, None)
            raise
        return ticket

    def leave(self, ticket: Ticket, verdict: Answer | Fault | None) -> None:
        """A request came back (None: it was cancelled, and may have been charged)."""
        self._active.discard(ticket)
        report = self._report
        if isinstance(verdict, Answer):
            report.answered += 1
            report.good += 1
            if verdict.prompt_tokens:
                self._learn(ticket.num_bytes / verdict.prompt_tokens)
            report.spent = (
                report.spent[0] + _known(verdict.prompt_tokens, ticket.reserved[0]),
                report.spent[1] + _known(verdict.completion_tokens, ticket.reserved[1]),
            )
            report.reached = True
        elif isinstance(verdict, Fault):
            self._count_fault(verdict)
        if verdict is None or (isinstance(verdict, Fault) and verdict.error_type in _CHARGED):
            report.spent = (
                report.spent[0] + ticket.reserved[0],
                report.spent[1] + ticket.reserved[1],
            )
        if verdict is not None:
            refused = isinstance(verdict, Fault) and verdict.load != "none"
            self.concurrency.count(refused)
            if refused or (self._lease is not None and self._lease.is_probe):
                self._lease_ends_soon()
        self._pump()

    def _count_fault(self, fault: Fault) -> None:
        report = self._report
        report.reached |= fault.status is not None
        report.retried += fault.remedy == "retry" and not self.is_down
        report.answered += fault.remedy == "fail"
        is_full = fault.load == "limited" and self.concurrency.is_least
        report.full += is_full
        if fault.load == "down":
            report.down += 1
            report.fault = fault.message
        else:
            report.good += 1
        if fault.after_s and (is_full or fault.load == "down"):
            report.after_s = max(report.after_s, fault.after_s)

    def learn_rates(self, rates: RateHeaders) -> None:
        """What a reply's headers say of the server's limits; said again only when it changes."""
        said = (rates.requests_per_minute, rates.tokens_per_minute)
        if said != self._said:
            self._said = said
            self._report.requests_per_minute, self._report.tokens_per_minute = said
            self._lease_ends_soon()
        if rates.pause_s:
            self._report.pause_s = max(self._report.pause_s, rates.pause_s)
            self._lease_ends_soon()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def flush(self) -> None:
        """Report at the end, so that the account is right for the others."""
        self._ask(has_wishes=False)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # ---- letting through

    def _pump(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self.error is None:
            ticket = self._queue[0][2]
            assert ticket.future is not None
            if ticket.future.done():  # cancelled
                heapq.heappop(self._queue)
                continue
            if len(self._active) >= max(1, int(self.concurrency.limit)):
                return  # `leave` comes back here
            when_s = self._when(ticket)
            if when_s > self._loop.time():
                self._timer = self._loop.call_at(when_s, self._pump)
                return
            heapq.heappop(self._queue)
            self._spend(ticket)
            self._active.add(ticket)
            ticket.future.set_result(None)

    def _when(self, ticket: Ticket) -> float:
        """The moment of the first in the queue, or when to look again."""
        now_s = self._loop.time()
        moment = self._moment(ticket, now_s)
        if moment is not None:
            return moment
        self._ask()
        lease = self._lease
        if self.error is not None or lease is None:
            return now_s + _SOONEST_S
        moment = self._moment(ticket, now_s)
        if moment is not None:
            return moment
        return max(lease.pause_until_s, now_s + _SOONEST_S)

    def _moment(self, ticket: Ticket, now_s: float) -> float | None:
        lease = self._lease
        if lease is None or (lease.requests.step_s == 0 and lease.until_s < now_s):
            return None
        first = lease.requests.at_s(now_s, self._credit_s)
        second = lease.tokens.at_s(now_s, self._credit_s)
        if first is None or second is None:
            return None
        if lease.requests.amount < 1 or lease.tokens.amount < sum(self._need(ticket)) - 1e-6:
            return None  # the rest of a block is too small
        return max(first, second)

    def _spend(self, ticket: Ticket) -> None:
        assert self._lease is not None
        ticket.reserved = self._need(ticket)
        self._lease.requests.spend(1.0)
        self._lease.tokens.spend(sum(ticket.reserved))

    def _need(self, ticket: Ticket) -> tuple[float, float]:
        """Tokens that a request may be charged at worst."""
        return ticket.num_bytes / self._bytes_per_token, float(self._max_new_tokens)

    def _learn(self, bytes_per_token: float) -> None:
        self._bytes_per_token += _LEARNING * (bytes_per_token - self._bytes_per_token)

    # ---- the account

    def _ask(self, has_wishes: bool = True) -> None:
        """Report what happened and take the next lease."""
        report = self._report
        report.now_s = self._loop.time()
        report.draw = self._rng.random()
        report.reserved = (
            sum(ticket.reserved[0] for ticket in self._active),
            sum(ticket.reserved[1] for ticket in self._active),
        )
        if self._lease is not None:
            report.unused = (self._lease.requests.left, self._lease.tokens.left)
        if has_wishes:
            first = heapq.nsmallest(_BLOCK, self._queue)
            report.waiting = [self._need(ticket) for _, _, ticket in first]
        lease = self._lease = self._exchange(report)
        self._report = Report(rank=self._rank, now_s=report.now_s)
        self.is_down = lease.is_down
        if lease.news == "down":
            self._say(f"The server does not answer ({lease.fault}). It is tried again and again.")
        elif lease.news == "up":
            self._say(f"The server answers again, after {lease.down_s:,.0f} s.")
        if lease.stop and self.error is None:
            last = f" The last try: {lease.fault}." if lease.stop == "outage" else ""
            self.error = RemoteError(STOPS[lease.stop] + last)

    def _lease_ends_soon(self) -> None:
        """Trouble is worth a report now, at most every few hundredths of a second."""
        if self._lease is not None and self._lease.requests.step_s == 0:
            self._lease.until_s = min(self._lease.until_s, self._report.now_s + 0.05)
            if self._lease.is_probe:
                self._lease.requests = Allowance()


def _known(count: int | None, reserved: float) -> float:
    return reserved if count is None else float(count)
