"""Several tokens of all running slots, without the host in between.

Owns the buffers that a step reads and moves on by itself: ids, positions, where keys and values go,
how many keys each slot has. What steps chose comes back in one transfer. Knows nothing of requests:
who ended within a burst, and what is dropped, is for the loop to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

import torch

from ragfleet.engines.decoding import TokenChooser, not_finite
from ragfleet.engines.shared_prefix.forward import Forward
from ragfleet.engines.shared_prefix.passes import Read
from ragfleet.engines.shared_prefix.scheduler import Range, Row
from ragfleet.engines.shared_prefix.varlen import Kernels, Ranges
from ragfleet.engines.shared_prefix.varlen_cache import VarlenCache
from ragfleet.engines.shared_prefix.varlen_pass import (
    Part,
    VarlenPass,
    absent_in,
    asked_in,
    block_tokens,
    in_blocks,
    level_reads,
)

BURST_STEPS: Final = 4
"""Most tokens at once. A row that ends before the last of them wastes the rest, and a free slot
waits so long."""
LEAST_SIZE: Final = 8
"""Rows, and ranges, of the smallest bucket: fewer buckets are worth a few that do nothing."""

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Of a step the same one, made to be repeated without the host."""


def eagerly(step: Step) -> Step:
    """The `Capture` of devices that have none."""
    return step


class Decoder:
    """Steps of a fixed shape, a `_Bucket`, for each size of batch."""

    def __init__(
        self,
        kernels: Kernels,
        capture: Capture,
        forward: Forward,
        cache: VarlenCache,
        chooser: TokenChooser,
    ) -> None:
        self.keeps_logits = False
        """Whether `logits` are wanted: for the self-check."""
        self.logits: torch.Tensor | None = None
        """[rows, vocab] of the last step."""
        self._kernels = kernels
        self._capture = capture
        self._forward = forward
        self._cache = cache
        self._chooser = chooser
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}

    def decode(
        self,
        rows: Sequence[Row],
        last_tokens: Mapping[int, int],
        steps: int,
        draws: Sequence[Sequence[float]],
    ) -> list[tuple[list[int], list[int]]]:
        """Per step the tokens of `rows`, and whether their logits were not finite. `rows` is where
        the first step finds them, `draws` [steps, rows] of `TokenChooser.draw`."""
        batch = _rounded(len(rows))
        levels = in_blocks(
            level_reads([(n, n + 1, row.reads) for n, row in enumerate(rows)], batch),
            block_tokens(self._cache.group),
        )
        size = (batch, len(levels), _rounded(sum(map(len, levels))))
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = _Bucket(self._kernels, self._forward, self._cache, self._chooser, size)
            bucket.keeps_logits = self.keeps_logits
            self._buckets[size] = bucket
        with torch.inference_mode():
            if bucket.num_bursts == 1:
                # Not the first time: many sizes come once, while the last rows end.
                bucket.load([], {}, [], [])
                bucket.step = self._capture(bucket.step)
            bucket.num_bursts += 1
            bucket.load(rows, last_tokens, levels, draws)
            for _ in range(steps):
                bucket.step()
            tokens, broken = bucket.chosen[:, :steps, : len(rows)].tolist()
        if self.keeps_logits and bucket.logits is not None:
            self.logits = bucket.logits[: len(rows)]
        return list(zip(tokens, broken, strict=True))


