"""Pure planning: which lines are selected, which requests they need, who answers them when.

Owns slices, leaders of duplicates, prefix groups, costs and chunks. No clock, no disk, no model:
arrays in, arrays out, so that a plan over millions of records can be tested and reasoned about.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ragfleet.index import Kind
from ragfleet.records import repeat_key

if TYPE_CHECKING:
    from ragfleet.engines.protocol import RequestOrder

CHUNKS_PER_WORKER: Final = 64
TAIL_SHARE: Final = 0.25
TAIL_SPLIT: Final = 4
"""The last quarter of the work stands in chunks of a quarter of the size: they come last, so little
is left to wait for when the first worker runs out. `benchmarks/simulate_schedule.py` compares."""

PIECE_PREFIXES: Final = 16
"""A group is cut into pieces of so many times its prefix's cost, so that prefilling it again costs
a sixteenth at most, while such a piece is less than a quarter of a worker's share."""
BYTES_PER_TOKEN: Final = 3.5
"""Where no tokenizer says better."""
ANSWER_RATIO: Final = 0.25
"""Length of an average answer by max_new_tokens, until a start of the run has shown it. Taking
max_new_tokens itself cuts groups much too small: far more prefill than the balance is worth."""

CHUNK: Final = np.dtype([("start", "<u8"), ("stop", "<u8"), ("slice", "<u4"), ("cost", "<f8")])
"""`order[start:stop]` are the requests of a chunk; chunks of a slice stand in claiming order."""


def static_slices(total: int, num_workers: int) -> list[range]:
    """Contiguous even slices of `range(total)`; the first `total % num_workers` get one more."""
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
    size, extra = divmod(total, num_workers)
    slices = []
    start = 0
    for worker in range(num_workers):
        stop = start + size + (worker < extra)
        slices.append(range(start, stop))
        start = stop
    return slices


def select(total: int, num_workers: int, max_samples_per_worker: int | None) -> list[range]:
    """The records to answer: the first `max_samples_per_worker` of each static slice."""
    return [part[:max_samples_per_worker] for part in static_slices(total, num_workers)]


def selected_mask(total: int, selected: list[range]) -> NDArray[np.bool_]:
    mask = np.zeros(total, dtype=bool)
    for part in selected:
        mask[part.start : part.stop] = True
    return mask


def find_leaders(
    records: NDArray[Any], selected: NDArray[np.bool_], distinct: bool
) -> NDArray[np.bool_]:
    """Tell equal keys apart or together, in place; return the mask of requests to generate.

    Not distinct: the first selected row of a key leads the others, and they take its answer.
    Distinct: the n-th further row of a key gets a key of its own (`repeat_key`), so each is one
    draw; n counts over the whole file, so that it does not depend on what is selected.
    """
    rows = np.flatnonzero(records["kind"] == Kind.SEND)
    hi, lo = records["key_hi"][rows], records["key_lo"][rows]
    order = np.lexsort((lo, hi))  # stable: rows of one key stay in file order
    rows, hi, lo = rows[order], hi[order], lo[order]
    is_repeat = np.r_[False, (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])][: len(rows)]
    requests: NDArray[np.bool_] = selected & (records["kind"] == Kind.SEND)
    repeats = np.flatnonzero(is_repeat)
    if not len(repeats):
        return requests
    run_start = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(rows))))
    if distinct:
        for position in repeats.tolist():
            base = join_key(int(hi[position]), int(lo[position]))
            key = repeat_key(base, position - int(run_start[position]))
            row = rows[position]
            records["key_hi"][row], records["key_lo"][row] = split_key(key)
        return requests
    chosen = np.flatnonzero(requests[rows])  # positions of selected rows, in order
    first_of_key = np.r_[True, run_start[chosen][1:] != run_start[chosen][:-1]][: len(chosen)]
    leader = chosen[np.maximum.accumulate(np.where(first_of_key, np.arange(len(chosen)), 0))]
    records["leader"][rows[chosen]] = rows[leader]
    requests[rows[chosen[~first_of_key]]] = False
    return requests


