"""The plain loop: batches through transformers' own `generate`.

Owns the buffer of waiting requests, the choice of batches and what happens when a batch fails. One
`step` answers one batch: left-padded, of like lengths, greedy or sampled per row. Knows nothing of
loading, prompts, files, claims or processes.

Plain on purpose: it takes every model that `generate` takes, and it is what remains where the
shared-prefix loop can't be used.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import GenerationConfig

from ragfleet.engines.decoding import Row, RowSampler, RowStopper, outcome_of
from ragfleet.engines.oom_ladder import OomLadder
from ragfleet.engines.protocol import EngineSpec, Failure, Outcome, Prepared, RequestKey
from ragfleet.errors import EngineDead
from ragfleet.tokens import PromptTokenizer

log = logging.getLogger(__name__)

BUFFERED_BATCHES = 4
"""Requests held back to be sorted by length; more would sort better and answer later."""
OLDEST_EVERY = 4
"""Each so many batches one is built around the request that waited longest, so none starves."""
PREFILL_OPERATIONS = 2e16
"""Most that the prompts of a batch may cost a GPU, unless --batch_size says otherwise: a minute or
two on one that holds the model. Until they are read, nobody can tell a slow batch from one that
hangs."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# After these the CUDA context is gone: every later call fails too.
_FATAL = ("CUDA error", "device-side assert", "illegal memory access", "launch failure", "NCCL")


