"""The nucleus of a distribution over the vocabulary: the likeliest tokens that together reach top_p
(Holtzman et al., arXiv 1904.09751), without sorting all of it.

Pure functions of tensors. To sort a vocabulary of 152,000 tokens takes longer than a small model's
forward, and a nucleus seldom has more than some dozens. Tokens exactly as likely as the least
likely one of a nucleus are all in it, so that it does not depend on their order.
"""

from __future__ import annotations

from typing import Final

import torch

_FEW: Final = 64
"""Looked at first: of a model that has learned something, a nucleus is mostly smaller."""
_MANY: Final = 0.25
"""Of the vocabulary: more tokens than that are faster left where they are than put in order."""
_FLOAT_BITS: Final = 31
"""Of a positive fp32 number; in their order as integers such numbers are in order."""


def nucleus(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities fp32 [rows, vocab] to (weights [rows, n], tokens [rows, n]), in vocabulary
    order; tokens outside a row's nucleus weigh 0, or are left out. None: all tokens.

    How many are looked at depends on the numbers, which a captured CUDA graph can't ask for: see
    `nucleus_floor`.
    """
    vocab = probs.shape[-1]
    if vocab > _FEW:
        values, tokens = torch.topk(probs, _FEW, dim=-1)
        least = _least_of(values, top_p)
        if bool((values[:, -1:] < least).all()):
            return _in_order(values, tokens, least)
    # Those that are together less likely than 1 - top_p are in no nucleus; nor is one so unlikely
    # that even a whole vocabulary of its like would be.
    possible = (probs >= (1 - top_p) / vocab).sum(dim=-1)
    values, tokens = torch.topk(probs, max(1, int(possible.amax())), dim=-1)
    least = _least_of(values, top_p)
    if values.shape[-1] > _MANY * vocab:
        return torch.where(probs >= least, probs, 0.0), None
    return _in_order(values, tokens, least)


def nucleus_floor(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """[rows, 1]: the least probability in each row's nucleus, by bisection over the bits of fp32.
    Nothing is asked of the device."""
    bits = probs.view(torch.int32)
    high = bits.amax(dim=-1, keepdim=True)
    low = torch.zeros_like(high)
    for _ in range(_FLOAT_BITS):
        middle = low + (high - low + 1) // 2
        mass = torch.where(bits >= middle, probs, 0.0).sum(dim=-1, keepdim=True)
        enough = mass >= top_p
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def _least_of(values: torch.Tensor, top_p: float) -> torch.Tensor:
    """[rows, n] probabilities in descending order: the last one of the nucleus, [rows, 1]."""
    before = values.cumsum(dim=-1) - values
    count = (before < top_p).sum(dim=-1, keepdim=True)
    return values.gather(-1, (count - 1).clamp_(min=0))  # none where they are not finite


def _in_order(
    values: torch.Tensor, tokens: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, order = tokens.sort(dim=-1)
    return torch.where(values >= least, values, 0.0).gather(-1, order), tokens
