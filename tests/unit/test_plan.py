"""Pure planning: slices, leaders, groups and chunks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ragfleet.index import GROUPING, RECORD, Kind
from ragfleet.plan import (
    CHUNKS_PER_WORKER,
    PIECE_PREFIXES,
    TAIL_SHARE,
    TAIL_SPLIT,
    CostModel,
    Plan,
    arrange,
    find_leaders,
    join_key,
    plan_dynamic,
    plan_static,
    select,
    selected_mask,
    split_key,
    static_slices,
)
from ragfleet.records import repeat_key

counts = st.integers(1, 12)
limits = st.none() | st.integers(1, 9)

# ---- slices


@pytest.mark.parametrize(
    ("total", "num_workers", "sizes"),
    [
        (10, 4, [3, 3, 2, 2]),
        (8, 4, [2, 2, 2, 2]),
        (3, 5, [1, 1, 1, 0, 0]),
        (0, 2, [0, 0]),
        (1000, 3, [334, 333, 333]),
    ],
)
def test_the_first_workers_get_one_more(total: int, num_workers: int, sizes: list[int]) -> None:
    assert [len(part) for part in static_slices(total, num_workers)] == sizes


@given(st.integers(0, 10**7), st.integers(1, 300))
def test_static_slices_follow_the_documented_rule(total: int, num_workers: int) -> None:
    slices = static_slices(total, num_workers)
    assert len(slices) == num_workers
    assert slices[0].start == 0
    assert slices[-1].stop == total
    assert all(one.stop == other.start for one, other in pairwise(slices))
    even, more = divmod(total, num_workers)
    assert [len(part) for part in slices] == [even + 1] * more + [even] * (num_workers - more)


def test_no_worker_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_workers is 0"):
        static_slices(3, 0)


@given(st.integers(0, 200), counts, limits)
def test_selection_is_the_head_of_each_slice(
    total: int, num_workers: int, limit: int | None
) -> None:
    selected = select(total, num_workers, limit)
    chosen = set()
    for whole, part in zip(static_slices(total, num_workers), selected, strict=True):
        assert list(part) == list(whole)[:limit]
        chosen |= set(part)
    mask = selected_mask(total, selected)
    assert mask.shape == (total,)
    assert set(np.flatnonzero(mask).tolist()) == chosen


def test_the_documented_selection() -> None:
    assert [list(part) for part in select(10, 3, 2)] == [[0, 1], [4, 5], [7, 8]]


# ---- leaders


def records_of(keys: list[int | None]) -> NDArray[Any]:
    """Rows with these keys; None is a record that is not sent."""
    records = np.zeros(len(keys), RECORD)
    records["leader"] = np.arange(len(keys))
    for row, key in enumerate(keys):
        if key is None:
            records["kind"][row] = Kind.INVALID
        else:  # equal halves, so that both words have to be looked at
            records["key_hi"][row], records["key_lo"][row] = 7 + key // 2, key % 2
    return records


def keys_of(records: NDArray[Any]) -> list[bytes]:
    return [join_key(int(row["key_hi"]), int(row["key_lo"])) for row in records]


some_keys = st.lists(st.none() | st.integers(0, 5), max_size=30)


@given(some_keys, st.randoms(use_true_random=False))
def test_the_first_selected_row_of_a_key_leads(keys: list[int | None], random: Any) -> None:
    records = records_of(keys)
    selected = np.array([random.random() < 0.6 for _ in keys], dtype=bool)
    requests = find_leaders(records, selected, distinct=False)
    leaders: dict[int, int] = {}
    for row, key in enumerate(keys):
        if key is None or not selected[row]:
            assert not requests[row]
            continue
        leader = leaders.setdefault(key, row)
        assert records["leader"][row] == leader
        assert requests[row] == (leader == row)
    assert keys_of(records) == keys_of(records_of(keys))


@given(some_keys, st.randoms(use_true_random=False))
def test_distinct_repeats_have_keys_of_their_own_whatever_is_selected(
    keys: list[int | None], random: Any
) -> None:
    all_of_them = records_of(keys)
    requests = find_leaders(all_of_them, np.ones(len(keys), bool), distinct=True)
    sent = [row for row, key in enumerate(keys) if key is not None]
    assert np.flatnonzero(requests).tolist() == sent
    found = keys_of(all_of_them)
    assert len({found[row] for row in sent}) == len(sent)
    assert all_of_them["leader"].tolist() == list(range(len(keys)))
    seen: dict[int, int] = {}
    for row in sent:
        key = keys[row]
        assert key is not None
        base = join_key(7 + key // 2, key % 2)
        assert found[row] == repeat_key(base, seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
    some = records_of(keys)
    selected = np.array([random.random() < 0.5 for _ in keys], dtype=bool)
    requests = find_leaders(some, selected, distinct=True)
    assert keys_of(some) == found
    assert np.flatnonzero(requests).tolist() == [row for row in sent if selected[row]]


@given(st.binary(min_size=16, max_size=16))
def test_keys_split_and_join(key: bytes) -> None:
    assert join_key(*split_key(key)) == key
    assert np.array([split_key(key)], "<u8").tobytes() == key


# ---- plans


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray[np.bool_], NDArray[Any], int, CostModel]:
    """(requests, grouping, num_workers, costs), from a few to some hundred records."""
    total = draw(st.integers(0, 400))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    grouping = np.zeros(total, GROUPING)
    num_groups = draw(st.sampled_from([1, 3, 50, 400]))
    group = random.integers(0, num_groups, total)
    if draw(st.booleans()):
        group = np.sort(group)
    scale = draw(st.sampled_from([0, 10, 3000]))
    prefix = (random.pareto(1.2, num_groups) * scale).clip(0, 1e6).astype("<u4")
    grouping["group"] = group.astype("<u8") + np.uint64(2**63)
    grouping["prefix_bytes"] = prefix[group] if total else 0
    grouping["suffix_bytes"] = random.integers(0, draw(st.sampled_from([1, 100])), total)
    requests = random.random(total) < draw(st.sampled_from([0.3, 1.0]))
    costs = CostModel(answer_tokens=draw(st.sampled_from([0.25, 128.0])), bytes_per_token=2.5)
    return requests, grouping, draw(counts), costs


def is_partition(plan: Plan, requests: NDArray[np.bool_]) -> bool:
    pieces = sorted((int(start), int(stop)) for start, stop, *_ in plan.chunks.tolist())
    assert all(start < stop for start, stop in pieces), "no empty chunk"
    covered = [place for start, stop in pieces for place in range(start, stop)]
    return (
        covered == list(range(len(plan.order)))
        and sorted(plan.order.tolist()) == np.flatnonzero(requests).tolist()
    )


def cost_of(grouping: NDArray[Any], rows: NDArray[Any], costs: CostModel) -> float:
    """Written again by hand: suffixes and answers, and each group's prefix once."""
    total = 0.0
    for row in rows.tolist():
        total += int(grouping["suffix_bytes"][row]) / costs.bytes_per_token + costs.answer_tokens
    first = {int(grouping["group"][row]): int(grouping["prefix_bytes"][row]) for row in rows}
    return total + sum(first.values()) / costs.bytes_per_token


