"""How often, and on how many requests, the arms of `gpu.py` run within the time there is.

Owns samples, turns and medians; the clock is handed in. An arm first runs on few requests and then
on more, as far as its time allows: that warms it up too. Then all arms take turns, each on its own
sample, whose time is scaled to all requests by `gpu_work.work`. What does not fit is left out, and
`notes` say so. An arm that fails ends; the others go on.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from gpu_work import sample, work
from ragfleet.engines.protocol import Prepared

Answers = dict[bytes, list[int]]
GROWTH: Final = 4
"""So many times more requests in the next try."""
FIRST_GROWTH: Final = 2
"""So many times longer GROWTH times more should take, before one knows."""
NEARLY: Final = 1.2
"""So many times longer than it may take is near enough."""
COLD: Final = 4
"""So many times longer, and a size is not tried again."""


class Arm(Protocol):
    name: str
    least: int
    """Requests that a run takes at least."""
    weight: float
    """Its part of a cell's time, beside those of the others."""

    def group(self, share: int) -> int:
        """Of how many requests side by side a sample is made, where `share` have a context."""
        ...

    def open(self, requests: Sequence[Prepared]) -> None:
        """Before the first run of a cell that has these requests."""
        ...

    def close(self) -> None:
        """After its last run: give back what `open` and runs took."""
        ...

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        """Seconds that count, and generated ids. May take longer than that: what a first run
        builds does not count. Raises what it likes."""
        ...


@dataclass
class Trial:
    """An arm in a cell."""

    arm: Arm
    requests: Sequence[Prepared]
    share: int
    clock: Callable[[], float]
    count: int = 0
    """Requests of its sample."""
    seconds: list[float] = field(default_factory=list)
    """Of each round, scaled to all requests."""
    rough_s: float = 0.0
    """Of the last run that looked for the sample."""
    wall_s: float = 0.0
    """That its last run took, with what does not count."""
    answers: Answers = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    is_done: bool = False
    """It takes no further round."""

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def is_sampled(self) -> bool:
        return self.count < len(self.requests)

    def once(self, count: int, turn: int = 0) -> float | None:
        """Run on about `count` requests; scaled seconds, or None where the arm failed."""
        part = sample(self.requests, count, self.arm.group(self.share), turn)
        started = self.clock()
        try:
            seconds, answers = self.arm.run(part)
            check(part, answers)
        except Exception as error:  # an arm's library can raise anything; the others go on
            self.failed = True
            traceback.print_exc()
            self.notes.append(f"failed: {type(error).__name__}: {error}".splitlines()[0][:300])
            return None
        self.wall_s = self.clock() - started
        self.count = len(part)
        self.answers |= answers
        return seconds * work(self.requests) / work(part)

    def grow(self, limit_s: float) -> None:
        """Find the largest sample that runs within `limit_s`.

        Four times more are tried where they should fit, judged by how much longer the last four
        times took: batches cost far less than that, until they are full. A size that takes too
        long is tried once more: first runs also build what later ones find built. A sample that
        can't be made smaller counts as a round at once.
        """
        group = self.arm.group(self.share)
        count, is_again, growth, before_s = self.arm.least, False, FIRST_GROWTH, None
        while (seconds := self.once(count)) is not None:
            self.rough_s = seconds
            if before_s is not None:
                growth = max(1.0, self.wall_s / before_s)
            before_s = None
            fitting = min(len(self.requests), int(self.count * limit_s / max(self.wall_s, 1e-9)))
            if self.is_sampled and self.wall_s * growth <= NEARLY * limit_s:
                before_s, is_again = self.wall_s, False
                count = min(len(self.requests), GROWTH * self.count)
            elif not is_again and NEARLY * limit_s < self.wall_s < COLD * limit_s:
                is_again = True
            else:
                break
        if self.failed:
            return
        if fitting < max(self.arm.least, group):
            self.seconds.append(self.rough_s)
            self.is_done = True
            self.notes.append("its smallest sample took more than its part of the time: one round")
        self.count = max(self.arm.least, fitting // group * group, group)


def check(requests: Sequence[Prepared], answers: Answers) -> None:
    """Raises ValueError unless each answer is as long as it was asked to be."""
    for request in requests:
        wanted = request.request.record["answer_tokens"]
        found = len(answers.get(request.key, ()))
        if found != wanted:
            raise ValueError(f"an answer of {found} tokens where {wanted} were asked for")


def measure(
    trials: Sequence[Trial],
    *,
    rounds: int,
    until_s: float,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """`rounds` of all trials in turns, done by about `until_s` on `clock`."""
    for trial in trials:
        trial.arm.open(trial.requests)
    weights = sum(trial.arm.weight for trial in trials)
    whole_s = until_s - clock()
    for trial in trials:  # growing takes about as long as a round or two more
        trial.grow(whole_s * trial.arm.weight / weights / (rounds + 1.5))
    for number in range(rounds):
        say(f"  round {number + 1}:")
        for trial in trials:
            if trial.failed or trial.is_done:
                continue
            if trial.wall_s > until_s - clock():
                trial.notes.append(f"{number} of {rounds} rounds: the time was over")
                trial.is_done = True
                if not number:
                    trial.seconds.append(trial.rough_s)
                continue
            seconds = trial.once(trial.count, turn=number)
            if seconds is not None:
                trial.seconds.append(seconds)
                of = f" ({trial.count} requests)" if trial.is_sampled else ""
                say(f" {trial.arm.name} {seconds:.2f} s{of}{'' if trial is trials[-1] else ','}")
        say("\n")
    for trial in trials:
        trial.arm.close()


def ratio(of: Trial, over: Trial) -> float | None:
    """How many times faster `of` is: the median over the rounds that both ran."""
    ratios = [b / a for a, b in zip(of.seconds, over.seconds, strict=False)]
    return statistics.median(ratios) if ratios else None
