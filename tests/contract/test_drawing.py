"""Tokens are drawn row by row, however many rows there are; and what a row has come to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ragfleet.engines.decoding import MOST_DRAWN, Row, TokenChooser, outcome_of
from ragfleet.engines.protocol import Completion, Failure, Prepared, Request, SamplingParams


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_many_rows_draw_what_each_draws_alone(top_p: float) -> None:
    torch.manual_seed(0)
    chooser = TokenChooser(SamplingParams(temperature=0.7, top_p=top_p, max_new_tokens=1))
    scores, draws = torch.randn(2 * MOST_DRAWN + 3, 50), torch.rand(2 * MOST_DRAWN + 3).double()
    alone = [chooser.pick(scores[n, None], draws[n, None]) for n in range(len(scores))]
    assert torch.equal(chooser.pick(scores, draws), torch.cat(alone))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_last_token_of_the_vocabulary_can_be_drawn(top_p: float) -> None:
    chooser = TokenChooser(SamplingParams(temperature=1.0, top_p=top_p, max_new_tokens=1))
    scores = torch.tensor([[0.0, 0.0, 50.0], [torch.nan] * 3])
    tokens = chooser.pick_by(scores, [0.5, 0.5]).tolist()
    assert tokens[0] == 2
    assert 0 <= tokens[1] < 3, "of a row that is broken, any"


def test_an_answer_that_ended_as_its_time_was_over_is_an_answer() -> None:
    request = Request(key=bytes(16), query="q", context="c", retrieval_method=None, record={})
    row = Row(Prepared(request=request, prompt="q", token_ids=[1]))
    tokenizer: Any = SimpleNamespace(decode=lambda token_ids: "text")
    row.timed_out = row.done = True
    failure = outcome_of(row, tokenizer, (), 1.0)
    assert isinstance(failure, Failure)
    assert failure.error_type == "timeout"
    row.stopped = True
    answer = outcome_of(row, tokenizer, (), 1.0)
    assert isinstance(answer, Completion)
    assert (answer.text, answer.finish_reason) == ("text", "stop")