@given(problems())
@settings(max_examples=60)
def test_dynamic_chunks_partition_the_requests(problem: Any) -> None:
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    assert is_partition(plan, requests)
    assert plan.num_groups == len(np.unique(grouping["group"][requests]))
    if not len(plan.order):
        return
    assert plan.chunks["slice"].max() < num_workers
    found = plan.chunks["cost"]
    assert np.all(found[:-1] >= found[1:]), "costly ones first, small ones last"
    for start, stop, _, cost in plan.chunks.tolist():
        assert cost == pytest.approx(cost_of(grouping, plan.order[start:stop], costs))
        groups = grouping["group"][plan.order[start:stop]]
        assert plan.leads[start:stop].tolist() == [True, *(groups[1:] != groups[:-1]).tolist()]
    assert plan.least_cost == pytest.approx(cost_of(grouping, plan.order, costs))
    assert plan.planned_cost == pytest.approx(float(found.sum()))


@given(problems())
@settings(max_examples=60)
def test_a_group_stays_in_one_chunk_unless_it_is_larger_than_one(problem: Any) -> None:
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    rows = np.flatnonzero(requests)
    target = cost_of(grouping, rows, costs) / (num_workers * CHUNKS_PER_WORKER)
    groups = grouping["group"][plan.order]
    stands = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else []
    assert len(stands) == plan.num_groups, "records of a group stand together"
    first_rows = [int(plan.order[place]) for place in stands]
    assert first_rows == sorted(first_rows), "groups stand in order of first appearance"
    chunk_of = np.zeros(len(plan.order), int)
    for number, (start, stop, *_) in enumerate(plan.chunks.tolist()):
        chunk_of[start:stop] = number
    for group in np.unique(groups):
        mine = plan.order[groups == group]
        assert mine.tolist() == sorted(mine.tolist())
        chunks = set(chunk_of[groups == group].tolist())
        if cost_of(grouping, mine, costs) < target * (1 - 1e-9):
            assert len(chunks) == 1
        elif cost_of(grouping, mine, costs) > target * (1 + 1e-9):
            assert all(set(groups[chunk_of == chunk]) == {group} for chunk in chunks), "alone"


