"""How the transformers engine chooses tokens and ends rows.

Owns the draw of each row's token from the row's own random stream (`TokenChooser`), the end of each
row on its own (`RowEnder`), both as hooks of `generate` (`RowSampler`, `RowStopper`), and the
outcome of a row. Knows nothing of models or of how rows come together.

`generate` has one random stream for a whole batch, and its own stop strings want a tokenizer of
transformers: here a request's tokens do not depend on what it is batched with, and stop strings are
found by the tokenizer that writes the answer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ragfleet.engines.answers import cut_at_stop, split_reasoning
from ragfleet.engines.nucleus import nucleus, nucleus_floor
from ragfleet.engines.protocol import Completion, Failure, Outcome, Prepared, SamplingParams
from ragfleet.tokens import PromptTokenizer

LEAST_TEMPERATURE = 1e-4
"""Below it the division overflows to infinity; it is greedy for all purposes."""


class Row:
    """One request while its tokens are generated."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.token_ids: list[int] = []
        """Generated ids without the end marker."""
        self.num_tokens = 0
        """Generated tokens with the end marker and those of a stop string (vLLM counts so too)."""
        self.deadline_s = math.inf
        """Monotonic: generating longer than this is a timeout."""
        self.cached_tokens = 0
        """Of its prompt: read for another request already."""
        self.done = False
        self.aborted = False
        self.timed_out = False
        self.stopped = False
        """Ended by an end marker or a stop string, not by --max_new_tokens."""
        self.broken = False
        """The model's logits were not finite."""
        seed = prepared.request.seed
        self.stream = random.Random(seed)  # None: seeded by the operating system


MOST_DRAWN: Final = 128
"""Rows at once: each takes 20 bytes for each token of the vocabulary."""