def split_key(key: bytes) -> tuple[int, int]:
    """16 key bytes as the two little-endian words of an index row."""
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def join_key(hi: int, lo: int) -> bytes:
    return hi.to_bytes(8, "little") + lo.to_bytes(8, "little")


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What requests cost, in prefill tokens; it only balances, it decides nothing."""

    answer_tokens: float
    """Length of an average answer."""
    bytes_per_token: float = BYTES_PER_TOKEN
    most_tokens: float = np.inf
    """Of a prompt that the model takes: longer ones fail, or are cut."""

    def prefix(self, grouping: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.float64]:
        """Cost of the part of each prompt that its group shares."""
        return self._tokens(grouping["prefix_bytes"][rows])

    def own(self, grouping: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.float64]:
        """Cost of the rest of each prompt, and of its answer."""
        return self._tokens(grouping["suffix_bytes"][rows]) + self.answer_tokens

    def _tokens(self, num_bytes: NDArray[Any]) -> NDArray[np.float64]:
        tokens: NDArray[np.float64] = np.minimum(num_bytes / self.bytes_per_token, self.most_tokens)
        return tokens


@dataclass(frozen=True)
class Plan:
    """Who does what. Costs are in prefill tokens.

    Attributes:
        order: [num_requests] u4, index rows in planned order.
        leads: [num_requests] bool, where in `order` the requests of another prefix group begin.
        chunks: [num_chunks] of CHUNK; the position is the chunk's number.
        num_groups: distinct prefixes among the requests.
        least_cost: of all requests, each distinct prefix counted once.
        planned_cost: of all chunks, a prefix counted in each chunk that needs it.
        answer_tokens: what each answer counts as.
        lower_bound_cost: no schedule can finish before one worker has done this much: an even
            share of `least_cost`, or the costliest single request.
    """

    order: NDArray[np.uint32]
    leads: NDArray[np.bool_]
    chunks: NDArray[Any]
    num_groups: int
    least_cost: float
    planned_cost: float
    answer_tokens: float
    lower_bound_cost: float

    def slice_costs(self, num_workers: int) -> list[float]:
        costs = np.bincount(
            self.chunks["slice"], weights=self.chunks["cost"], minlength=num_workers
        )
        return [float(cost) for cost in costs]


def plan_static(
    requests: NDArray[np.bool_], grouping: NDArray[Any], selected: list[range], costs: CostModel
) -> Plan:
    """The documented rule: each worker its contiguous slice in file order, cut into chunks."""
    orders, pieces, start = [], [], 0
    for worker, part in enumerate(selected):
        rows = part.start + np.flatnonzero(requests[part.start : part.stop])
        orders.append(rows)
        for piece in static_slices(len(rows), min(CHUNKS_PER_WORKER, max(len(rows), 1))):
            if len(piece):
                pieces.append((start + piece.start, start + piece.stop, worker, 0.0))
        start += len(rows)
    order = np.concatenate(orders) if orders else np.zeros(0, np.int64)
    chunks = np.array(pieces, dtype=CHUNK)
    _, first = np.unique(grouping["group"][order], return_index=True)
    return _costed(order, first, grouping, chunks, len(selected), costs)


def plan_dynamic(
    requests: NDArray[np.bool_], grouping: NDArray[Any], num_workers: int, costs: CostModel
) -> Plan:
    """Prefix groups kept together, cut into chunks of even cost, spread by LPT.

    Groups stand in order of first appearance, which keeps reads of the input near each other. A
    group is whole in one chunk unless it is larger than a chunk; then its prefix is counted once in
    each piece. LPT is Graham's rule (SIAM J. Appl. Math. 17, 1969): the costliest chunk to the
    least loaded slice. Chunks that shrink towards the end are the idea of guided self-scheduling
    (Polychronopoulos and Kuck, IEEE Trans. Comput. 36, 1987).
    """
    rows, starts = _by_group(np.flatnonzero(requests), grouping)
    if not len(rows):
        return _costed(rows, starts, grouping, np.zeros(0, CHUNK), num_workers, costs)
    begin = _cut(rows, starts, grouping, num_workers, costs)
    chunks = np.zeros(len(begin), CHUNK)
    chunks["start"], chunks["stop"] = begin, np.r_[begin[1:], len(rows)]
    plan = _costed(rows, starts, grouping, chunks, num_workers, costs)
    chunks = plan.chunks[np.argsort(-plan.chunks["cost"], kind="stable")]
    loads = [(0.0, worker) for worker in range(num_workers)]
    for chunk, cost in enumerate(chunks["cost"].tolist()):
        load, worker = loads[0]
        chunks["slice"][chunk] = worker
        heapq.heapreplace(loads, (load + cost, worker))
    return replace(plan, chunks=chunks)


def arrange(
    leads: NDArray[np.bool_], lengths: NDArray[Any], order: RequestOrder
) -> NDArray[np.intp]:
    """The permutation that brings a chunk's requests into the order an engine prefers.

    Args:
        leads: [n] where a prefix group begins, in the planned order (each group together).
        lengths: [n] of the requests, in any unit.
    """
    if order == "leader_first":
        return np.argsort(~leads, kind="stable")
    if order == "by_length":
        return np.argsort(-lengths.astype(np.int64), kind="stable")
    return np.arange(len(leads))


def _by_group(
    rows: NDArray[np.intp], grouping: NDArray[Any]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows with the members of each group together, and where in them each group starts."""
    group = grouping["group"][rows]
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(rows)])
    sizes = np.diff(np.r_[starts, len(rows)])
    # Each group as a run at its first appearance: runs in order of their first row.
    by_first = np.argsort(by_group[starts], kind="stable")
    moved = np.cumsum(sizes[by_first]) - sizes[by_first]
    source = np.repeat(starts[by_first] - moved, sizes[by_first]) + np.arange(len(rows))
    return rows[by_group[source]], moved


