"""A pass of the scheduler as tensors for kernels that take many ranges in one call.

Owns where each token's key and value go, and which ranges each token sees: its own part (what
stands in its slot up to itself, or its run's and what is before it in the same stretch of the pool)
and, level by level, the shared nodes before that. The whole is merged at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch

from ragfleet.engines.shared_prefix.attention import Probing, unchecked
from ragfleet.engines.shared_prefix.passes import Read, joined
from ragfleet.engines.shared_prefix.scheduler import Pass, Range, Row, Run
from ragfleet.engines.shared_prefix.varlen import (
    BLOCK_QUERIES,
    Kernels,
    Levels,
    Ranges,
    attend_levels,
)
from ragfleet.engines.shared_prefix.varlen_cache import VarlenCache

Piece = tuple[int, int, Sequence[Range]]
"""(first, one past last) token, and the nodes that they see."""
_NOTHING = Range(0, 0)
_nodes = itemgetter(2)


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive tokens of a pass that go through the kernels together."""

    num_tokens: int
    are_rows: bool
    """One token each; else runs."""
    own: Ranges
    levels: Ranges | None
    """See `varlen.attend_levels`. None: they see nothing but their own."""
    absent: torch.Tensor
    """[levels, tokens]: see `varlen.Levels`."""


