"""The engine on Hugging Face transformers' `generate`.

Owns the buffer of waiting requests, the choice of batches and what happens when a batch fails. One
`step` answers one batch: left-padded, of like lengths, greedy or sampled per row. Knows nothing of
files, claims or processes. Loading is in `checkpoint`, token choice in `decoding`.

Plain on purpose: it is the reference that faster engines must equal.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from ragfleet.engines.answers import cut_at_stop, split_reasoning
from ragfleet.engines.checkpoint import load_model
from ragfleet.engines.decoding import Row, RowSampler, RowStopper
from ragfleet.engines.oom_ladder import OomLadder
from ragfleet.engines.protocol import (
    Completion,
    EngineInfo,
    EngineSpec,
    Failure,
    Outcome,
    Prepared,
    Request,
    RequestKey,
)
from ragfleet.errors import EngineDead, ModelError
from ragfleet.model_files import model_limit
from ragfleet.prompts import PLAIN_STOP
from ragfleet.tokens import PromptTokenizer, load_tokenizer, prepare_prompt

log = logging.getLogger(__name__)

BUFFERED_BATCHES = 4
"""Requests held back to be sorted by length; more would sort better and answer later."""
OLDEST_EVERY = 4
"""Each so many batches one is built around the request that waited longest, so none starves."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
# After these the CUDA context is gone: every later call fails too.
_FATAL = ("CUDA error", "device-side assert", "illegal memory access", "launch failure", "NCCL")


