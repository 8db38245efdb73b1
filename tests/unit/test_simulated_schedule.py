"""The schedule on a simulated clock: how near the bound it ends, and what a slow worker costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragfleet.index import GROUPING
from ragfleet.plan import CostModel, Plan, plan_dynamic, plan_static, static_slices
from simulate_schedule import Simulated, simulate, speeds_of, zipf_contexts


def planned(num_records: int, num_workers: int, answer_tokens: float = 80.0) -> tuple[Plan, Any]:
    grouping, answers = zipf_contexts(num_records, num_records // 8)
    costs = CostModel(answer_tokens=answer_tokens)
    return plan_dynamic(np.ones(num_records, bool), grouping, num_workers, costs), (
        grouping,
        answers,
    )


def done_by(plan: Plan, workload: Any, speeds: list[float], may_steal: bool = True) -> Simulated:
    grouping, answers = workload
    truth = CostModel(answer_tokens=float(answers.mean()))
    return simulate(plan, grouping, truth, answers, speeds=speeds, may_steal=may_steal)


def test_zipf_contexts_on_eight_workers_end_within_two_percent_of_the_bound() -> None:
    plan, workload = planned(50_000, 8)
    assert done_by(plan, workload, speeds_of(8)).over_bound < 0.02


def test_one_worker_five_times_slower_costs_little() -> None:
    plan, workload = planned(50_000, 8)
    result = done_by(plan, workload, speeds_of(8, slow=5.0))
    assert result.over_bound < 0.05
    assert result.num_stolen > 0
    alone = done_by(plan, workload, speeds_of(8, slow=5.0), may_steal=False)
    assert alone.over_bound > 2.0, "without stealing all wait for it"


def test_answers_of_a_quarter_of_what_was_planned_do_not_matter_much() -> None:
    plan, workload = planned(50_000, 8, answer_tokens=320.0)
    assert done_by(plan, workload, speeds_of(8)).over_bound < 0.05


def test_static_slices_of_scattered_contexts_prefill_them_again_and_again() -> None:
    grouping, answers = zipf_contexts(20_000, 2_500)
    costs = CostModel(answer_tokens=80)
    plan = plan_static(np.ones(20_000, bool), grouping, static_slices(20_000, 8), costs)
    result = done_by(plan, (grouping, answers), speeds_of(8), may_steal=False)
    assert result.over_bound > 1.0


@given(st.integers(1, 300), st.integers(1, 9), st.floats(1, 50), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_no_schedule_is_below_the_bound(
    num_records: int, num_workers: int, slow: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    grouping = np.zeros(num_records, GROUPING)
    grouping["group"] = random.integers(0, 20, num_records)
    grouping["prefix_bytes"] = grouping["group"] * 100
    grouping["suffix_bytes"] = random.integers(0, 100, num_records)
    costs = CostModel(answer_tokens=3)
    plan = plan_dynamic(np.ones(num_records, bool), grouping, num_workers, costs)
    result = simulate(plan, grouping, costs, speeds=speeds_of(num_workers, slow))
    assert result.makespan >= result.bound * (1 - 1e-9)
    assert max(result.busy) <= result.makespan * (1 + 1e-9)
    if slow == 1.0:
        assert sum(result.busy) == pytest.approx(plan.planned_cost)