class VarlenPass:
    """One forward; see `forward.Readable`."""

    def __init__(
        self,
        kernels: Kernels,
        cache: VarlenCache,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        written: torch.Tensor,
        parts: Sequence[Part],
        logit_rows: torch.Tensor,
        slots: list[int],
        copies: torch.Tensor | None = None,
        probe: Probing | None = None,
    ) -> None:
        """`parts`: all tokens in order. `written` and `copies`: see `VarlenCache.write`."""
        self.check = unchecked if probe is None else probe.check
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.logit_rows = logit_rows
        self.slots = slots
        self.num_tokens = input_ids.shape[1]
        self._kernels = kernels
        self._cache = cache
        self._written = written
        self._copies = copies
        self._parts = parts

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """See `attention.Attending`. Keys and values first: runs of a pass see each other."""
        keys, values = self._cache.write(layer, key, value, self._written, self._copies)
        queries = query.split([part.num_tokens for part in self._parts])
        found = [
            self._attend_part(asked, keys, values, part, scaling)
            for asked, part in zip(queries, self._parts, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _attend_part(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Part,
        scaling: float,
    ) -> torch.Tensor:
        kernels, shared = self._kernels, None
        if part.levels is not None:
            found = attend_levels(
                kernels.ranges, query, keys, values, part.levels, len(part.absent), scaling
            )
            shared = Levels(*found, part.absent)
        if part.are_rows and kernels.rows is not None:
            return kernels.rows(query, keys, values, part.own, shared, scaling)
        own = kernels.ranges(query, keys, values, part.own, scaling)
        return own[0] if shared is None else kernels.merge(shared, own)


def packed_pass(
    kernels: Kernels,
    scheduled: Pass,
    last_tokens: Mapping[int, int],
    cache: VarlenCache,
    probe: Probing | None = None,
) -> VarlenPass:
    """`last_tokens`: by slot, the token that a decoding row feeds.

    In three parts, for the kernels launch as many blocks for each range as the longest needs: rows
    (one token each), slots' runs (short), nodes' runs.
    """
    rows = scheduled.rows
    in_slots = [run for run in scheduled.runs if run.slot >= 0]
    of_nodes = [run for run in scheduled.runs if run.slot < 0]
    pieces: list[Row | Run] = [*rows, *in_slots, *of_nodes]
    ids = [last_tokens[row.slot] for row in rows]
    for run in (*in_slots, *of_nodes):
        ids += run.token_ids
    parts = [
        [_view_of_row(row, cache) for row in rows],
        [_view_of_run(run, cache) for run in in_slots],
        [_view_of_run(run, cache) for run in of_nodes],
    ]
    # The tokens of a row or a run have consecutive positions and consecutive places.
    counts = np.array([count for part in parts for count, _, _ in part])
    stops = counts.cumsum()
    positions = np.array([piece.position for piece in pieces]) + counts - stops
    places = np.array([own.offset + own.length for part in parts for _, own, _ in part]) - stops
    tokens = np.arange(len(ids))
    num_slots = len(rows) + len(in_slots)
    device = cache.device
    return VarlenPass(
        kernels,
        cache,
        input_ids=torch.tensor(np.array([ids]), device=device),
        position_ids=torch.tensor((tokens + positions.repeat(counts))[None], device=device),
        written=torch.tensor(tokens + places.repeat(counts), device=device),
        parts=[
            _part_of(part, cache, are_rows=number == 0) for number, part in enumerate(parts) if part
        ],
        # Without any, the first: an empty product is not worth a special case in every layer.
        logit_rows=torch.tensor(stops[:num_slots] - 1 if num_slots else [0], device=device),
        slots=[row.slot for row in rows] + [run.slot for run in in_slots],
        copies=_copies_of(in_slots, cache),
        probe=probe,
    )


View = tuple[int, Range, Sequence[Range]]
"""How many tokens; the places of their own part, which ends with them; nodes before that."""


def _view_of_row(row: Row, cache: VarlenCache) -> View:
    return 1, Range(cache.place(row.slot), row.column + 1), row.reads


def _view_of_run(run: Run, cache: VarlenCache) -> View:
    """A node's own part goes as far back as it stands in one stretch of the pool."""
    count = len(run.token_ids)
    if run.slot >= 0:
        return count, Range(cache.place(run.slot), run.copied_tokens + count), run.reads
    *before, own = joined((*run.reads, Range(run.pool_offset, count)))
    return count, own, before


def _part_of(views: Sequence[View], cache: VarlenCache, *, are_rows: bool) -> Part:
    pieces: list[Piece] = []
    at = 0
    for count, _, before in views:
        pieces.append((at, at + count, before))
        at += count
    levels = in_blocks(level_reads(pieces, at), block_tokens(cache.group))
    own = [(count, range_.offset, range_.length) for count, range_, _ in views]
    return Part(
        num_tokens=at,
        are_rows=are_rows,
        own=Ranges.of(own, cache.device, causal=True),
        levels=Ranges.of(asked_in(levels, cache.group), cache.device) if levels else None,
        absent=torch.tensor(absent_in(levels, at), device=cache.device),
    )


def asked_in(levels: Sequence[Sequence[Read]], group: int) -> list[tuple[int, int, int]]:
    """(queries, first key, keys) of each range: see `varlen.attend_levels`."""
    return [
        ((stop - start) * group, range_.offset, range_.length)
        for reads in levels
        for start, stop, range_ in reads
    ]


def absent_in(levels: Sequence[Sequence[Read]], num_tokens: int) -> npt.NDArray[np.bool_]:
    """[levels, tokens]: see `varlen.Levels`."""
    absent = np.zeros((len(levels), num_tokens), dtype=np.bool_)
    for of_level, reads in zip(absent, levels, strict=True):
        for start, stop, range_ in reads:
            if not range_.length:
                of_level[start:stop] = True
    return absent


def level_reads(pieces: Sequence[Piece], num_tokens: int) -> list[list[Read]]:
    """Per level of the prefix tree, all tokens in order: neighbours with the same range together,
    and those without one with a range of nothing."""
    levels: list[list[Read]] = []
    for ranges, neighbours in groupby(pieces, key=_nodes):
        alike = list(neighbours)
        for level, range_ in enumerate(ranges):
            if level == len(levels):
                levels.append([])
            _append(levels[level], alike[0][0], alike[-1][1], range_)
    for reads in levels:
        if reads[-1][1] < num_tokens:
            reads.append((reads[-1][1], num_tokens, _NOTHING))
    return levels


def block_tokens(group: int) -> int:
    """Tokens whose queries of a level, `group` each, fill a block of the kernel."""
    return max(1, BLOCK_QUERIES // group)


def in_blocks(levels: Sequence[Sequence[Read]], most_tokens: int) -> list[list[Read]]:
    """The same for the same tokens, no more than `most_tokens` of them at a time: what all share
    would else cost every other range as many blocks as it needs itself."""
    return [
        [
            (at, min(at + most_tokens, stop), range_)
            for start, stop, range_ in reads
            for at in range(start, stop, most_tokens)
        ]
        for reads in levels
    ]


def _append(reads: list[Read], start: int, stop: int, range_: Range) -> None:
    end = reads[-1][1] if reads else 0
    if end < start:
        reads.append((end, start, _NOTHING))
    if reads and reads[-1][1:] == (start, range_):
        reads[-1] = (reads[-1][0], stop, range_)
    else:
        reads.append((start, stop, range_))


def _copies_of(runs: Sequence[Run], cache: VarlenCache) -> torch.Tensor | None:
    """Places (from, to) of the tokens that runs take over from other slots. All are copied at once,
    so what a source takes over in the same pass comes from where that one gets it."""
    sources: dict[int, list[int]] = {}
    targets: list[int] = []
    for run in runs:
        if run.copied_tokens:
            places = [cache.place(run.copied_from, column) for column in range(run.copied_tokens)]
            taken = sources.get(run.copied_from, [])[: run.copied_tokens]
            sources[run.slot] = taken + places[len(taken) :]
            targets += [cache.place(run.slot, column) for column in range(run.copied_tokens)]
    if not targets:
        return None
    origins = [place for places in sources.values() for place in places]
    return torch.tensor([origins, targets], device=cache.device)
