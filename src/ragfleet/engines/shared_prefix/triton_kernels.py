"""What torch has no fused kernel for on CUDA, in Triton, which torch's builds for CUDA bring along.

Owns the attention of decoding rows over their own keys, merged with what they found in shared
ranges, and what `fused_layers` puts in the place of a model's own operations. Imported by `ways`
alone, where there is CUDA.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from ragfleet.engines.shared_prefix.varlen import (
    Levels,
    Ranges,
    attend_levels,
    merge_levels,
    plain_varlen,
)

BLOCK_KEYS: Final = 64
"""Read at once by a block of `attend_rows`: a row's own keys are few."""
BLOCK_GATED: Final = 1024
WIDE_DIM: Final = 128
"""Heads beyond it: blocks of so many keys need more shared memory than some GPUs have."""
LEAST_QUERIES: Final = 16
"""Of a product on tensor cores; a group's heads are fewer, the rest is padding."""


_compiled: Final = triton.jit(  # once, not for each size of a batch
    do_not_specialize=["num_tokens", "num_levels"],
    do_not_specialize_on_alignment=["offsets", "lengths", "lses", "absent", "own_lse"],
)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: Ranges,
    shared: Levels | None,
    scaling: float,
) -> torch.Tensor:
    """See `varlen.Rows`. A block per row and head of keys: its queries read the row's keys once,
    softmax goes along (FlashAttention, arXiv 2205.14135), and the levels join at the end as if they
    were further keys."""
    num_tokens, num_heads, dim = query.shape
    kv_heads = key.shape[1]
    out = query.new_empty((num_tokens, num_heads, dim))
    # Without levels nothing is read of these three.
    outs, lses, absent = (out, out, out) if shared is None else shared
    _rows_kernel[num_tokens, kv_heads](
        query,
        key,
        value,
        own.offsets_k,
        own.lengths_k,
        outs,
        lses,
        absent,
        out,
        scaling,
        num_tokens,
        0 if shared is None else len(outs),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        lses.stride(0),
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        DIM=dim,
        BLOCK_GROUP=max(LEAST_QUERIES, triton.next_power_of_2(num_heads // kv_heads)),
        BLOCK_DIM=max(LEAST_QUERIES, triton.next_power_of_2(dim)),
        BLOCK_KEYS=BLOCK_KEYS if dim <= WIDE_DIM else BLOCK_KEYS // 2,
        num_warps=4,
    )
    return out


@_compiled  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    offsets,
    lengths,
    outs,
    lses,
    absent,
    out,
    scaling,
    num_tokens,
    num_levels,
    query_token,
    query_head,
    key_place,
    key_head,
    lse_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    places = tl.arange(0, BLOCK_KEYS)
    is_head = heads < GROUP
    is_dim = dims < DIM
    is_both = is_head[:, None] & is_dim[None, :]
    asked = query + row * query_token + (head * GROUP + heads)[:, None] * query_head
    q = tl.load(asked + dims[None, :], mask=is_both, other=0.0)
    first = tl.load(offsets + row)
    length = tl.load(lengths + row)
    top = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    found = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in range(0, length, BLOCK_KEYS):
        seen = start + places < length
        at = (first + start + places).to(tl.int64) * key_place + head * key_head
        k = tl.load(
            key + at[None, :] + dims[:, None], mask=is_dim[:, None] & seen[None, :], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        probs = tl.exp(scores - higher[:, None])
        kept = tl.exp(top - higher)
        v = tl.load(
            value + at[:, None] + dims[None, :], mask=seen[:, None] & is_dim[None, :], other=0.0
        )
        found = found * kept[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(probs, 1)
        top = higher
    found, total = _with_levels(
        found,
        total,
        top,
        outs,
        lses,
        absent,
        row,
        head,
        num_tokens,
        num_levels,
        lse_head,
        KV_HEADS,
        GROUP,
        DIM,
        BLOCK_GROUP,
        BLOCK_DIM,
    )
    written = out + (row * KV_HEADS * GROUP + head * GROUP + heads)[:, None] * DIM + dims[None, :]
    tl.store(written, (found / total[:, None]).to(out.dtype.element_ty), mask=is_both)


def merge(shared: Levels, own: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`varlen.merge_levels`, in one go."""
    found, lse = own[0].contiguous(), own[1]
    num_tokens, num_heads, dim = found.shape
    kv_heads = shared.outs.shape[3]
    block_group = triton.next_power_of_2(num_heads // kv_heads)
    block_dim = triton.next_power_of_2(dim)
    out = torch.empty_like(found)
    _merge_kernel[num_tokens, kv_heads](
        found,
        lse,
        *shared,
        out,
        num_tokens,
        len(shared.outs),
        lse.stride(0),
        shared.lses.stride(0),
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        DIM=dim,
        BLOCK_GROUP=block_group,
        BLOCK_DIM=block_dim,
        num_warps=1 if block_group * block_dim <= 4096 else 4,
    )
    return out


@_compiled  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    own,
    own_lse,
    outs,
    lses,
    absent,
    out,
    num_tokens,
    num_levels,
    own_lse_head,
    lse_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    is_head = heads < GROUP
    is_both = is_head[:, None] & (dims < DIM)[None, :]
    place = (row * KV_HEADS * GROUP + head * GROUP + heads)[:, None] * DIM + dims[None, :]
    found = tl.load(own + place, mask=is_both, other=0.0).to(tl.float32)
    at = own_lse + (head * GROUP + heads).to(tl.int64) * own_lse_head + row
    top = tl.load(at, mask=is_head, other=0.0)
    found, total = _with_levels(
        found,
        tl.full([BLOCK_GROUP], 1.0, tl.float32),
        top,
        outs,
        lses,
        absent,
        row,
        head,
        num_tokens,
        num_levels,
        lse_head,
        KV_HEADS,
        GROUP,
        DIM,
        BLOCK_GROUP,
        BLOCK_DIM,
    )
    tl.store(out + place, (found / total[:, None]).to(out.dtype.element_ty), mask=is_both)


@triton.jit  # type: ignore[untyped-decorator]
def _with_levels(  # type: ignore[no-untyped-def]
    found,
    total,
    top,
    outs,
    lses,
    absent,
    row,
    head,
    num_tokens,
    num_levels,
    lse_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """`found` is what was found so far times `total`, the sum of exponentials relative to `top`;
    each level is one more key whose score is its log-sum-exp."""
    heads = tl.arange(0, BLOCK_GROUP)
    dims = tl.arange(0, BLOCK_DIM)
    is_head = heads < GROUP
    is_both = is_head[:, None] & (dims < DIM)[None, :]
    for level in range(num_levels):
        token = (level * num_tokens + row).to(tl.int64)
        if tl.load(absent + token) == 0:
            lse = tl.load(lses + head * lse_head + token * GROUP + heads, mask=is_head, other=0.0)
            at_level = outs + ((token * GROUP + heads)[:, None] * KV_HEADS + head) * DIM
            part = tl.load(at_level + dims[None, :], mask=is_both, other=0.0).to(tl.float32)
            higher = tl.maximum(top, lse)
            kept = tl.exp(top - higher)
            weight = tl.exp(lse - higher)
            found = found * kept[:, None] + part * weight[:, None]
            total = total * kept + weight
            top = higher
    return found, total


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fused_layers.Fused`: any strides but the last; results have tokens before heads in
    memory. Rounded once, where transformers' own operations round each product too."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, num_heads, num_tokens, dim = states.shape
    out = states.new_empty((1, num_tokens, num_heads, dim))
    _rotate_kernel[(num_tokens,)](
        states,
        cos,
        sin,
        out,
        states.stride(2),
        states.stride(1),
        cos.stride(1),
        sin.stride(1),
        HEADS=num_heads,
        HALF=dim // 2,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_HALF=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )
    return out.transpose(1, 2)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    states,
    cos,
    sin,
    out,
    by_token,
    by_head,
    cos_by_token,
    sin_by_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    is_dim = dims < HALF
    mask = (heads < HEADS) & is_dim
    at = states + token * by_token + heads * by_head + dims
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    at_cos = cos + token * cos_by_token + dims
    at_sin = sin + token * sin_by_token + dims
    first_cos = tl.load(at_cos, mask=is_dim, other=0.0).to(tl.float32)
    second_cos = tl.load(at_cos + HALF, mask=is_dim, other=0.0).to(tl.float32)
    first_sin = tl.load(at_sin, mask=is_dim, other=0.0).to(tl.float32)
    second_sin = tl.load(at_sin + HALF, mask=is_dim, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    to = out + (token * HEADS + heads) * (2 * HALF) + dims
    tl.store(to, (first * first_cos - second * first_sin).to(kind), mask=mask)
    tl.store(to + HALF, (second * second_cos + first * second_sin).to(kind), mask=mask)


def gated(both: torch.Tensor) -> torch.Tensor:
    """See `fused_layers.Fused`."""
    size = both.shape[-1] // 2
    out = both.new_empty((*both.shape[:-1], size))
    grid = (out.numel() // size, triton.cdiv(size, BLOCK_GATED))
    _gated_kernel[grid](both.contiguous(), out, size, BLOCK=BLOCK_GATED, num_warps=4)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _gated_kernel(both, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    gate = tl.load(both + row * 2 * size + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + at, mask=mask, other=0.0).to(tl.float32)
    found = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * size + at, found.to(out.dtype.element_ty), mask=mask)


def try_rows(dtype: torch.dtype, head_dim: int, group: int, device: torch.device) -> None:
    """Raises AssertionError unless `attend_rows` and `merge` give what plain operations do."""
    tokens, kv_heads, places = 5, 2, 400
    numbers = torch.arange(2 * places * kv_heads * head_dim, device=device).cos()
    key, value = numbers.view(2, places, kv_heads, head_dim)
    query = torch.arange(tokens * group * kv_heads * head_dim, device=device).sin()
    query = query.view(tokens, group * kv_heads, head_dim)
    own = Ranges.of(
        [(1, at, n) for at, n in ((9, 1), (300, 64), (0, 65), (50, 130), (7, 3))], device
    )
    asked = [(2 * group, 200, 90), (3 * group, 0, 0), (5 * group, 333, 20)]
    levels = Ranges.of(asked, device)
    absent = torch.tensor([[False, False, True, True, True], [False] * 5], device=device)
    low, keys, values = (one.to(dtype) for one in (query, key, value))
    wanted = plain_varlen(query, key, value, own, 0.2)
    exact = attend_levels(plain_varlen, query, key, value, levels, 2, 0.2)
    shared = Levels(exact[0].to(dtype), exact[1], absent)
    merged = merge_levels(Levels(*exact, absent), wanted)
    for found, right in (
        (attend_rows(low, keys, values, own, None, 0.2), wanted[0]),
        (attend_rows(low, keys, values, own, shared, 0.2), merged),
        (merge(shared, (wanted[0].to(dtype), wanted[1])), merged),
    ):
        torch.testing.assert_close(found.float(), right, rtol=2e-2, atol=2e-2)
