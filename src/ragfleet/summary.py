"""What a run comes to: counts that add up, per worker and in all. Printing is monitor's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragfleet.beats import Beat
from ragfleet.records import decode_object

if TYPE_CHECKING:
    from ragfleet.estimates import Prefill


@dataclass(slots=True)
class WorkerStatistics:
    """Requests whose counting answer stands in the shards of one rank. Times in seconds."""

    rank: int
    succeeded: int = 0
    failed: int = 0
    inference_time_s: float = 0.0
    """Sum over successes."""
    shards: list[str] = field(default_factory=list)

    @property
    def processed(self) -> int:
        return self.succeeded + self.failed

    @property
    def mean_inference_time_s(self) -> float:
        return self.inference_time_s / self.succeeded if self.succeeded else 0.0


@dataclass(slots=True)
class MergeStatistics:
    """What stands in the output.

    `rows == succeeded + failed == generated + duplicates + not_sent`.
    """

    rows: int = 0
    succeeded: int = 0
    failed: int = 0
    generated: int = 0
    """Rows with an outcome of their own."""
    duplicates: int = 0
    """Rows that took the outcome of an equal request."""
    not_sent: int = 0
    """Invalid records and failed contexts."""
    dropped: int = 0
    """Failed contexts left out by --failed_contexts drop."""
    missing: int = 0
    """Selected records without an outcome; above 0 only in a partial merge."""
    errors: dict[str, int] = field(default_factory=dict)
    """Failure rows by error_type."""
    cut_at_max_new_tokens: int = 0
    empty_answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    workers: dict[int, WorkerStatistics] = field(default_factory=dict)


@dataclass(slots=True)
class Generation:
    """What became of the plan, in this start."""

    num_workers: int = 0
    makespan_s: float = 0.0
    """The longest that a worker took from its loaded model to its last answer."""
    busy_s: float = 0.0
    """Time with something in flight, of all workers together."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those whose prefill was there already."""
    uncounted: int = 0
    """Answers whose engine did not say."""
    degraded: list[str] = field(default_factory=list)
    """Why engines worked slower than they could, each reason once."""

    @property
    def lower_bound_s(self) -> float:
        """No worker idle: the work that was done, evenly spread."""
        return self.busy_s / self.num_workers if self.num_workers else 0.0


def generation_of(beats: Iterable[Beat]) -> Generation:
    """What the workers of this start say of themselves, those that died among them."""
    generation = Generation()
    ranks = set()
    for beat in beats:
        ranks.add(beat.owner.partition(".")[0])
        generation.makespan_s = max(generation.makespan_s, beat.span_s)
        generation.busy_s += beat.busy_s
        generation.prompt_tokens += beat.prompt_tokens
        generation.cached_tokens += beat.cached_tokens
        generation.uncounted += beat.uncounted
        if beat.degraded is not None and beat.degraded not in generation.degraded:
            generation.degraded.append(beat.degraded)
    generation.num_workers = len(ranks)
    return generation


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The result of `run`."""

    output_file: Path
    num_lines: int
    """Records in the contexts file."""
    num_selected: int
    statistics: MergeStatistics
    answered_now: int = 0
    """Requests finished in this start."""
    resumed: int = 0
    """Requests that earlier starts had finished."""
    superfluous: int = 0
    """Finished lines in the shards that no current record asks for."""
    stolen_chunks: int = 0
    restarts: int = 0
    wall_s: float = 0.0
    """From the start of this run to its merged output."""
    prefill: Prefill | None = None
    """What was expected; None where prompts are not known beforehand."""
    generation: Generation = field(default_factory=Generation)
    fail_on_errors: bool = False
    cost: float | None = None
    """Of the answers in the output, by --price_in and --price_out."""

    @property
    def exit_code(self) -> int:
        return 3 if self.fail_on_errors and self.statistics.failed else 0

    def results(self) -> Iterator[dict[str, Any]]:
        """The rows of the output, one by one."""
        with open(self.output_file, "rb") as file:
            for line in file:
                yield decode_object(line)