@given(problems(), limits)
@settings(max_examples=60)
def test_static_chunks_partition_the_requests_by_slice(problem: Any, limit: int | None) -> None:
    requests, grouping, num_workers, costs = problem
    selected = select(len(requests), num_workers, limit)
    requests = requests & selected_mask(len(requests), selected)
    plan = plan_static(requests, grouping, selected, costs)
    assert is_partition(plan, requests)
    assert plan.order.tolist() == sorted(plan.order.tolist()), "in file order"
    for start, stop, worker, _ in plan.chunks.tolist():
        assert all(int(row) in selected[worker] for row in plan.order[start:stop])
    for worker in range(num_workers):
        sizes = [int(c["stop"] - c["start"]) for c in plan.chunks[plan.chunks["slice"] == worker]]
        assert len(sizes) <= CHUNKS_PER_WORKER
        assert not sizes or max(sizes) - min(sizes) <= 1


@given(problems())
@settings(max_examples=60)
def test_no_slice_is_below_the_bound_and_lpt_is_near_it(problem: Any) -> None:
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    loads = plan.slice_costs(num_workers)
    assert len(loads) == num_workers
    assert plan.lower_bound_cost <= max(loads) * (1 + 1e-9)
    largest = float(plan.chunks["cost"].max()) if len(plan.order) else 0.0
    assert sum(loads) == pytest.approx(plan.planned_cost)
    # Graham: list scheduling is within (2 - 1/m) of the best, and what the best takes is at least
    # an even share and at least the largest chunk.
    best = max(sum(loads) / num_workers, largest)
    assert max(loads) <= sum(loads) / num_workers + largest * (1 + 1e-9)
    assert max(loads) <= (2 - 1 / num_workers) * best * (1 + 1e-9)
    selected = static_slices(len(requests), num_workers)
    static = plan_static(requests, grouping, selected, costs)
    assert static.lower_bound_cost <= max(static.slice_costs(num_workers)) * (1 + 1e-9)
    assert static.lower_bound_cost == pytest.approx(plan.lower_bound_cost), "of the work alone"
    assert static.least_cost == pytest.approx(plan.least_cost)


@given(problems())
@settings(max_examples=40)
def test_the_bound_counts_each_context_once(problem: Any) -> None:
    """However groups are cut, no schedule can do less than all of it once, or half a request."""
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    if len(plan.order):
        rows = np.flatnonzero(requests)
        largest = max(cost_of(grouping, np.array([row]), costs) for row in rows)
        once = cost_of(grouping, rows, costs)
        assert plan.lower_bound_cost == pytest.approx(max(once / num_workers, largest))


@given(problems())
@settings(max_examples=60)
def test_cutting_a_group_costs_little_prefill_or_was_needed(problem: Any) -> None:
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    groups = grouping["group"][plan.order]
    for group in np.unique(groups):
        rows = plan.order[groups == group]
        pieces = int(plan.leads[groups == group].sum())
        prefix = int(grouping["prefix_bytes"][rows[0]]) / costs.bytes_per_token
        own = cost_of(grouping, rows, costs) - prefix
        share = plan.least_cost / num_workers
        worth = max(share / CHUNKS_PER_WORKER, min(PIECE_PREFIXES * prefix, share / 4))
        assert pieces <= np.ceil(own / worth * (1 + 1e-9))


