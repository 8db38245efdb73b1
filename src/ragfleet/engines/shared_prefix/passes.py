"""A pass of the scheduler as tensors: ids, positions, and each layer's attention.

Owns how keys and values are written and which queries are computed together: decoding slots that
stand on one range ask it in one call, with all their heads stacked; what is in the slots themselves
is one batched product; the parts are merged. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from ragfleet.engines.shared_prefix.attention import (
    MASKED,
    Probing,
    attend_part,
    batched_part,
    causal_blocks,
    merge,
    unchecked,
)
from ragfleet.engines.shared_prefix.cache import KeyValueCache
from ragfleet.engines.shared_prefix.scheduler import Pass, Range, Row, Run

Read = tuple[int, int, Range]
"""(first, one past last) token of a pass that see a range of the pool."""
LONG_RUN: Final = 64
"""Tokens of a node that are worth products of their own, without parts to be merged."""


def row_reads(rows: Sequence[Row]) -> list[list[Read]]:
    """Per level of the prefix tree, neighbouring rows with the same range together."""
    levels: list[list[Read]] = []
    for index, row in enumerate(rows):
        for level, range_ in enumerate(row.reads):
            if level == len(levels):
                levels.append([])
            reads = levels[level]
            if reads and reads[-1][1:] == (index, range_):
                reads[-1] = (reads[-1][0], index + 1, range_)
            else:
                reads.append((index, index + 1, range_))
    return levels


def run_reads(runs: Sequence[Run], starts: Sequence[int]) -> list[Read]:
    """The same for runs, whose parts are merged one by one."""
    reads: list[Read] = []
    open_reads: dict[Range, int] = {}
    for run, start in zip(runs, starts, strict=True):
        stop = start + len(run.token_ids)
        following: dict[Range, int] = {}
        for range_ in run.reads:
            index = open_reads.get(range_)
            if index is None or reads[index][1] != start:  # tokens of others stand in between
                index = len(reads)
                reads.append((start, stop, range_))
            else:
                reads[index] = (reads[index][0], stop, range_)
            following[range_] = index
        open_reads = following
    return reads


def joined(ranges: Sequence[Range]) -> list[Range]:
    """The same tokens in as few ranges as they stand in side by side."""
    found: list[Range] = []
    for range_ in ranges:
        if found and found[-1].offset + found[-1].length == range_.offset:
            found[-1] = Range(found[-1].offset, found[-1].length + range_.length)
        else:
            found.append(range_)
    return found


class TensorPass:
    """One forward. `logit_rows`: tokens whose logits are wanted, in the order of `slots`."""

    def __init__(
        self,
        scheduled: Pass,
        last_tokens: Mapping[int, int],
        cache: KeyValueCache,
        probe: Probing | None = None,
    ) -> None:
        """`last_tokens`: by slot, the token that a decoding row feeds."""
        self.check = unchecked if probe is None else probe.check
        self.long_run = LONG_RUN if probe is None else probe.long_run
        rows, runs = scheduled.rows, scheduled.runs
        device = cache.pool.device
        self._cache = cache
        self._num_rows = len(rows)
        ids = [last_tokens[row.slot] for row in rows]
        positions = [row.position for row in rows]
        self._runs: list[tuple[int, int, Run]] = []
        logit_rows = list(range(len(rows)))
        self.slots = [row.slot for row in rows]
        for run in runs:
            start = len(ids)
            ids += run.token_ids
            positions += range(run.position, run.position + len(run.token_ids))
            self._runs.append((start, len(ids), run))
            if run.slot >= 0:
                logit_rows.append(len(ids) - 1)
                self.slots.append(run.slot)
                cache.clean(run.slot)
        self.num_tokens = len(ids)
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        # Without any, the first: an empty product is not worth a special case in every layer.
        self.logit_rows = torch.tensor(logit_rows or [0], device=device)
        self._row_reads = row_reads(rows)
        short = [one for one in self._runs if not self._is_long(one[2])]
        self._short_runs = short
        self._short_reads = run_reads(
            [run for _, _, run in short], [start for start, _, _ in short]
        )
        self._long_runs = [
            (start, stop, joined((*run.reads, Range(run.pool_offset, stop - start))))
            for start, stop, run in self._runs
            if self._is_long(run)
        ]
        # Nobody sees what the last layer makes of a node's tokens.
        own = [(start, stop, run) for start, stop, run in self._runs if run.slot >= 0]
        self._last_runs = own
        self._last_reads = run_reads([run for _, _, run in own], [start for start, _, _ in own])
        if rows:
            self._lay_out_slots(rows, device)

    def _lay_out_slots(self, rows: Sequence[Row], device: torch.device) -> None:
        heads, room = self._cache.slots.shape[3:5]
        num_slots = max(row.slot for row in rows) + 1
        lengths, row_of_slot = [0] * num_slots, [0] * num_slots  # a free slot asks what row 0 asks
        for number, row in enumerate(rows):
            lengths[row.slot] = row.column + 1
            row_of_slot[row.slot] = number
        for slot in range(num_slots):
            self._cache.clean(slot)
        self._num_slots, self._places = num_slots, max(lengths)
        hidden = torch.arange(self._places)[None] >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, MASKED)
        mask = mask[:, None].expand(-1, heads, -1).reshape(-1, 1, self._places)
        # [slots * kv_heads, 1, places]
        self._mask = mask.to(self._cache.slots.dtype).to(device)
        self._slot_of_row = torch.tensor([row.slot for row in rows], device=device)
        self._row_of_slot = torch.tensor(row_of_slot, device=device)
        self._written = torch.tensor(
            [
                (row.slot * heads + head) * room + row.column
                for row in rows
                for head in range(heads)
            ],
            device=device,
        )

    def _is_long(self, run: Run) -> bool:
        """In half precision the scores would be rounded on their way to the softmax."""
        is_exact = self._cache.pool.dtype == torch.float32
        return is_exact and run.slot < 0 and len(run.token_ids) >= self.long_run

    # ---- in each layer

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """See `attention.Attending`. Keys and values first: runs of a pass see each other."""
        self._write(layer, key, value)
        is_last = layer == self._cache.pool.shape[0] - 1
        make: Callable[..., torch.Tensor] = torch.zeros if is_last else torch.empty
        out = make(query.shape, dtype=query.dtype, device=query.device)
        if self._num_rows:
            self._attend_rows(layer, query[: self._num_rows], scaling, out[: self._num_rows])
        runs = self._last_runs if is_last else self._short_runs
        reads = self._last_reads if is_last else self._short_reads
        if runs:
            self._attend_runs(layer, query, key, value, scaling, runs, reads, out)
        if not is_last:
            for start, stop, ranges in self._long_runs:
                keys, values = self._cache.joined(layer, ranges)
                out[start:stop] = causal_blocks(query[start:stop], keys, values, scaling)
        return out

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for which, states in enumerate((key, value)):
            if self._num_rows:
                flat = states[: self._num_rows].reshape(-1, states.shape[-1])
                self._cache.flat_slots[layer][which].index_copy_(0, self._written, flat)
            pool, slots = self._cache.pool[layer, which], self._cache.slots[layer, which]
            for start, stop, run in self._runs:
                piece = states[start:stop]
                if run.slot >= 0:
                    copied = run.copied_tokens
                    if copied:  # their run is an earlier one, of this pass or before
                        slots[run.slot, :, :copied] = slots[run.copied_from, :, :copied]
                    slots[run.slot, :, copied : copied + stop - start] = piece.transpose(0, 1)
                else:
                    pool[run.pool_offset : run.pool_offset + stop - start] = piece

    def _attend_rows(
        self, layer: int, query: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:
        """One token of each slot: [rows, heads, dim] to the same, in `out`.

        In between all queries of one kv_head stand together: [1, kv_heads, rows * group, dim].
        """
        num_rows, num_heads, dim = query.shape
        heads = self._cache.slots.shape[3]
        group = num_heads // heads
        split = query.reshape(num_rows, heads, group, dim)
        stacked = split.transpose(0, 1).reshape(1, heads, num_rows * group, dim)
        found, lse = self._attend_slots(layer, split, scaling)
        for reads in self._row_reads:
            parts, lses, at = [], [], 0
            for start, stop, range_ in [*reads, (num_rows, num_rows, None)]:
                if at < start:  # rows that stand on nothing at this level
                    parts.append(stacked.new_zeros((1, heads, (start - at) * group, dim)))
                    lses.append(lse.new_full((1, heads, (start - at) * group), MASKED))
                if range_ is not None:
                    key, value = self._cache.part(layer, range_.offset, range_.length)
                    asked = stacked[:, :, start * group : stop * group]
                    part, part_lse = attend_part(asked, key, value, scaling, causal=False)
                    parts.append(part)
                    lses.append(part_lse)
                at = stop
            found, lse = merge(found, lse, torch.cat(parts, 2), torch.cat(lses, 2))
        apart = found.view(heads, num_rows, group, dim).transpose(0, 1)
        out.view(num_rows, heads, group, dim).copy_(apart)

    def _attend_slots(
        self, layer: int, query: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands in the slots themselves, as one batched product over all of them."""
        num_rows, heads, group, dim = query.shape
        used = self._cache.slots[layer, :, : self._num_slots, :, : self._places]
        keys, values = used[0].flatten(0, 1), used[1].flatten(0, 1)  # [slots * kv_heads, …]
        asked = query.index_select(0, self._row_of_slot).flatten(0, 1)
        found, lse = batched_part(asked, keys, values, scaling, self._mask)

        def stacked(by_slot: torch.Tensor, *rest: int) -> torch.Tensor:
            rows = by_slot.view(-1, heads, group, *rest).index_select(0, self._slot_of_row)
            return rows.transpose(0, 1).reshape(1, heads, num_rows * group, *rest)

        return stacked(found, dim), stacked(lse)

    def _attend_runs(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        runs: Sequence[tuple[int, int, Run]],
        reads: Sequence[Read],
        out: torch.Tensor,
    ) -> None:
        """Prompt tokens, into `out`: each run over itself, then what stands before it."""
        num_tokens, num_heads, _ = query.shape
        kv_heads = key.shape[1]
        group = num_heads // kv_heads
        by_head = query.unflatten(1, (kv_heads, group)).transpose(0, 1)
        # [kv_heads, tokens, group]
        lse = torch.empty((kv_heads, num_tokens, group), device=query.device)
        apart = out.unflatten(1, (kv_heads, group)).transpose(0, 1)

        def repeated(states: torch.Tensor) -> torch.Tensor:
            """[tokens, kv_heads, dim] for every head of a group, without a copy."""
            return states.transpose(0, 1)[:, None].expand(-1, group, -1, -1)

        def add(start: int, stop: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            """One part more for some tokens, the heads of a group stacked."""
            asked = by_head[:, start:stop].flatten(1, 2)[None]
            part, part_lse = attend_part(asked, keys, values, scaling, causal=False)
            part_lse = part_lse.view(kv_heads, stop - start, group)
            before = lse[:, start:stop]
            weight = torch.sigmoid(part_lse - before)[..., None].to(out.dtype)
            apart[:, start:stop].lerp_(part.view(kv_heads, stop - start, group, -1), weight)
            lse[:, start:stop] = torch.logaddexp(before, part_lse)

        for start, stop, _ in runs:
            part, part_lse = attend_part(
                by_head[:, start:stop].transpose(1, 2),  # [kv_heads, group, tokens, dim]
                repeated(key[start:stop]),
                repeated(value[start:stop]),
                scaling,
                causal=True,
            )
            apart[:, start:stop] = part.transpose(1, 2)
            lse[:, start:stop] = part_lse.transpose(1, 2)
        for start, stop, range_ in reads:
            add(start, stop, *self._cache.part(layer, range_.offset, range_.length))
        for start, stop, run in runs:
            if run.copied_tokens:
                keys, values = self._cache.slots[layer, :, run.slot, :, : run.copied_tokens]
                add(start, stop, keys[None], values[None])
