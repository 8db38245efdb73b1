"""How often, and on how many requests, the arms of `gpu.py` run.

Owns samples, turns and medians; the clock is handed in. In each round all arms answer the same
prompts, and in each round others, so that no cache knows them. Arms answer all of them, or as many
as `Arm.part` says: that is scaled to all by `gpu_work.work`. Before the first round each arm runs
on a part, which is not counted. Rounds that the time does not hold are left out, but for the first
of an arm, and `notes` say so. An arm that fails ends; the others go on.
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
WARM_PART: Final = 4
"""One in so many requests warms an arm up."""


class Arm(Protocol):
    name: str
    part: int | None
    """Requests that a run takes; None: all."""

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
    prompts: Sequence[Sequence[Prepared]]
    """All requests of the cell, those that warm up, then those of each round."""
    share: int
    count: int = 0
    """Requests of a round."""
    seconds: list[float] = field(default_factory=list)
    """Of each round, scaled to all requests."""
    expected_s: float = 0.0
    """That a round takes, by the last one."""
    answers: Answers = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    is_done: bool = False
    """It takes no further round."""

    @property
    def requests(self) -> Sequence[Prepared]:
        """Of the first round."""
        return self.prompts[1]

    @property
    def rounds(self) -> int:
        return len(self.prompts) - 1

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def is_sampled(self) -> bool:
        return self.count < len(self.requests)

    def warm_up(self) -> None:
        self._once(self.prompts[0], self.arm.part or len(self.prompts[0]) // WARM_PART)

    def round(self) -> float | None:
        """Seconds, scaled to all requests; None where the arm failed."""
        turn = 1 + len(self.seconds)
        prompts = self.prompts[turn]
        found = self._once(prompts, self.arm.part or len(prompts), turn)
        if found is None:
            return None
        seconds, self.count = found
        self.seconds.append(seconds)
        return seconds

    def _once(
        self, prompts: Sequence[Prepared], count: int, turn: int = 0
    ) -> tuple[float, int] | None:
        part = sample(prompts, count, self.arm.group(self.share), turn)
        try:
            seconds, answers = self.arm.run(part)
            check(part, answers)
        except Exception as error:  # an arm's library can raise anything; the others go on
            self.failed = True
            traceback.print_exc()
            self.notes.append(f"failed: {type(error).__name__}: {error}".splitlines()[0][:300])
            return None
        scale = work(prompts) / work(part)
        self.expected_s = seconds * (scale if self.arm.part is None else 1)
        self.answers |= answers
        return seconds * scale, len(part)


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
    until_s: float,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> None:
    """The rounds of all trials in turns, done by about `until_s` on `clock`."""
    for trial in trials:
        trial.arm.open(trial.prompts[0])
        trial.warm_up()
    for number in range(max(trial.rounds for trial in trials)):
        told = []
        for trial in trials:
            if trial.failed or trial.is_done or number >= trial.rounds:
                continue
            left_s = until_s - clock()
            if left_s <= 0 or (number and trial.expected_s > left_s):
                trial.notes.append(f"{number} of {trial.rounds} rounds: the time was over")
                trial.is_done = True
                continue
            seconds = trial.round()
            if seconds is not None:
                of = f" ({trial.count} requests)" if trial.is_sampled else ""
                told.append(f"{trial.arm.name} {seconds:.2f} s{of}")
        if told:
            say(f"  round {number + 1}: {', '.join(told)}\n")
    for trial in trials:
        trial.arm.close()


def ratio(of: Sequence[float], over: Sequence[float]) -> float | None:
    """How many times faster `of` is: the median over the rounds that both ran."""
    ratios = [b / a for a, b in zip(of, over, strict=False)]
    return statistics.median(ratios) if ratios else None
