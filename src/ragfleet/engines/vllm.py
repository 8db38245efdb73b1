"""The engine on vLLM's step loop.

Owns the window of requests that vLLM has at a time, what it is started with, and the mapping of its
outputs and errors. Scheduling, batching, the prefix cache and preemption are vLLM's. Knows nothing
of files, claims or processes; versions and option names are in `vllm_options`.

vLLM serves first come, first served, and finds shared prefixes in its cache only while they are
there: requests of one prefix group must come one after the other, as the planner puts them.
`LLM.generate` is not used: it returns only when all is answered, and one invalid prompt ends all
(vllm#16732).
"""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any

from ragfleet.engines.answers import cut_at_stop, split_reasoning
from ragfleet.engines.group_guard import GroupGuard
from ragfleet.engines.heap import keep_freed_memory
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
from ragfleet.engines.vllm_memory import settled_gpus
from ragfleet.engines.vllm_options import checked_version
from ragfleet.engines.vllm_settings import (
    LEAST_TEMPERATURE,
    cache_notes,
    engine_arguments,
    environment,
    request_sampling,
)
from ragfleet.engines.vllm_start import Started, check_device, import_vllm, reason, start_vllm
from ragfleet.engines.vllm_window import Window, cache_tokens
from ragfleet.errors import ConfigError, EngineDead, ModelError
from ragfleet.model_files import model_limit
from ragfleet.prompts import PLAIN_STOP
from ragfleet.tokens import PromptTokenizer, load_tokenizer, prepare_prompt

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    prepared: Prepared
    deadline_s: float


