"""How the transformers engine chooses tokens and ends rows.

Owns two hooks of `generate`: a logits processor that draws each row's token from the row's own
random stream, and a stopping criterion that ends each row on its own. Knows nothing of models or of
the engine's buffer.

Both exist because `generate` has one random stream for a whole batch, and its own stop strings
want a tokenizer of transformers: with these hooks a request's tokens do not depend on what it is
batched with, and stop strings are found by the tokenizer that writes the answer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ragfleet.engines.answers import cut_at_stop
from ragfleet.engines.protocol import Prepared, SamplingParams
from ragfleet.tokens import PromptTokenizer

LEAST_TEMPERATURE = 1e-4
"""Below it the division overflows to infinity; it is greedy for all purposes."""


class Row:
    """One request while its batch runs."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.token_ids: list[int] = []
        """Generated ids without the end marker."""
        self.num_tokens = 0
        """Generated tokens with the end marker and those of a stop string (vLLM counts so too)."""
        self.done = False
        self.aborted = False
        self.timed_out = False
        self.stopped = False
        """Ended by an end marker or a stop string, not by --max_new_tokens."""
        self.broken = False
        """The model's logits were not finite."""
        seed = prepared.request.seed
        self.stream = random.Random(seed)  # None: seeded by the operating system


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Leaves one finite logit per row, so that the argmax of `generate` is the token drawn.

    fp32 softmax at `temperature`, the nucleus of `top_p`, then the inverse of the cumulative sum in
    vocabulary order: batches differ in rounding, and in this order a difference of 1e-7 moves the
    draw's bounds by 1e-7, where a sorted order could swap two tokens.
    """

    def __init__(self, sampling: SamplingParams, rows: Sequence[Row]) -> None:
        self._temperature = max(sampling.temperature, LEAST_TEMPERATURE)
        self._greedy = sampling.temperature == 0
        self._top_p = sampling.top_p
        self._rows = rows
        self.broken = torch.zeros(0)
        """[rows] bool: logits of this step that hold NaN, or infinity as their maximum."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.broken = ~torch.isfinite(scores.amax(dim=-1))
        if self._greedy:
            return scores
        probs = torch.softmax(scores.float() / self._temperature, dim=-1)  # [rows, vocab]
        if self._top_p < 1:
            ordered, index = torch.sort(probs, dim=-1, descending=True, stable=True)
            before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
            ordered[before >= self._top_p] = 0
            probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
        draws = [0.0 if row.done else row.stream.random() for row in self._rows]
        bounds = probs.double().cumsum(dim=-1)
        wanted = torch.tensor(draws, dtype=torch.float64, device=bounds.device)[:, None]
        # right=True: a draw of 0.0 skips tokens of probability 0.
        token = torch.searchsorted(bounds, wanted * bounds[:, -1:], right=True)
        token.clamp_(max=probs.shape[-1] - 1)  # NaN rows would point past the vocabulary
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
        deadline_s: float = math.inf,
    ) -> None:
        """`deadline_s` is monotonic: rows that go on after it have timed out."""
        self._rows = rows
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._stops = stops
        # A token holds at least one byte, so a stop string lies within its own length of tokens;
        # four more for the rest of a character cut in two at the window's start.
        self._window = max((len(stop.encode()) for stop in stops), default=0) + 4
        self._aborted = aborted
        self._on_tokens = on_tokens
        self._deadline_s = deadline_s

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # One transfer from the device per step.
        step = torch.stack([input_ids[:, -1], self._sampler.broken.long()]).tolist()
        fresh = 0
        for row, token, broken in zip(self._rows, *step, strict=True):
            if not row.done:
                fresh += 1
                self._take(row, token, bool(broken))
        self._on_tokens(fresh)
        return torch.tensor([row.done for row in self._rows], device=input_ids.device)

    def _take(self, row: Row, token: int, broken: bool) -> None:
        row.num_tokens += 1
        row.broken = broken
        row.timed_out = time.monotonic() > self._deadline_s
        row.aborted = self._aborted(row.prepared.key)
        if token in self._eos_ids:
            row.stopped = True
        else:
            row.token_ids.append(token)
            row.stopped = self._ends_with_stop(row.token_ids)
        row.done = row.stopped or row.broken or row.aborted or row.timed_out

    def _ends_with_stop(self, token_ids: list[int]) -> bool:
        if not self._stops:
            return False
        tail = self._tokenizer.decode(token_ids[-self._window :])
        if cut_at_stop(tail, self._stops) is None:
            return False
        # The tail's first characters may read otherwise than in the whole text: the whole decides.
        return cut_at_stop(self._tokenizer.decode(token_ids), self._stops) is not None