class _Bucket:
    """Static buffers for up to `batch` rows that stand on `levels` levels of at most `num_ranges`
    ranges altogether. Rows beyond those loaded write to the scratch place, see only that, and do
    not advance."""

    def __init__(
        self,
        kernels: Kernels,
        forward: Forward,
        cache: VarlenCache,
        chooser: TokenChooser,
        size: tuple[int, int, int],
    ) -> None:
        self.num_bursts = 0
        self.step: Step = self._step
        self.keeps_logits = False
        self.logits: torch.Tensor | None = None
        self._forward = forward
        self._cache = cache
        self._chooser = chooser
        self._batch, self._levels, self._num_ranges = batch, levels, num_ranges = size
        device = cache.device

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._longs = zeros(4, batch, dtype=torch.int64)
        self._ids, self._positions, self._written, self._live = self._longs
        # Of ranges, those of the rows' own parts last: starts, offsets, lengths. Then absent.
        count = num_ranges + batch
        parts = (count + 1, count + 1, count, (levels + 1) * batch)
        self._ints = zeros(sum(parts), dtype=torch.int32)
        starts, offsets, lengths, absent = self._ints.split(parts)
        self._own_lengths = lengths[num_ranges:]
        self._absent_ints = absent.view(levels + 1, batch)
        self._absent = zeros(levels + 1, batch, dtype=torch.bool)
        self._draws = zeros(BURST_STEPS, batch, dtype=torch.float64)
        self._at = zeros(1, dtype=torch.int64)
        self.chosen = zeros(2, BURST_STEPS, batch, dtype=torch.int64)
        """[tokens or not finite, step, row]"""
        self._most = min(batch, block_tokens(cache.group))
        own = Ranges(
            torch.arange(batch + 1, dtype=torch.int32, device=device),
            offsets[num_ranges:],
            lengths[num_ranges:],
            max_q=1,
            max_k=cache.slot_tokens,
        )
        in_levels = Ranges(
            starts[: num_ranges + 1],
            offsets[: num_ranges + 1],
            lengths[:num_ranges],
            max_q=self._most * cache.group,
            max_k=cache.num_pool,
        )
        self._pass = VarlenPass(
            kernels,
            cache,
            input_ids=self._ids[None],
            position_ids=self._positions[None],
            written=self._written,
            parts=[Part(batch, True, own, in_levels if levels else None, self._absent[:levels])],
            logit_rows=torch.arange(batch, device=device),
            slots=list(range(batch)),
        )

    def load(
        self,
        rows: Sequence[Row],
        last_tokens: Mapping[int, int],
        levels: Sequence[Sequence[Read]],
        draws: Sequence[Sequence[float]],
    ) -> None:
        """What the first step reads. Of no rows: steps that do nothing."""
        cache, spare = self._cache, self._batch - len(rows)
        idle = [0] * spare
        longs = [
            [last_tokens[row.slot] for row in rows] + idle,
            [row.position for row in rows] + idle,
            [cache.place(row.slot, row.column) for row in rows] + [cache.scratch] * spare,
            [1] * len(rows) + idle,
        ]
        nothing = [[(0, self._batch, Range(0, 0))]] * self._levels
        levels = levels or in_blocks(nothing, self._most)
        own = [Range(cache.place(row.slot), row.column + 1) for row in rows]
        own += [Range(cache.scratch, 1)] * spare
        self._longs.copy_(torch.tensor(longs))
        self._ints.copy_(torch.tensor(self._of_ranges(levels, own), dtype=torch.int32))
        self._absent.copy_(self._absent_ints)
        if draws:
            padded = [[*of_rows, *idle] for of_rows in draws]
            self._draws[: len(draws)].copy_(torch.tensor(padded, dtype=torch.float64))
        self._at.zero_()

    def _of_ranges(self, levels: Sequence[Sequence[Read]], own: Sequence[Range]) -> list[int]:
        """For `_ints`. Ranges of levels beyond those that there are nobody asks."""
        group = self._cache.group
        asked = asked_in(levels, group)
        asked += [(0, 0, 0)] * (self._num_ranges - len(asked))
        asked += [(group, range_.offset, range_.length) for range_ in own]
        queries, offsets, lengths = zip(*asked, strict=True)
        absent = [int(one) for of_level in absent_in(levels) for one in of_level]
        starts = accumulate(queries, initial=0)
        return [*starts, *offsets, 0, *lengths, *absent, *[0] * len(own)]

    def _step(self) -> None:
        """One token of every row. Nothing here may ask the device for a number."""
        logits = self._forward(self._pass)
        if self.keeps_logits:
            if self.logits is None:
                self.logits = torch.empty_like(logits)
            self.logits.copy_(logits)
        draws = None if self._chooser.is_greedy else self._draws.index_select(0, self._at)[0]
        tokens = self._chooser.pick(logits, draws)
        both = torch.stack((tokens, not_finite(logits).long()))
        self.chosen.index_copy_(1, self._at, both[:, None])
        self._ids.copy_(tokens)
        for one in (self._positions, self._written, self._own_lengths):
            one.add_(self._live)
        self._at.add_(1)


def _rounded(count: int) -> int:
    return max(LEAST_SIZE, 1 << (count - 1).bit_length())