@given(problems(), st.sampled_from(["grouped", "leader_first", "by_length"]))
@settings(max_examples=60)
def test_a_chunk_is_arranged_for_its_engine(problem: Any, order: Any) -> None:
    requests, grouping, num_workers, costs = problem
    plan = plan_dynamic(requests, grouping, num_workers, costs)
    lengths = grouping["prefix_bytes"] + grouping["suffix_bytes"]
    for start, stop, *_ in plan.chunks.tolist():
        rows, leads = plan.order[start:stop], plan.leads[start:stop]
        place = arrange(leads, lengths[rows], order)
        assert sorted(place.tolist()) == list(range(stop - start))
        arranged = rows[place]
        groups = grouping["group"][arranged].tolist()
        if order == "grouped":
            assert arranged.tolist() == rows.tolist()
        elif order == "leader_first":
            num_groups = int(leads.sum())
            assert len(set(groups[:num_groups])) == num_groups, "one of each group, then the rest"
            rest = groups[num_groups:]
            assert sum(one != other for one, other in pairwise(rest)) < max(1, len(set(rest)))
        else:
            sizes = lengths[arranged].tolist()
            assert sizes == sorted(sizes, reverse=True)


def test_the_first_of_each_group_come_before_the_others() -> None:
    leads, lengths = np.array([True, False, True, False, False]), np.array([5, 1, 7, 7, 2])
    orders = [arrange(leads, lengths, order).tolist() for order in ("leader_first", "by_length")]
    assert orders == [[0, 2, 1, 3, 4], [2, 3, 0, 4, 1]]


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_many_records_are_spread_within_a_percent(num_workers: int) -> None:
    random = np.random.default_rng(0)
    grouping = np.zeros(20_000, GROUPING)
    grouping["group"] = np.arange(20_000) // 5
    grouping["prefix_bytes"] = np.repeat(random.lognormal(7, 1, 4_000), 5)
    grouping["suffix_bytes"] = random.integers(20, 200, 20_000)
    plan = plan_dynamic(np.ones(20_000, bool), grouping, num_workers, CostModel(answer_tokens=16))
    assert max(plan.slice_costs(num_workers)) < 1.01 * plan.lower_bound_cost
    expected = num_workers * CHUNKS_PER_WORKER * (1 - TAIL_SHARE + TAIL_SHARE * TAIL_SPLIT)
    assert 0.8 * expected < len(plan.chunks) < 1.5 * expected


def test_one_huge_context_is_cut_and_its_second_prefill_counted() -> None:
    grouping = np.zeros(100, GROUPING)
    grouping["prefix_bytes"], grouping["suffix_bytes"] = 6_000, 100
    costs = CostModel(answer_tokens=10, bytes_per_token=1)
    plan = plan_dynamic(np.ones(100, bool), grouping, 2, costs)
    assert plan.num_groups == 1
    assert len(plan.chunks) == 3, "pieces of at most half a share, so that two workers have some"
    own = 100 * (100 + 10)
    assert plan.planned_cost == pytest.approx(own + 6_000 * 3)
    assert plan.lower_bound_cost == pytest.approx((own + 6_000) / 2)


def test_a_context_that_costs_more_than_its_questions_is_not_prefilled_for_each() -> None:
    grouping = np.zeros(100, GROUPING)
    grouping["prefix_bytes"], grouping["suffix_bytes"] = 5_000, 20
    costs = CostModel(answer_tokens=10, bytes_per_token=1)
    plan = plan_dynamic(np.ones(100, bool), grouping, 8, costs)
    assert len(plan.chunks) <= 8
    assert max(plan.slice_costs(8)) < 0.8 * plan.least_cost


def test_nothing_to_do_is_a_plan_too() -> None:
    nothing = np.zeros(3, bool)
    grouping = np.zeros(3, GROUPING)
    for plan in (
        plan_dynamic(nothing, grouping, 2, CostModel(answer_tokens=8)),
        plan_static(nothing, grouping, static_slices(3, 2), CostModel(answer_tokens=8)),
    ):
        assert len(plan.order) == len(plan.chunks) == plan.num_groups == 0
        assert plan.slice_costs(2) == [0.0, 0.0]
        assert plan.lower_bound_cost == 0.0
