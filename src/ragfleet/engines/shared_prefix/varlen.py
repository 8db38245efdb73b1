"""Attention of many ranges of queries over many ranges of keys, in one call.

Owns the kernels for it, torch's fused one on CUDA and a plain one for every device, and the exact
merge of what several calls found. Knows nothing of slots, pools or passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

BLOCK_QUERIES: Final = 128
"""Of a block of the fused kernel, for most sizes of heads. Every range gets as many blocks as the
one that most queries ask, and those with nothing to do take their time too."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Of n ranges: which queries see which keys. All tensors are int32, as the fused kernel's."""

    starts_q: torch.Tensor
    """[n + 1], cumulative: range i is asked by tokens `[starts_q[i], starts_q[i + 1])`."""
    offsets_k: torch.Tensor
    """[n + 1], places of first keys, in any order; they may overlap. The last is never looked at:
    the kernel has cumulative sums here, unless it is given lengths."""
    lengths_k: torch.Tensor
    """[n]; none: outputs 0, log-sum-exp +inf, to be masked."""
    max_q: int
    """No range is asked by more. 1: by exactly one each, for then the kernel counts so."""
    max_k: int
    causal: bool = False
    """The last query of a range sees its last key, the one before it one key less, and so on."""

    @classmethod
    def of(
        cls, asked: Sequence[tuple[int, int, int]], device: torch.device, *, causal: bool = False
    ) -> Ranges:
        """From (queries, first key, keys) of each, in the order of the queries."""
        queries, offsets, lengths = (np.array(one, np.int32) for one in zip(*asked, strict=True))
        starts = np.append(np.int32(0), queries.cumsum(dtype=np.int32))
        max_q = int(queries.max())
        return cls(
            starts_q=torch.tensor(starts, device=device),
            offsets_k=torch.tensor(np.append(offsets, np.int32(0)), device=device),
            lengths_k=torch.tensor(lengths, device=device),
            max_q=max_q,
            max_k=int(lengths.max()),
            causal=causal and max_q > 1,  # the same, and the kernel's other way wants it said
        )


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Ranges, float], tuple[torch.Tensor, torch.Tensor]
]
"""(query [tokens, heads, dim], key and value [places, kv_heads, dim], ranges, scaling) to outputs
[tokens, heads, dim] and fp32 log-sum-exps of the scores [heads, tokens]. Every token of the query
must be in a range: what the fused kernel leaves out it doesn't write."""


def flash_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: Ranges, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Kernel`: FlashAttention-2 as torch brings it, for fp16 and bf16 on CUDA.

    With `seqused_k` its cumulative sums of keys are read as where each range begins.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
        query,
        key,
        value,
        ranges.starts_q,
        ranges.offsets_k,
        ranges.max_q,
        ranges.max_k,
        0.0,
        ranges.causal,
        False,
        scale=scaling,
        seqused_k=ranges.lengths_k,
    )
    return out, lse


def plain_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: Ranges, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Kernel` in torch's public operations, range by range; it reads the ranges on the host."""
    num_tokens, num_heads, _ = query.shape
    kv_heads = key.shape[1]
    out = query.new_zeros(query.shape)
    lse = query.new_full((num_heads, num_tokens), torch.inf, dtype=torch.float32)
    starts, offsets = ranges.starts_q.tolist(), ranges.offsets_k.tolist()
    for number, length in enumerate(ranges.lengths_k.tolist()):
        start, stop, offset = starts[number], starts[number + 1], offsets[number]
        if start == stop or not length:
            continue
        # [kv_heads, group, queries, dim]
        asked = query[start:stop].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
        keys, values = (
            states[offset : offset + length].transpose(0, 1)[:, None] for states in (key, value)
        )
        scores = torch.matmul(asked, keys.transpose(-1, -2)).float() * scaling
        if ranges.causal and stop - start > 1:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
            scores.masked_fill_(later.triu(length - (stop - start) + 1), -torch.inf)
        part_lse = torch.logsumexp(scores, dim=-1)
        probs = (scores - part_lse[..., None]).exp().to(value.dtype)
        out[start:stop] = torch.matmul(probs, values).permute(2, 0, 1, 3).flatten(1, 2)
        lse[:, start:stop] = part_lse.flatten(0, 1)
    return out, lse


