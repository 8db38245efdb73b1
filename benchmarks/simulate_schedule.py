"""How near the bound the schedule comes: real chunks and claims, on a clock that is none.

    python benchmarks/simulate_schedule.py [--records 100000] [--json FILE]

Plans Zipf-shared contexts, then lets workers claim chunks by `ragfleet.claims.decide` until all is
done, one after the other on each worker. Nothing runs: seconds are cost divided by a worker's
speed. `simulate` is pure, so tests use it too.

What it leaves out: loading, requests in flight across two chunks, and an engine whose speed depends
on what it has in flight.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragfleet.claims import Board, Claim, Holder, decide
from ragfleet.index import GROUPING
from ragfleet.plan import (
    ANSWER_RATIO,
    CostModel,
    Plan,
    plan_dynamic,
    plan_static,
    static_slices,
)


@dataclass(frozen=True)
class Simulated:
    """One schedule. Times in units of cost at speed 1.

    Attributes:
        makespan: when the last worker ends.
        bound: no schedule could end before: all the work once, spread over all the speed there is,
            or the costliest single request on the fastest worker.
        busy: time of each worker with work.
        num_stolen: chunks claimed out of others' slices.
    """

    makespan: float
    bound: float
    busy: tuple[float, ...]
    num_stolen: int

    @property
    def over_bound(self) -> float:
        return self.makespan / self.bound - 1


def simulate(
    plan: Plan,
    grouping: NDArray[Any],
    actual: CostModel,
    answer_tokens: NDArray[np.float64] | None = None,
    *,
    speeds: Sequence[float],
    may_steal: bool = True,
) -> Simulated:
    """Let `len(speeds)` workers do a plan.

    Args:
        grouping: [num_records] of index.GROUPING, as planned with.
        actual: what the work costs in truth, whatever the plan believed.
        answer_tokens: [num_records] true lengths of the answers, in place of the model's average.
        speeds: cost done per unit of time by each worker.
    """
    prefix, own = actual.prefix(grouping, plan.order), actual.own(grouping, plan.order)
    if answer_tokens is not None:
        own += answer_tokens[plan.order] - actual.answer_tokens
    done = np.r_[0.0, np.cumsum(own + prefix * plan.leads)]
    costs = done[plan.chunks["stop"].astype(int)] - done[plan.chunks["start"].astype(int)]
    slices: list[list[int]] = [[] for _ in speeds]
    for chunk, worker in enumerate(plan.chunks["slice"].tolist()):
        slices[worker].append(chunk)
    board = Board(slices=slices, costs=plan.chunks["cost"].tolist())
    busy, num_stolen, makespan = [0.0] * len(speeds), 0, 0.0
    free = [(0.0, worker) for worker in range(len(speeds))]
    while free:
        now, worker = heapq.heappop(free)
        claim = decide(board, str(worker), worker, lambda owner: True, may_steal=may_steal)
        if not isinstance(claim, Claim):  # others hold the rest, and nobody dies here
            continue
        board.claims[claim.chunk] = (0, Holder(str(worker), "", 0))
        seconds = float(costs[claim.chunk]) / speeds[worker]
        busy[worker] += seconds
        num_stolen += claim.chunk not in slices[worker]
        makespan = max(makespan, now + seconds)
        heapq.heappush(free, (now + seconds, worker))
    assert len(board.claims) == len(costs) or not may_steal
    _, first = np.unique(grouping["group"][plan.order], return_index=True)
    least = float(own.sum() + prefix[first].sum())
    largest = float((own + prefix).max()) if len(own) else 0.0
    bound = max(least / sum(speeds), largest / max(speeds))
    return Simulated(makespan, bound, tuple(busy), num_stolen)


# ---- the workload


def zipf_contexts(
    num_records: int, num_contexts: int, exponent: float = 1.0, seed: int = 0, grouped: bool = False
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """(grouping, true answer tokens) of records whose contexts are as popular as Zipf says.

    Contexts of about 600 tokens, questions of 20; answers of 5 to 512 tokens, 80 on average.
    """
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_contexts + 1) ** exponent
    context = random.choice(num_contexts, num_records, p=weights / weights.sum())
    if grouped:
        context = np.sort(context)
    grouping = np.zeros(num_records, GROUPING)
    grouping["group"] = context + 1
    sizes = (random.lognormal(7.4, 0.6, num_contexts)).clip(50, 50_000)
    grouping["prefix_bytes"] = sizes[context]
    grouping["suffix_bytes"] = random.lognormal(4.2, 0.4, num_records)
    answers = random.lognormal(4.0, 0.8, num_records).clip(5, 512)
    return grouping, answers


def speeds_of(num_workers: int, slow: float = 1.0) -> list[float]:
    """The first worker is `slow` times slower than the others."""
    return [1.0 / slow, *[1.0] * (num_workers - 1)]


def rows(num_records: int, num_contexts: int, num_workers: int, seed: int) -> list[dict[str, Any]]:
    grouping, answers = zipf_contexts(num_records, num_contexts, seed=seed)
    everything = np.ones(num_records, bool)
    truth = CostModel(answer_tokens=float(answers.mean()))
    plans = {
        "dynamic, answers as long as max_new_tokens 512": (
            plan_dynamic(everything, grouping, num_workers, CostModel(answer_tokens=512)),
            True,
        ),
        "dynamic, answers of a quarter of that": (
            plan_dynamic(
                everything, grouping, num_workers, CostModel(answer_tokens=ANSWER_RATIO * 512)
            ),
            True,
        ),
        "dynamic, mean answer known": (
            plan_dynamic(everything, grouping, num_workers, truth),
            True,
        ),
        "dynamic, no stealing": (plan_dynamic(everything, grouping, num_workers, truth), False),
        "static": (
            plan_static(everything, grouping, static_slices(num_records, num_workers), truth),
            False,
        ),
    }
    found = []
    for name, (plan, may_steal) in plans.items():
        for slow in (1.0, 5.0):
            speeds = speeds_of(num_workers, slow)
            result = simulate(plan, grouping, truth, answers, speeds=speeds, may_steal=may_steal)
            found.append(
                {
                    "schedule": name,
                    "slow": slow,
                    "chunks": len(plan.chunks),
                    "over_bound": result.over_bound,
                    "second_prefills": plan.planned_cost / plan.least_cost - 1,
                    **asdict(result),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--contexts", type=int, default=12_500)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    found = rows(args.records, args.contexts, args.workers, args.seed)
    print(
        f"{args.records:,} records, {args.contexts:,} Zipf contexts, {args.workers} workers;"
        " makespan above the bound"
    )
    print(f"{'':<48}{'chunks':>8}{'all equal':>12}{'one 5 × slower':>16}")
    for name in dict.fromkeys(row["schedule"] for row in found):
        equal, slow = (row for row in found if row["schedule"] == name)
        print(
            f"{name:<48}{equal['chunks']:>8,}{equal['over_bound']:>12.2%}"
            f"{slow['over_bound']:>16.2%}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