def _cut(
    rows: NDArray[np.intp],
    starts: NDArray[np.intp],
    grouping: NDArray[Any],
    num_workers: int,
    costs: CostModel,
) -> NDArray[np.intp]:
    """Where in `rows` the chunks begin."""
    sizes = np.diff(np.r_[starts, len(rows)])
    own, prefix = costs.own(grouping, rows), costs.prefix(grouping, rows[starts])
    own_of_group = np.add.reduceat(own, starts)
    share = float(own_of_group.sum() + prefix.sum()) / num_workers
    target = share / CHUNKS_PER_WORKER
    # Groups up to a chunk's size fill chunks one after the other, with smaller ones in the tail.
    before = np.cumsum(own_of_group + prefix) - (own_of_group + prefix)
    tail = (1 - TAIL_SHARE) * share * num_workers
    number = np.floor(np.minimum(before, tail) / target)
    number += np.floor(np.maximum(before - tail, 0) / (target / TAIL_SPLIT))
    # A larger one is alone, in even pieces that are worth prefilling its prefix again.
    is_large = own_of_group + prefix > target
    piece = np.minimum(PIECE_PREFIXES * prefix, np.clip(prefix, share / 4, share / 2))
    piece = np.maximum(target, piece)
    step = own_of_group / np.ceil(own_of_group / piece)
    own_before = np.cumsum(own) - own
    within = own_before - np.repeat(own_before[starts], sizes)
    number = np.where(
        np.repeat(is_large, sizes), within // np.repeat(step, sizes), np.repeat(number, sizes)
    )
    is_new = np.r_[True, number[1:] != number[:-1]]
    is_new[starts[is_large | np.r_[False, is_large[:-1]]]] = True
    return np.flatnonzero(is_new)


def _costed(
    rows: NDArray[np.intp],
    first: NDArray[np.intp],
    grouping: NDArray[Any],
    chunks: NDArray[Any],
    num_workers: int,
    costs: CostModel,
) -> Plan:
    """The plan of these chunks, with the costs filled in.

    Args:
        rows: [num_requests] in planned order.
        first: [num_groups] where in `rows` each group first appears.
    """
    if not len(rows):
        nothing = np.zeros(0, bool)
        return Plan(rows.astype(np.uint32), nothing, chunks, 0, 0.0, 0.0, costs.answer_tokens, 0.0)
    group = grouping["group"][rows]
    begin = chunks["start"].astype(np.intp)
    leads = np.r_[True, group[1:] != group[:-1]]
    leads[begin] = True
    prefix, own = costs.prefix(grouping, rows), costs.own(grouping, rows)
    chunks["cost"] = np.add.reduceat(own + prefix * leads, begin)
    least = float(own.sum() + prefix[first].sum())
    return Plan(
        order=rows.astype(np.uint32),
        leads=leads,
        chunks=chunks,
        num_groups=len(first),
        least_cost=least,
        planned_cost=float(chunks["cost"].sum()),
        answer_tokens=costs.answer_tokens,
        lower_bound_cost=max(least / num_workers, float((own + prefix).max())),
    )
