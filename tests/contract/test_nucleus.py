"""The nucleus without a sort, against the nucleus by a sort."""

from __future__ import annotations

import pytest
import torch

from ragfleet.engines import nucleus as module
from ragfleet.engines.nucleus import nucleus, nucleus_floor


def by_sorting(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, index = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.double().cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, kept)


def whole(weights: torch.Tensor, tokens: torch.Tensor | None, vocab: int) -> torch.Tensor:
    if tokens is None:
        return weights
    assert (tokens.diff(dim=-1) > 0).all(), "not in vocabulary order"
    return weights.new_zeros((len(weights), vocab)).scatter_(-1, tokens, weights)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.95, 0.9999])
@pytest.mark.parametrize("vocab", [3, 64, 65, 1000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 40.0])  # flat to nearly certain
def test_it_is_that_of_a_sort(vocab: int, spread: float, top_p: float) -> None:
    torch.manual_seed(vocab)
    logits = spread * torch.randn(20, vocab)
    logits[0, 1] = 200.0  # a certain one beside the others
    probs = torch.softmax(logits, -1)
    expected = by_sorting(probs, top_p)
    if not spread:  # all as likely: all are in
        expected = torch.cat((expected[:1], probs[1:]))
    # At its edge sums in fp32 may tell tokens otherwise that weigh no more than their rounding.
    torch.testing.assert_close(whole(*nucleus(probs, top_p), vocab), expected, rtol=0, atol=2e-6)
    floored = torch.where(probs >= nucleus_floor(probs, top_p), probs, 0.0)
    torch.testing.assert_close(floored, expected, rtol=0, atol=2e-6)


def test_few_are_looked_at_where_few_are_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def counted(probs: torch.Tensor, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        looked_at.append(count)
        found: tuple[torch.Tensor, torch.Tensor] = torch.sort(probs, dim=dim, descending=True)
        return found[0][:, :count], found[1][:, :count]

    monkeypatch.setattr(module.torch, "topk", counted)
    torch.manual_seed(0)
    nucleus(torch.softmax(20 * torch.randn(9, 5000), -1), 0.95)
    assert looked_at == [64]
    nucleus(torch.softmax(4 * torch.randn(9, 5000), -1), 0.95)
    assert 64 < looked_at[-1] < 5000


def test_what_equals_the_last_one_is_in_it() -> None:
    probs = torch.full((2, 200), 0.5 / 199)
    probs[:, 7] = 0.5
    weights, tokens = nucleus(probs, 0.6)
    assert int((whole(weights, tokens, 200) > 0).sum()) == 400
    assert int((probs >= nucleus_floor(probs, 0.6)).sum()) == 400


def test_what_is_not_finite_raises_nothing() -> None:
    probs = torch.full((3, 500), torch.nan)
    probs[1] = 1 / 500
    nucleus(probs, 0.9)
    nucleus_floor(probs, 0.9)