class VllmEngine:
    """A bounded window over `LLMEngine`. See `ragfleet.engines.protocol.Engine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._started: Started | None = None
        self._llm: Any = None
        self._vllm: Any = None
        self._refusals: tuple[type[Exception], ...] = (ValueError, TypeError)
        """What vLLM raises for a request that it will not take, and stays well."""
        self._guard: GroupGuard | None = None
        self._tokenizer: PromptTokenizer | None = None
        self._stops: tuple[str, ...] = ()
        self._draws_here = False
        """Seeded draws are made in `vllm_draws`."""
        self._max_model_len: int | None = None
        self._vocab_size = 0
        self._window = Window(1, None, 1)
        self._running: dict[str, _Running] = {}
        """By vLLM's request id, in order of arrival."""
        self._ids: dict[RequestKey, str] = {}
        self._num_submitted = 0
        self._refused: list[Outcome] = []
        self._progress = 0
        self._ahead = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        """Of the prompts answered: how many tokens came out of the prefix cache."""

    # ---- start

    def start(self) -> EngineInfo:
        spec = self._spec
        if spec.model_dir is None:
            raise ModelError("--model_path is missing: name a model folder.")
        limit = model_limit(spec.model_dir, spec.max_model_len)
        self._tokenizer = load_tokenizer(spec.model_dir, spec.trust_remote_code)
        notes = list(self._tokenizer.notes)
        self._stops = spec.sampling.stop
        if self._tokenizer.chat_template is None:
            self._stops += PLAIN_STOP
            notes.append("the model has no chat template: prompts are plain text")
        if 0 < spec.sampling.temperature < LEAST_TEMPERATURE:
            notes.append(f"vLLM samples at temperature {LEAST_TEMPERATURE} at the least")
        installed = checked_version(spec.engine_options)
        for name, value in environment(spec).items():
            os.environ.setdefault(name, value)
        self._vllm = import_vllm()
        # Its validation errors were ValueErrors in earlier versions.
        from vllm import exceptions

        client_error = getattr(exceptions, "VLLMClientError", ValueError)
        self._refusals = (ValueError, TypeError, client_error)
        check_device(spec, installed)
        gpus = settled_gpus(spec.gpu_memory_bytes) if spec.num_gpus else ()
        arguments, more_notes = engine_arguments(spec, needs_tokenizer=bool(self._stops), gpus=gpus)
        self._sampling_params(None)  # for its errors, before the model is loaded
        self._guard = GroupGuard()
        if not spec.num_gpus and (why_not := keep_freed_memory()) is not None:
            notes.append(f"memory is mapped anew in every pass: {why_not}")
        self._started = start_vllm(spec, arguments, installed)
        self._llm = self._started.llm
        self._draws_here = self._started.draws_here
        if self._draws_here:
            notes.append(
                "seeded requests draw as --engine transformers does: vLLM's own seeds fail on the"
                " CPU where a prompt is read in pieces"
            )
        model, scheduler = (
            self._llm.vllm_config.model_config,
            self._llm.vllm_config.scheduler_config,
        )
        self._max_model_len = min(model.max_model_len, limit or model.max_model_len)
        if limit is not None and self._max_model_len < limit:
            notes.append(
                f"prompt and answer may have {self._max_model_len} tokens together, for that is"
                f" what the KV cache holds; the model would take {limit}"
            )
        self._vocab_size = model.get_vocab_size()
        cache = self._llm.vllm_config.cache_config
        self._window = Window(
            scheduler.max_num_seqs,
            cache_tokens(cache),
            spec.sampling.max_new_tokens,
            self._max_model_len,
        )
        return EngineInfo(
            name=f"vLLM {installed}, {model.architectures[0]},"
            f" {str(model.dtype).removeprefix('torch.')}, {self._device_name()}",
            max_model_len=self._max_model_len,
            batch_size=self._window.at_a_time,
            notes=(*notes, *more_notes, *cache_notes(cache)),
        )

    def _device_name(self) -> str:
        if not self._spec.num_gpus:
            return "cpu"
        from vllm.platforms import current_platform

        name = str(current_platform.get_device_name(0))
        parallel = self._llm.vllm_config.parallel_config
        size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        if size == 1:
            return name
        both = " and pipeline" if parallel.pipeline_parallel_size > 1 else ""
        return f"{size} x {name}, tensor{both} parallel"

    # ---- requests

    def prepare(self, request: Request) -> Prepared | Failure:
        assert self._tokenizer is not None, "start() comes first"
        prepared = prepare_prompt(
            request, self._spec.prompts, self._tokenizer, self._spec.sampling, self._max_model_len
        )
        if isinstance(prepared, Prepared) and max(prepared.token_ids) >= self._vocab_size:
            return Failure(
                key=request.key,
                error_type="invalid_record",
                error=f"the prompt holds token {max(prepared.token_ids)}, which the tokenizer knows"
                f" but the model ({self._vocab_size} embeddings) does not",
            )
        return prepared

    def has_room(self, prepared: Prepared) -> bool:
        return len(self._running) < self._window.size

    def submit(self, prepared: Prepared) -> None:
        self._num_submitted += 1
        name = str(self._num_submitted)
        try:
            self._llm.add_request(
                name,
                {"prompt_token_ids": list(prepared.token_ids)},
                self._sampling_params(prepared.request.seed),
            )
        except self._refusals as error:
            self._refused.append(
                Failure(
                    key=prepared.key,
                    error_type="invalid_record",
                    error=f"vLLM refuses it: {reason(error)}",
                )
            )
            return
        except Exception as error:
            raise self._dead("vLLM takes no more requests", error) from error
        deadline_s = time.monotonic() + (self._spec.request_timeout_s or math.inf)
        self._running[name] = _Running(prepared, deadline_s)
        self._ids[prepared.key] = name

    def _sampling_params(self, seed: int | None) -> Any:
        """Ends by our tokenizer's ids; vLLM's own tokenizer is loaded for stop strings alone."""
        from vllm.sampling_params import RequestOutputKind

        assert self._tokenizer is not None
        sampling = self._spec.sampling
        try:
            return self._vllm.SamplingParams(
                **request_sampling(sampling, seed, draws_here=self._draws_here),
                max_tokens=sampling.max_new_tokens,
                stop=list(self._stops),
                stop_token_ids=list(self._tokenizer.eos_ids),
                detokenize=bool(self._stops),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except self._refusals as error:
            raise ConfigError(f"vLLM refuses these settings: {reason(error)}") from error

    def step(self, timeout_s: float) -> list[Outcome]:
        """Engine steps until something is answered, or the time is up."""
        assert self._started is not None, "start() comes first"
        if self._started.watch.death is not None and not self._running:
            raise EngineDead(f"vLLM cannot go on: {self._started.watch.death}")
        outcomes, self._refused = self._refused, []
        until_s = time.monotonic() + timeout_s
        while not outcomes and self._running:
            try:
                outputs = self._llm.step()
            except Exception as error:  # after any error its state is unknown; vLLM ends it itself
                raise self._dead("vLLM failed while generating", error) from error
            self._progress += 1
            self._ahead += 1
            outcomes += [self._outcome(output) for output in outputs if output.finished]
            now_s = time.monotonic()
            outcomes += self._timed_out(now_s)
            if now_s > until_s:
                break
        return outcomes

    def _dead(self, what: str, error: Exception) -> EngineDead:
        assert self._started is not None, "start() comes first"
        return EngineDead(f"{what}: {self._started.cause(error)}")

    def _timed_out(self, now_s: float) -> list[Outcome]:
        late: list[Outcome] = []
        # In order of arrival, and all have the same time: the first in time ends the search.
        for running in list(self._running.values()):
            if running.deadline_s > now_s:
                break
            self.abort(running.prepared.key)
            late.append(
                Failure(
                    key=running.prepared.key,
                    error_type="timeout",
                    error=f"no answer within {self._spec.request_timeout_s:g} s"
                    " (--request_timeout_s)",
                )
            )
        return late

    def _outcome(self, output: Any) -> Outcome:
        assert self._tokenizer is not None
        prepared = self._running.pop(output.request_id).prepared
        del self._ids[prepared.key]
        answer = output.outputs[0]
        token_ids = list(answer.token_ids)
        num_tokens = len(token_ids)
        self._count(num_tokens)
        self.num_prompt_tokens += len(prepared.token_ids)
        num_cached = output.num_cached_tokens or 0
        self.num_cached_tokens += num_cached
        self._window.answered(len(prepared.token_ids), num_cached, num_tokens)
        if answer.finish_reason not in ("stop", "length"):
            return Failure(
                key=prepared.key,
                error_type="generation_error",
                error=f"vLLM gave it up ({answer.finish_reason}) after {num_tokens} tokens",
                retryable=True,
            )
        if token_ids and token_ids[-1] in self._tokenizer.eos_ids:
            token_ids.pop()
        text = self._tokenizer.decode(token_ids)
        cut = cut_at_stop(text, self._stops)
        reasoning, answer_text = split_reasoning(text if cut is None else cut, prepared.prompt)
        return Completion(
            key=prepared.key,
            text=answer_text,
            finish_reason="stop" if cut is not None else answer.finish_reason,
            prompt_tokens=len(prepared.token_ids),
            completion_tokens=num_tokens,
            cached_tokens=output.num_cached_tokens,
            reasoning=reasoning,
            token_ids=tuple(token_ids),
        )

    def _count(self, num_tokens: int) -> None:
        """Each step counted one token ahead, so that long answers show progress; that is made up
        for here."""
        ahead = min(self._ahead, num_tokens)
        self._ahead -= ahead
        self._progress += num_tokens - ahead

    def progress(self) -> int:
        """Tokens generated since start."""
        return self._progress

    def abort(self, key: RequestKey) -> None:
        name = self._ids.pop(key, None)
        if name is not None:
            del self._running[name]
            try:
                self._llm.abort_request([name])
            except Exception as error:
                raise self._dead("vLLM gives no request up", error) from error

    def close(self) -> None:
        self._refused.clear()
        self._running.clear()
        self._ids.clear()
        if self._started is not None:
            log.info(
                "%s of %s prompt tokens came out of the prefix cache",
                f"{self.num_cached_tokens:,}",
                f"{self.num_prompt_tokens:,}",
            )
            self._started.close()
            self._started = self._llm = None
            gc.collect()
            # Else a second engine in this process finds the first one's groups.
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        if self._guard is not None:
            self._guard.close()
            self._guard = None
