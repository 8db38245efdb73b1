"""Attention of many ranges in one call: the plain kernel, the fused one by a fake, the merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_flash import fake_flash, use

from ragfleet.engines.shared_prefix.scheduler import Range
from ragfleet.engines.shared_prefix.varlen import (
    Levels,
    Ranges,
    attend_levels,
    merge_levels,
    plain_varlen,
    why_not_flash,
)
from ragfleet.engines.shared_prefix.varlen_pass import absent_in, asked_in

CPU = torch.device("cpu")


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused operation, as its source has it."""
    use(monkeypatch, fake_flash)


NOTHING = Range(0, 0)
ASKED = [(4, 20, 9), (1, 3, 30), (0, 5, 5), (2, 11, 0), (7, 0, 7)]


@pytest.mark.parametrize("causal", [True, False])
def test_each_range_is_attention_over_its_keys(causal: bool) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(14, 6, 8), torch.randn(2, 40, 2, 8)
    out, lse = plain_varlen(query, key, value, Ranges.of(ASKED, CPU, causal=causal), 0.3)
    start = 0
    for queries, offset, length in ASKED:
        part = slice(start, start + queries)
        start += queries
        if not length:
            assert not out[part].any()
            assert (lse[:, part] == torch.inf).all()
            continue
        keys, values = (
            states[offset : offset + length].repeat_interleave(3, 1).transpose(0, 1)
            for states in (key, value)
        )
        asked = query[part].transpose(0, 1)
        mask = torch.ones(queries, length, dtype=torch.bool)
        if causal:  # the last query sees the last key
            mask = mask.tril(length - queries)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            asked, keys, values, mask, scale=0.3
        )
        torch.testing.assert_close(out[part], wanted.transpose(0, 1))
        scores = (asked @ keys.transpose(1, 2) * 0.3).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(lse[:, part], torch.logsumexp(scores, -1))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_kernel_is_called_as_it_wants(dtype: torch.dtype) -> None:
    assert why_not_flash(dtype, 16, CPU) is None


@pytest.mark.usefixtures("flash")
def test_what_the_fused_kernel_refuses_is_said() -> None:
    assert "only support fp16 and bf16" in str(why_not_flash(torch.float32, 16, CPU))
    assert "multiple of 8" in str(why_not_flash(torch.bfloat16, 12, CPU))


def test_without_the_fused_kernel_it_says_so() -> None:
    assert "_flash_attention_forward" in str(why_not_flash(torch.bfloat16, 16, CPU))


def padded_lse(*args: Any, **others: Any) -> Any:
    """As older versions had it."""
    out, lse, *rest = fake_flash(*args, **others)
    return out, lse.reshape(1, *lse.shape), *rest


def lengths_ignored(*args: Any, seqused_k: torch.Tensor, **others: Any) -> Any:
    cumulative = args[4].long()
    lengths = (cumulative[1:] - cumulative[:-1]).clamp(min=0).to(torch.int32)
    return fake_flash(*args, seqused_k=lengths, **others)


def first_aligned(*args: Any, seqused_k: torch.Tensor, **others: Any) -> Any:
    """Causal from the first key on."""
    queries = args[3][1:] - args[3][:-1]
    if args[8]:
        seqused_k = torch.minimum(seqused_k, queries)
    return fake_flash(*args, seqused_k=seqused_k, **others)


@pytest.mark.parametrize("operation", [padded_lse, lengths_ignored, first_aligned])
def test_another_fused_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, operation: Callable[..., Any]
) -> None:
    use(monkeypatch, operation)
    assert why_not_flash(torch.bfloat16, 16, CPU) is not None


def test_what_one_token_finds_in_one_level_is_laid_out_as_always() -> None:
    def kernel(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(query), torch.zeros(query.shape[1], len(query))

    key = value = torch.randn(40, 2, 8)
    levels = Ranges.of([(3, 0, 7)], CPU)
    outs, _ = attend_levels(kernel, torch.randn(1, 6, 8), key, value, levels, 1, 0.3)
    assert outs.is_contiguous()


@pytest.mark.parametrize("num_levels", [1, 2])
def test_levels_and_own_parts_merge_to_the_whole(num_levels: int) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(5, 6, 8), torch.randn(2, 40, 2, 8)
    own = Ranges.of([(1, 30 + index, 2) for index in range(5)], CPU)
    levels = [[(0, 3, Range(0, 7)), (3, 5, Range(7, 5))], [(0, 3, Range(20, 6)), (3, 5, NOTHING)]]
    levels = levels[:num_levels]
    asked = Ranges.of(asked_in(levels, 3), CPU)
    found = attend_levels(plain_varlen, query, key, value, asked, num_levels, 0.3)
    shared = Levels(*found, torch.tensor(absent_in(levels, len(query))))
    merged = merge_levels(shared, plain_varlen(query, key, value, own, 0.3))
    for index in range(5):
        seen = [*range(30 + index, 32 + index)]
        for start, stop, range_ in (read for level in levels for read in level):
            if start <= index < stop:
                seen += range(range_.offset, range_.offset + range_.length)
        whole = Ranges.of([(1, 0, len(seen))], CPU)
        one = query[index : index + 1]
        wanted, _ = plain_varlen(one, key[seen], value[seen], whole, 0.3)
        torch.testing.assert_close(merged[index], wanted[0])
