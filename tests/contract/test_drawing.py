"""Tokens are drawn row by row, however many rows there are."""

from __future__ import annotations

import pytest
import torch

from ragfleet.engines.decoding import MOST_DRAWN, TokenChooser
from ragfleet.engines.protocol import SamplingParams


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_many_rows_draw_what_each_draws_alone(top_p: float) -> None:
    torch.manual_seed(0)
    chooser = TokenChooser(SamplingParams(temperature=0.7, top_p=top_p, max_new_tokens=1))
    scores, draws = torch.randn(2 * MOST_DRAWN + 3, 50), torch.rand(2 * MOST_DRAWN + 3).double()
    alone = [chooser.pick(scores[n, None], draws[n, None]) for n in range(len(scores))]
    assert torch.equal(chooser.pick(scores, draws), torch.cat(alone))