def attend_levels(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Ranges,
    levels: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same tokens once per level, all levels in one call: query [tokens, heads, dim] to outputs
    [levels, tokens, group, kv_heads, dim], contiguous, and log-sum-exps [kv_heads, levels, tokens,
    group].

    The heads of a group ask the same keys, so that they go as queries of one head: the kernel reads
    keys once per head, and its blocks of queries are fuller. `ranges` count queries so: `tokens *
    group` of a level, then the next one's.
    """
    num_tokens, num_heads, dim = query.shape
    kv_heads = key.shape[1]
    group = num_heads // kv_heads
    by_group = query.unflatten(1, (kv_heads, group)).transpose(1, 2)
    # Of one token in one level it would be a view, and the kernel answers in the query's layout.
    asked = by_group.expand(levels, -1, -1, -1, -1).reshape(-1, kv_heads, dim).contiguous()
    out, lse = kernel(asked, key, value, ranges, scaling)
    return (
        out.view(levels, num_tokens, group, kv_heads, dim),
        lse.view(kv_heads, levels, num_tokens, group),
    )


class Levels(NamedTuple):
    """What tokens found in shared ranges, level by level."""

    outs: torch.Tensor
    lses: torch.Tensor
    """See `attend_levels`."""
    absent: torch.Tensor
    """[levels, tokens] bool: nothing stands there for them."""


def merge_levels(shared: Levels, own: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What tokens found in shared ranges and in their own, as if all keys had been one range's:
    [tokens, heads, dim]. `own`: outputs [tokens, heads, dim] and log-sums [heads, tokens]."""
    outs, lses, absent = shared
    _, num_tokens, group, kv_heads, dim = outs.shape
    own_lse = own[1].view(kv_heads, group, num_tokens).transpose(1, 2)
    lses = lses.masked_fill(absent[..., None], -torch.inf)
    lses = torch.cat((lses, own_lse[:, None]), dim=1)
    # [levels, tokens, group, kv_heads, 1], fp32
    weights = torch.softmax(lses, dim=1).permute(1, 2, 3, 0)[..., None]
    merged = own[0].unflatten(1, (kv_heads, group)).transpose(1, 2) * weights[-1]
    for part, weight in zip(outs, weights[:-1], strict=True):  # all at once would be large
        merged += part * weight
    out = outs.new_empty((num_tokens, kv_heads, group, dim))
    out.copy_(merged.transpose(1, 2))
    return out.flatten(1, 2)


Rows = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Ranges, Levels | None, float], torch.Tensor
]
"""query, key and value as for a `Kernel`, over ranges with keys that are asked by one token each,
merged with what they found elsewhere: outputs [tokens, heads, dim]."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Of a device. `merge`: see `merge_levels`."""

    ranges: Kernel
    rows: Rows | None = None
    """None: rows take that for ranges."""
    merge: Callable[[Levels, tuple[torch.Tensor, torch.Tensor]], torch.Tensor] = merge_levels


def why_not_flash(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """`flash_varlen` is private in torch, so it is tried on known numbers first, in the ways in
    which it is asked here; why it can't be used."""
    try:
        for asked, heads, causal in _TRIALS:
            ranges = Ranges.of(asked, device, causal=causal)
            size = (sum(queries for queries, _, _ in asked), heads, head_dim)
            query = torch.arange(size[0] * heads * head_dim, device=device).reshape(size).sin()
            states = torch.arange(2 * 999 * 2 * head_dim, device=device).cos()
            key, value = states.view(2, 999, 2, head_dim)
            low, keys, values = (one.to(dtype) for one in (query, key, value))
            found = flash_varlen(low, keys, values, ranges, 0.2)
            wanted = plain_varlen(query, key, value, ranges, 0.2)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)
    except (AttributeError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        return f"torch {torch.__version__}: {str(error).strip().splitlines()[0]}"
    return None


_TRIALS: Final = (
    # Runs over themselves and what stands before them, out of order, none of one key.
    ([(3, 500, 3), (70, 10, 200), (2, 505, 30)], 4, True),
    # A slot's own keys, one query each: long enough to be split among blocks.
    ([(1, 40, 900), (1, 0, 1), (1, 30, 700)], 6, False),
    # Levels: some share a range, some have none, some ranges are asked by nobody.
    ([(5, 600, 300), (4, 0, 0), (130, 20, 77), (0, 0, 0)], 2, False),
)
"""((queries, first key, keys) of each range, heads over 2 of keys, causal)."""
