"""The engine on Hugging Face transformers.

Owns the start (model, tokenizer, which loop) and the preparing of requests. Requests are then
answered by one of two loops: `shared_prefix`, which reads what prompts share once, or `batched`, on
transformers' own `generate`, for models and devices where the first is not proved right. Loading is
in `checkpoint`, token choice in `decoding`. Knows nothing of files, claims or processes.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from ragfleet.engines.batched import BatchedLoop
from ragfleet.engines.checkpoint import load_model
from ragfleet.engines.protocol import (
    EngineInfo,
    EngineSpec,
    Failure,
    Outcome,
    Prepared,
    Request,
    RequestKey,
)
from ragfleet.engines.shared_prefix.loop import SharedPrefixLoop, make_loop
from ragfleet.engines.shared_prefix.ways import Unsupported
from ragfleet.errors import ModelError
from ragfleet.model_files import model_limit
from ragfleet.prompts import PLAIN_STOP
from ragfleet.tokens import PromptTokenizer, load_tokenizer, prepare_prompt

log = logging.getLogger(__name__)


class TransformersEngine:
    """See `ragfleet.engines.protocol.Engine` for the contract."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._progress = 0
        self._model: Any = None
        self._tokenizer: PromptTokenizer | None = None
        self._max_model_len: int | None = None
        self._vocab_size = 0
        self._loop: SharedPrefixLoop | BatchedLoop | None = None

    def start(self) -> EngineInfo:
        spec = self._spec
        if spec.model_dir is None:
            raise ModelError("--model_path is missing: name a model folder.")
        self._tokenizer = load_tokenizer(spec.model_dir, spec.trust_remote_code)
        self._max_model_len = model_limit(spec.model_dir, spec.max_model_len)
        self._model, notes = load_model(spec, spec.model_dir)
        self._vocab_size = self._model.get_input_embeddings().weight.shape[0]
        stops = spec.sampling.stop
        if self._tokenizer.chat_template is None:
            stops += PLAIN_STOP
            notes.append("the model has no chat template: prompts are plain text")
        self._warm_up()
        self._loop, degraded = self._choose_loop(stops, notes)
        device = torch.cuda.get_device_name(0) if spec.num_gpus else "cpu"
        return EngineInfo(
            name=f"transformers {transformers.__version__}, {type(self._model).__name__},"
            f" {str(self._model.dtype).removeprefix('torch.')}, {device}",
            max_model_len=self._max_model_len,
            batch_size=self._loop.batch_size,
            order="grouped" if isinstance(self._loop, SharedPrefixLoop) else "by_length",
            notes=(*self._tokenizer.notes, *notes),
            degraded=degraded,
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

    def _choose_loop(
        self, stops: tuple[str, ...], notes: list[str]
    ) -> tuple[SharedPrefixLoop | BatchedLoop, str | None]:
        """The loop, and why it is not the one that shares, or what slows that one; adds notes."""
        assert self._tokenizer is not None
        plain = BatchedLoop(self._spec, self._model, self._tokenizer, stops, self._on_tokens)
        if self._spec.prefix_sharing == "off":
            return plain, None
        try:
            loop = make_loop(
                self._spec,
                self._model,
                self._tokenizer,
                stops,
                self._max_model_len,
                plain,
                self._on_tokens,
            )
        except Unsupported as error:
            self._check_device(error)
            if self._spec.prefix_sharing == "on":
                raise ModelError(
                    f"--prefix_sharing on: {self._spec.model_dir} can't share prefixes here:"
                    f" {error}; auto would take plain batches."
                ) from error
            degraded = f"plain batches, in which prompts share nothing: {error}"
            notes.append(degraded)
            return plain, degraded
        notes += loop.notes
        return loop, loop.degraded

    def _check_device(self, reason: Unsupported) -> None:
        # Where a kernel reads what is not its own, a GPU answers nothing more to this process.
        try:
            torch.zeros(1, device=self._model.device).item()
        except torch.OutOfMemoryError:
            return  # it answers
        except RuntimeError as error:
            raise ModelError(
                f"the GPU failed while prefix sharing was tried ({reason}): {error};"
                " start again with --prefix_sharing off."
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
        if isinstance(prepared, Prepared) and isinstance(self._loop, SharedPrefixLoop):
            return self._loop.refusal(prepared) or prepared
        return prepared

    def has_room(self, prepared: Prepared) -> bool:
        return self._started().has_room(prepared)

    def submit(self, prepared: Prepared) -> None:
        self._started().submit(prepared)

    def step(self, timeout_s: float) -> list[Outcome]:
        """See the loop's. Returns at once when nothing is submitted."""
        return self._started().step(timeout_s)

    def progress(self) -> int:
        """Tokens read and generated since start."""
        return self._progress

    def abort(self, key: RequestKey) -> None:
        self._started().abort(key)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
        self._loop = None
        self._model = None
        gc.collect()
        if self._spec.num_gpus:
            torch.cuda.empty_cache()

    def _started(self) -> SharedPrefixLoop | BatchedLoop:
        assert self._loop is not None, "start() comes first"
        return self._loop

    def _on_tokens(self, num_tokens: int) -> None:
        self._count(num_tokens)

    def _count(self, num_tokens: int) -> None:
        self._progress += num_tokens
