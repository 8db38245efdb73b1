"""What the shared-prefix loop's scheduler costs the host, without a model.

    python benchmarks/scheduler_cost.py [--slots 256] [--new_tokens 128] [--least_free 1]

Prompts of random ids: 40 that all have, a context of 512 or 4,096, asked by 1, 4 or 16 in a row, a
question of 30. Answers have `--new_tokens` on average, half as many at least. Twice as many prompts
wait as there are slots; measured while they do, after the first round of slots. Per record, in
microseconds: submit, next_pass, release, all three; then a pass of rows alone with all slots.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from ragfleet.engines.shared_prefix.loop import LOOKAHEAD
from ragfleet.engines.shared_prefix.scheduler import Limits, Pass, Scheduler

HEAD_TOKENS: Final = 40
QUESTION_TOKENS: Final = 30
VOCABULARY: Final = range(32_000)


def prompts(num_records: int, context_tokens: int, share: int) -> Iterator[list[int]]:
    """Those of one context together, as a worker sends them."""
    rng = random.Random(0)
    head = rng.choices(VOCABULARY, k=HEAD_TOKENS)
    context: list[int] = []
    for number in range(num_records):
        if number % share == 0:
            context = rng.choices(VOCABULARY, k=context_tokens)
        yield [*head, *context, *rng.choices(VOCABULARY, k=QUESTION_TOKENS)]


class Play:
    """A scheduler with as many waiting as a loop keeps, and answers of random lengths."""

    def __init__(self, limits: Limits, waiting: Iterator[list[int]]) -> None:
        self.scheduler = Scheduler(limits)
        self.finished = self.passes = self.passes_of_rows = 0
        self.seconds = {"submit": 0.0, "next_pass": 0.0, "release": 0.0}
        self._rng = random.Random(1)
        self._waiting = waiting
        self._left: dict[int, int] = {}

    def step(self) -> bool:
        """Fill up, one pass, release; False when no more prompts are left to fill up with."""
        limits = self.scheduler.limits
        while self.scheduler.num_waiting < LOOKAHEAD * limits.num_slots:
            prompt = next(self._waiting, None)
            if prompt is None:
                return False
            self._timed(self.scheduler.submit, b"", prompt)
        scheduled: Pass = self._timed(self.scheduler.next_pass)
        self.passes += 1
        self.passes_of_rows += not scheduled.runs
        for part in (*scheduled.rows, *scheduled.runs):
            if part.slot >= 0:
                self._take(part.slot)
        return True

    def _take(self, slot: int) -> None:
        """A token."""
        most = self.scheduler.limits.max_new_tokens
        self._left[slot] = self._left.get(slot) or self._rng.randint(most // 3, most)
        self._left[slot] -= 1
        if not self._left[slot]:
            self._timed(self.scheduler.release, slot)
            self.finished += 1

    def _timed(self, method: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        result = method(*args)
        self.seconds[method.__name__] += time.thread_time() - start
        return result


def measure(limits: Limits, context_tokens: int, share: int, num_records: int) -> str:
    waiting = num_records + (1 + LOOKAHEAD) * limits.num_slots
    play = Play(limits, prompts(waiting, context_tokens, share))
    while play.finished < limits.num_slots:
        play.step()
    play.seconds = dict.fromkeys(play.seconds, 0.0)
    before = play.finished
    play.passes = play.passes_of_rows = 0
    while play.step():
        pass
    per_record = 1e6 / (play.finished - before)
    parts = [f"{name} {seconds * per_record:6.1f}" for name, seconds in play.seconds.items()]
    return (
        f"{'  '.join(parts)}  all {sum(play.seconds.values()) * per_record:6.1f}"
        f"   {play.passes_of_rows}/{play.passes} passes of rows alone"
    )


def rows_alone(limits: Limits, share: int) -> float:
    """Seconds of a pass in which every slot decodes: the best of twenty."""
    scheduler = Scheduler(limits)
    for prompt in prompts(limits.num_slots, 512, share):
        scheduler.submit(b"", prompt)
    while scheduler.next_pass().runs:
        pass
    times = []
    for _ in range(20):
        start = time.thread_time()
        num_rows = len(scheduler.next_pass().rows)
        times.append(time.thread_time() - start)
        assert num_rows == limits.num_slots
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--pass_tokens", type=int, default=4096)
    parser.add_argument("--pool_tokens", type=int, default=400_000)
    parser.add_argument("--least_free", type=int, default=1)
    parser.add_argument("--records", type=int, default=768)
    args = parser.parse_args()
    limits = Limits(
        num_slots=args.slots,
        max_new_tokens=args.new_tokens * 3 // 2,  # lengths are even between a third and all of it
        pool_tokens=args.pool_tokens,
        pass_tokens=args.pass_tokens,
        least_free=args.least_free,
    )
    for context_tokens in (512, 4096):
        for share in (1, 4, 16):
            line = measure(limits, context_tokens, share, args.records)
            rows = rows_alone(limits, share) * 1e6
            print(f"{context_tokens:5} x{share:<2}  {line}   {rows:4.0f}", flush=True)


if __name__ == "__main__":
    main()