class TokenChooser:
    """Draws a token per row: fp32 softmax at `temperature`, the nucleus of `top_p`, then the
    inverse of the cumulative sum in vocabulary order.

    Batches differ in rounding, and in vocabulary order a difference of 1e-7 moves the draw's bounds
    by 1e-7, where a sorted order could swap two tokens.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        self.is_greedy = sampling.temperature == 0
        self._top_p = sampling.top_p

    def choose(self, scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """[rows, vocab] logits to [rows] tokens. Rows that are done draw nothing."""
        if self.is_greedy:
            return self.pick(scores, None)
        return self.pick_by(scores, self.draw(rows))

    def pick_by(self, scores: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
        """`pick`, from numbers on the host."""
        return self.pick(scores, torch.tensor(draws, dtype=torch.float64, device=scores.device))

    def draw(self, rows: Sequence[Row]) -> list[float]:
        """The next number of each row's stream, for one token."""
        return [0.0 if row.done else row.stream.random() for row in rows]

    def pick(self, scores: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """`choose` on the device alone: fp64 `draws` [rows], made beforehand; None: greedy."""
        if draws is None:
            return scores.argmax(dim=-1)
        both = (scores.split(MOST_DRAWN), draws.split(MOST_DRAWN))
        found = [self._draw_each(*part) for part in zip(*both, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _draw_each(self, scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(scores.float() / self._temperature, dim=-1)  # [rows, vocab]
        tokens = None
        if self._top_p < 1 and weights.is_cuda:
            weights = torch.where(weights >= nucleus_floor(weights, self._top_p), weights, 0.0)
        elif self._top_p < 1:
            weights, tokens = nucleus(weights, self._top_p)
        bounds = weights.double().cumsum(dim=-1)
        # right=True: a draw of 0.0 skips tokens of probability 0.
        place = torch.searchsorted(bounds, draws[:, None] * bounds[:, -1:], right=True)
        place.clamp_(max=weights.shape[-1] - 1)  # NaN rows would point past the vocabulary
        return (place if tokens is None else tokens.gather(-1, place))[:, 0]


def not_finite(scores: torch.Tensor) -> torch.Tensor:
    """[rows] bool: logits that hold NaN, or infinity as their maximum."""
    return ~torch.isfinite(scores.amax(dim=-1))


class RowEnder:
    """Takes a row's next tokens and says whether the row is done."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        stops: Sequence[str],
        aborted: Callable[[bytes], bool],
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._stops = stops
        # A token holds at least one byte, so a stop string lies within its own length of tokens;
        # four more for the rest of a character cut in two at the window's start.
        self._window = max((len(stop.encode()) for stop in stops), default=0) + 4
        self._aborted = aborted

    def take(self, row: Row, tokens: Sequence[int], broken: Sequence[int]) -> None:
        """One or more at once, in order, up to one that ends the row; `broken`: whether the logits
        of each were not finite. Bursts of hundreds of rows come here: little is done per token."""
        token_ids, eos_ids, stops = row.token_ids, self._eos_ids, self._stops
        row.timed_out = time.monotonic() > row.deadline_s
        row.aborted = self._aborted(row.prepared.key)
        is_over = row.timed_out or row.aborted
        for token, is_broken in zip(tokens, broken, strict=True):
            row.num_tokens += 1
            if token in eos_ids:
                row.stopped = True
            else:
                token_ids.append(token)
                row.stopped = bool(stops) and self._ends_with_stop(token_ids)
            if row.stopped or is_broken or is_over:
                row.broken = bool(is_broken)
                row.done = True
                return

    def _ends_with_stop(self, token_ids: list[int]) -> bool:
        tail = self._tokenizer.decode(token_ids[-self._window :])
        if cut_at_stop(tail, self._stops) is None:
            return False
        # The tail's first characters may read otherwise than in the whole text: the whole decides.
        return cut_at_stop(self._tokenizer.decode(token_ids), self._stops) is not None


def outcome_of(
    row: Row,
    tokenizer: PromptTokenizer,
    stops: Sequence[str],
    request_timeout_s: float | None,
) -> Outcome:
    """What a row that is done has come to."""
    if row.timed_out and not row.stopped:
        return Failure(
            key=row.prepared.key,
            error_type="timeout",
            error=f"no answer within {request_timeout_s:g} s of generating"
            f" ({row.num_tokens} tokens until then; --request_timeout_s)",
        )
    if row.broken:
        return Failure(
            key=row.prepared.key,
            error_type="generation_error",
            error="the model's logits are not finite (NaN or infinity)"
            f" after {row.num_tokens - 1} tokens; try --precision bf16 or fp32",
        )
    text = tokenizer.decode(row.token_ids)
    cut = cut_at_stop(text, stops)
    reasoning, answer = split_reasoning(text if cut is None else cut, row.prepared.prompt)
    return Completion(
        key=row.prepared.key,
        text=answer,
        finish_reason="stop" if row.stopped or cut is not None else "length",
        prompt_tokens=len(row.prepared.token_ids),
        cached_tokens=row.cached_tokens,
        completion_tokens=row.num_tokens,
        reasoning=reasoning,
        token_ids=tuple(row.token_ids),
    )


# ---- as hooks of `generate`


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one finite logit per row, so that the argmax of `generate` is the token drawn."""

    def __init__(self, sampling: SamplingParams, rows: Sequence[Row]) -> None:
        self._chooser = TokenChooser(sampling)
        self._rows = rows
        self.broken = torch.zeros(0)
        """[rows] bool: logits of this step that are `not_finite`."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.broken = not_finite(scores)
        if self._chooser.is_greedy:
            return scores
        token = self._chooser.choose(scores, self._rows)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class RowStopper(StoppingCriteria):  # type: ignore[misc]
    """Takes each step's tokens and says which rows are done."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        sampler: RowSampler,
        tokenizer: PromptTokenizer,
        stops: Sequence[str],
        aborted: Callable[[bytes], bool],
        on_tokens: Callable[[int], None],
    ) -> None:
        self._rows = rows
        self._sampler = sampler
        self._ender = RowEnder(tokenizer, stops, aborted)
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # One transfer from the device per step.
        step = torch.stack([input_ids[:, -1], self._sampler.broken.long()]).tolist()
        fresh = 0
        for row, token, broken in zip(self._rows, *step, strict=True):
            if not row.done:
                fresh += 1
                self._ender.take(row, (token,), (broken,))
        self._on_tokens(fresh)
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)
