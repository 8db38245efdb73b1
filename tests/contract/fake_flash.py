"""torch's fused attention of many ranges as its source has it, on the CPU.

What `aten::_flash_attention_forward` does with `seqused_k` (flash_api.cpp's `mha_varlen_fwd`, and
the kernel's `block_info.h`): what it refuses, what it leaves unwritten, how it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def use(monkeypatch: pytest.MonkeyPatch, operation: Callable[..., Any]) -> None:
    """In place of torch's own."""
    fused = SimpleNamespace(default=operation)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fused)


def require(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def fake_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    seqused_k: torch.Tensor,
    any_dtype: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
    """query [tokens, heads, dim], key and value [places, kv_heads, dim]. `any_dtype`: as it is not,
    so that tokens can be held to those of fp32."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    require(is_half or any_dtype, "only support fp16 and bf16 data type")
    _check(query, key, value, (cum_seq_q, cum_seq_k, seqused_k))
    require(dropout_p == 0 and not return_debug_mask, "not as it is used here")
    num_ranges, heads, kv_heads = len(cum_seq_q) - 1, query.shape[1], key.shape[1]
    group = heads // kv_heads
    starts, offsets = cum_seq_q.tolist(), cum_seq_k.tolist()
    is_swapped = max_q == 1 and heads > kv_heads
    if is_swapped:  # the starts are not looked at: one query each
        require(len(query) == num_ranges, "shape is invalid for a view")
        starts = list(range(num_ranges + 1))
    out = torch.full_like(query, torch.nan)  # what nobody writes holds anything
    lse = torch.full((heads, len(query)), torch.nan)
    for index, length in enumerate(seqused_k.tolist()):
        start, offset = starts[index], offsets[index]
        stop = min(starts[index + 1], start + -(-max_q // 128) * 128)  # blocks that are launched
        require(offset >= 0 and offset + length <= len(key), "an illegal memory access")
        for at in range(start, stop):
            seen = length
            if is_causal and max_q > 1:
                seen = length - (starts[index + 1] - 1 - at)
            if seen <= 0:
                out[at], lse[:, at] = 0, torch.inf
                continue
            keys, values = (
                states[offset : offset + seen].float().repeat_interleave(group, 1)
                for states in (key, value)
            )
            scores = torch.einsum("hd,khd->hk", query[at].float(), keys) * scale
            lse[:, at] = torch.logsumexp(scores, 1)
            out[at] = torch.einsum("hk,khd->hd", torch.softmax(scores, 1), values).to(out.dtype)
    return out, lse, None, None, None


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: tuple[torch.Tensor, ...]
) -> None:
    for states in (query, key, value):
        require(states.dtype == query.dtype, "query and key must have the same dtype")
        require(states.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        require(states.dim() == 3 and states.shape[2] == query.shape[2], "must have shape")
    require(key.shape == value.shape, "v must have shape")
    require(query.shape[2] % 8 == 0 and query.shape[2] <= 256, "head_size must be a multiple of 8")
    require(query.shape[1] % key.shape[1] == 0, "Number of heads in key/value must divide")
    for numbers in ranges:
        require(numbers.dtype == torch.int32, "must have dtype int32")
        require(numbers.is_contiguous() and numbers.dim() == 1, "must be contiguous")
    starts, offsets, lengths = ranges
    require(len(starts) > 1, "batch size must be positive")
    require(len(offsets) == len(starts) == len(lengths) + 1, "must have shape (batch_size + 1)")