class BatchedLoop:
    """Waiting requests in, outcomes of a batch out."""

    def __init__(
        self,
        spec: EngineSpec,
        model: Any,
        tokenizer: PromptTokenizer,
        stops: tuple[str, ...],
        on_tokens: Callable[[int], None],
    ) -> None:
        """`on_tokens`: called with how many were generated, or read."""
        self._spec = spec
        self._model = model
        self._tokenizer = tokenizer
        self._stops = stops
        self._on_tokens = on_tokens
        self.batch_size = spec.batch_size or (32 if spec.num_gpus else 8)
        self._waiting: list[Prepared] = []  # in order of arrival
        self._running: set[RequestKey] = set()
        self._aborted: set[RequestKey] = set()
        self._num_batches = 0
        self._ladder = OomLadder()
        self.make_room: Callable[[], None] = _nothing
        """Called before a request that memory ran out with is tried alone: frees what others of
        this engine hold."""
        self._layers = _decoder_layers(model)
        self._most_tokens = math.inf
        if spec.num_gpus and not spec.batch_size:
            self._most_tokens = PREFILL_OPERATIONS / (2 * _weights_of_a_token(model))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._waiting) < BUFFERED_BATCHES * self.batch_size

    def submit(self, prepared: Prepared) -> None:
        self._waiting.append(prepared)

    def step(self, timeout_s: float) -> list[Outcome]:
        """Answers one batch, however long it takes; returns at once when nothing is submitted."""
        if not self._waiting:
            return []
        batch = self._take_batch()
        self._running = {prepared.key for prepared in batch}
        try:
            return self._answer(batch)
        finally:
            self._aborted -= self._running
            self._running = set()

    def abort(self, key: RequestKey) -> None:
        self._waiting = [prepared for prepared in self._waiting if prepared.key != key]
        if key in self._running:  # called from another thread, or from a hook
            self._aborted.add(key)

    def close(self) -> None:
        self._waiting.clear()
        self._model = None

    # ---- batches ------------------------------------------------------------------------------

    def _take_batch(self) -> list[Prepared]:
        """The longest prompts, so that a batch pads little and memory runs out early if at all."""
        ordered = sorted(self._waiting, key=_length, reverse=True)  # stable: equals by arrival
        start = 0
        if self._num_batches % OLDEST_EVERY == OLDEST_EVERY - 1:
            start = ordered.index(self._waiting[0])
            # Where too few are left from there on, some before it, if all of them fit.
            while start and len(ordered) - start < self._most_with(ordered[start - 1]):
                start -= 1
        self._num_batches += 1
        batch = ordered[start : start + self._most_with(ordered[start])]
        taken = {prepared.key for prepared in batch}
        self._waiting = [prepared for prepared in self._waiting if prepared.key not in taken]
        return batch

    def _most_with(self, longest: Prepared) -> int:
        """Requests of a batch whose longest prompt this is."""
        width = self._width([longest])
        return self._ladder.fit(
            width, max(1, int(min(self.batch_size, self._most_tokens // width)))
        )

    def _answer(self, batch: Sequence[Prepared], *, is_alone: bool = False) -> list[Outcome]:
        """Outcomes of a batch, in smaller parts where the whole fails. Raises EngineDead."""
        batch = [prepared for prepared in batch if prepared.key not in self._aborted]
        if not batch:
            return []
        try:
            outcomes = self._generate(batch)
            self._grow(batch)
            return outcomes
        except Exception as error:  # a model's forward can raise anything; one row may be the cause
            message = f"{type(error).__name__}: {error}"
            out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
                sign in message for sign in _OUT_OF_MEMORY
            )
        # Out of the handler, so that the traceback no longer holds the batch's tensors.
        if out_of_memory:
            return self._with_less_memory(batch, message, is_alone)
        if any(sign in message for sign in _FATAL):
            raise EngineDead(f"the GPU failed while generating: {message}")
        if len(batch) == 1:
            return [_failure(batch[0], "generation_error", message)]
        log.warning("a batch of %d failed, its rows are tried alone: %s", len(batch), message)
        return [outcome for prepared in batch for outcome in self._answer([prepared])]

    def _with_less_memory(
        self, batch: Sequence[Prepared], message: str, was_alone: bool
    ) -> list[Outcome]:
        """The next rung of the ladder for a batch that ran out of memory."""
        give_memory_back(on_gpu=self._spec.num_gpus > 0)
        width, tokens = self._width(batch), self._tokens(batch)
        rung = self._ladder.failed(len(batch), tokens, was_alone=was_alone)
        if rung == "oom":
            log.warning("out of memory with one request of %d tokens alone: it fails", tokens)
            return [_failure(batch[0], "oom", message)]
        if rung == "alone":
            log.warning("out of memory with one request of %d tokens: once more alone", tokens)
            self.make_room()
            return self._answer(batch, is_alone=True)
        log.warning(
            "out of memory with %d requests of up to %d tokens: batches now have up to %d tokens",
            len(batch),
            width,
            self._ladder.budget_tokens,
        )
        size = min(self._ladder.fit(width, len(batch)), (len(batch) + 1) // 2)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        return [outcome for part in parts for outcome in self._answer(part)]

    def _grow(self, batch: Sequence[Prepared]) -> None:
        if self._ladder.succeeded(self._tokens(batch)):
            budget = self._ladder.budget_tokens
            limit = "without a limit again" if budget is None else f"up to {budget} tokens"
            log.info("memory has sufficed for a while: batches are now %s", limit)

    def _width(self, batch: Sequence[Prepared]) -> int:
        return max(map(_length, batch)) + self._spec.sampling.max_new_tokens

    def _tokens(self, batch: Sequence[Prepared]) -> int:
        """Of a whole batch: prompts, answers and padding."""
        return len(batch) * self._width(batch)

    def _generate(self, batch: Sequence[Prepared]) -> list[Outcome]:
        width = max(map(_length, batch))
        pad_id = self._tokenizer.pad_id
        padded = [[pad_id] * (width - _length(p)) + list(p.token_ids) for p in batch]
        mask = [[0] * (width - _length(p)) + [1] * _length(p) for p in batch]
        rows = [Row(prepared) for prepared in batch]
        deadline_s = time.monotonic() + (self._spec.request_timeout_s or math.inf)
        for row in rows:
            row.deadline_s = deadline_s
        sampler = RowSampler(self._spec.sampling, rows)
        stopper = RowStopper(
            rows,
            sampler=sampler,
            tokenizer=self._tokenizer,
            stops=self._stops,
            aborted=self._aborted.__contains__,
            on_tokens=self._on_tokens,
        )
        with torch.inference_mode(), self._told_of_reading():
            self._model.generate(
                input_ids=torch.tensor(padded, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=self._spec.sampling.max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad_id,
                    use_cache=True,
                ),
                logits_processor=[sampler],
                stopping_criteria=[stopper],
            )
        return [
            outcome_of(row, self._tokenizer, self._stops, self._spec.request_timeout_s)
            for row in rows
            if not row.aborted
        ]

    @contextmanager
    def _told_of_reading(self) -> Iterator[None]:
        """Each layer that has read the prompts is progress: on a CPU all of them can take longer
        than a worker may stand still."""

        def told(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            states = args[0] if args else None
            if isinstance(states, torch.Tensor) and states.dim() == 3 and states.shape[1] > 1:
                self._on_tokens(max(1, states.shape[0] * states.shape[1] // len(self._layers)))

        hooks = [layer.register_forward_hook(told) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def give_memory_back(*, on_gpu: bool) -> None:
    """That of what nobody uses any more, also where such objects hold each other."""
    gc.collect()
    if on_gpu:
        # A GPU that has failed refuses this as well; whose batch comes next says so.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def _nothing() -> None:
    pass


def _decoder_layers(model: Any) -> list[Any]:
    """Those that read text, also of a model that reads images as well."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return list(module)
    return []


def _weights_of_a_token(model: Any) -> float:
    """About as many as a token is multiplied with: those of quantised layers are not parameters,
    and of a mixture's experts few are asked."""
    config = model.config.get_text_config()
    layers, hidden = (getattr(config, n, None) for n in ("num_hidden_layers", "hidden_size"))
    if isinstance(layers, int) and isinstance(hidden, int):
        return 12.0 * layers * hidden**2
    return float(max(1, model.num_parameters()))


def _length(prepared: Prepared) -> int:
    return len(prepared.token_ids)


def _failure(prepared: Prepared, error_type: str, message: str) -> Failure:
    return Failure(
        key=prepared.key,
        error_type=error_type,
        error=f"alone in its batch, a prompt of {_length(prepared)} tokens: {message}",
    )