class TransformersEngine:
    """Batched `generate`. See `ragfleet.engines.protocol.Engine` for the contract."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._batch_size = spec.batch_size or (32 if spec.num_gpus else 8)
        self._waiting: list[Prepared] = []  # in order of arrival
        self._running: set[RequestKey] = set()
        self._aborted: set[RequestKey] = set()
        self._num_batches = 0
        self._progress = 0
        self._ladder = OomLadder()
        self._model: Any = None
        self._tokenizer: PromptTokenizer | None = None
        self._max_model_len: int | None = None
        self._vocab_size = 0
        self._stops: tuple[str, ...] = ()

    def start(self) -> EngineInfo:
        spec = self._spec
        if spec.model_dir is None:
            raise ModelError("--model_path is missing: name a model folder.")
        self._tokenizer = load_tokenizer(spec.model_dir, spec.trust_remote_code)
        self._max_model_len = model_limit(spec.model_dir, spec.max_model_len)
        self._model, notes = load_model(spec, spec.model_dir)
        self._vocab_size = self._model.get_input_embeddings().weight.shape[0]
        self._stops = spec.sampling.stop
        if self._tokenizer.chat_template is None:
            self._stops += PLAIN_STOP
            notes.append("the model has no chat template: prompts are plain text")
        self._warm_up()
        device = torch.cuda.get_device_name(0) if spec.num_gpus else "cpu"
        return EngineInfo(
            name=f"transformers {transformers.__version__}, {type(self._model).__name__},"
            f" {str(self._model.dtype).removeprefix('torch.')}, {device}",
            max_model_len=self._max_model_len,
            batch_size=self._batch_size,
            order="by_length",
            notes=(*self._tokenizer.notes, *notes),
        )

    def _warm_up(self) -> None:
        # A model that cannot generate at all must say so now, not in a failure row per record.
        try:
            with torch.inference_mode():
                self._model.generate(
                    input_ids=torch.tensor([[0]], device=self._model.device),
                    attention_mask=torch.tensor([[1]], device=self._model.device),
                    generation_config=GenerationConfig(
                        max_new_tokens=1, do_sample=False, pad_token_id=0
                    ),
                )
        except Exception as error:  # kernels, quantisers and remote code each fail in their own way
            raise ModelError(
                f"{self._spec.model_dir}: {type(self._model).__name__} loads, but cannot generate:"
                f" {type(error).__name__}: {error}"
            ) from error

    def prepare(self, request: Request) -> Prepared | Failure:
        assert self._tokenizer is not None, "start() comes first"
        prepared = prepare_prompt(
            request,
            self._spec.prompts,
            self._tokenizer,
            self._spec.sampling,
            self._max_model_len,
        )
        if isinstance(prepared, Prepared) and max(prepared.token_ids) >= self._vocab_size:
            # On a GPU such an id would end the whole process.
            return Failure(
                key=request.key,
                error_type="invalid_record",
                error=f"the prompt holds token {max(prepared.token_ids)}, which the tokenizer knows"
                f" but the model ({self._vocab_size} embeddings) does not",
            )
        return prepared

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._waiting) < BUFFERED_BATCHES * self._batch_size

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

    def progress(self) -> int:
        """Tokens generated since start."""
        return self._progress

    def abort(self, key: RequestKey) -> None:
        self._waiting = [prepared for prepared in self._waiting if prepared.key != key]
        if key in self._running:  # called from another thread, or from a hook
            self._aborted.add(key)

    def close(self) -> None:
        self._waiting.clear()
        self._model = None
        gc.collect()
        if self._spec.num_gpus:
            torch.cuda.empty_cache()

    # ---- batches ------------------------------------------------------------------------------

    def _take_batch(self) -> list[Prepared]:
        """The longest prompts, so that a batch pads little and memory runs out early if at all."""
        ordered = sorted(self._waiting, key=_length, reverse=True)  # stable: equals by arrival
        start = 0
        if self._num_batches % OLDEST_EVERY == OLDEST_EVERY - 1:
            oldest = ordered.index(self._waiting[0])
            start = max(0, min(oldest, len(ordered) - self._batch_size))
        self._num_batches += 1
        width = _length(ordered[start]) + self._spec.sampling.max_new_tokens
        batch = ordered[start : start + self._ladder.fit(width, self._batch_size)]
        taken = {prepared.key for prepared in batch}
        self._waiting = [prepared for prepared in self._waiting if prepared.key not in taken]
        return batch

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
        gc.collect()
        if self._spec.num_gpus:
            torch.cuda.empty_cache()
        width, tokens = self._width(batch), self._tokens(batch)
        rung = self._ladder.failed(len(batch), tokens, was_alone=was_alone)
        if rung == "oom":
            log.warning("out of memory with one request of %d tokens alone: it fails", tokens)
            return [_failure(batch[0], "oom", message)]
        if rung == "alone":
            log.warning("out of memory with one request of %d tokens: once more alone", tokens)
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
        assert self._tokenizer is not None
        width = max(map(_length, batch))
        pad_id = self._tokenizer.pad_id
        padded = [[pad_id] * (width - _length(p)) + list(p.token_ids) for p in batch]
        mask = [[0] * (width - _length(p)) + [1] * _length(p) for p in batch]
        rows = [Row(prepared) for prepared in batch]
        sampler = RowSampler(self._spec.sampling, rows)
        stopper = RowStopper(
            rows,
            sampler=sampler,
            tokenizer=self._tokenizer,
            stops=self._stops,
            aborted=self._aborted.__contains__,
            on_tokens=self._count,
            deadline_s=time.monotonic() + (self._spec.request_timeout_s or math.inf),
        )
        with torch.inference_mode():
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
        return [self._outcome(row) for row in rows if not row.aborted]

    def _count(self, num_tokens: int) -> None:
        self._progress += num_tokens

    def _outcome(self, row: Row) -> Outcome:
        assert self._tokenizer is not None
        if row.timed_out and not row.stopped:
            return Failure(
                key=row.prepared.key,
                error_type="timeout",
                error=f"no answer within {self._spec.request_timeout_s:g} s of generating"
                f" ({row.num_tokens} tokens until then; --request_timeout_s)",
            )
        if row.broken:
            return Failure(
                key=row.prepared.key,
                error_type="generation_error",
                error="the model's logits are not finite (NaN or infinity)"
                f" after {row.num_tokens - 1} tokens; try --precision bf16 or fp32",
            )
        text = self._tokenizer.decode(row.token_ids)
        cut = cut_at_stop(text, self._stops)
        reasoning, answer = split_reasoning(text if cut is None else cut, row.prepared.prompt)
        return Completion(
            key=row.prepared.key,
            text=answer,
            finish_reason="stop" if row.stopped or cut is not None else "length",
            prompt_tokens=_length(row.prepared),
            cached_tokens=0,
            completion_tokens=row.num_tokens,
            reasoning=reasoning,
            token_ids=tuple(row.token_ids),
        )


def _length(prepared: Prepared) -> int:
    return len(prepared.token_ids)


def _failure(prepared: Prepared, error_type: str, message: str) -> Failure:
    return Failure(
        key=prepared.key,
        error_type=error_type,
        error=f"alone in its batch, a prompt of {_length(prepared)} tokens: {message}",
    )
