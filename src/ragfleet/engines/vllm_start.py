"""vLLM from its import to its first token, and the errors of that way.

Owns which error is whose: a model or an option that vLLM does not take is the user's, and what
fails in the engine that was begun is told with its cause, in one line. What it is started with is
in `vllm_settings`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ragfleet.engines.protocol import EngineSpec
from ragfleet.engines.vllm_options import INSTALL
from ragfleet.engines.vllm_process import ELSEWHERE, LogMark, ProcessWatch
from ragfleet.engines.vllm_settings import draw_here, samples_on_cpu
from ragfleet.errors import ConfigError, DeviceError, ModelError


@dataclass(frozen=True, slots=True)
class Started:
    """A vLLM that generates."""

    llm: Any
    """Its LLMEngine."""
    watch: ProcessWatch
    draws_here: bool
    """Seeded draws are made in `vllm_draws`."""
    mark: LogMark

    def cause(self, error: Exception) -> str:
        """Why a call of `llm` failed, in one line."""
        if self.watch.death is not None and self.watch.was_killed:
            return self.watch.death
        return _cause(error, self.mark)

    def close(self) -> None:
        self.watch.close()
        self.llm.engine_core.shutdown()


def import_vllm() -> Any:
    try:
        import vllm

        for name in ("EngineArgs", "LLMEngine", "SamplingParams"):
            getattr(vllm, name)  # loaded at the first access
    except Exception as error:  # ImportError, and whatever a mismatched torch raises
        raise ConfigError(
            f"vLLM is installed but cannot be imported ({reason(error)}); it must match its torch:"
            f" install it into an environment of its own ({INSTALL})."
        ) from error
    return vllm


def check_device(spec: EngineSpec, version: str) -> None:
    from vllm.platforms import current_platform as platform

    if spec.num_gpus and platform.is_cpu():
        raise DeviceError(
            f"vLLM {version} is a build for the CPU; install the one for GPUs (pip install"
            " vllm), or run with --device cpu."
        )
    if spec.num_gpus and not platform.is_cuda_alike():
        raise DeviceError(
            f"vLLM {version} finds no GPU although the driver shows {spec.num_gpus}; see"
            ' what `python -c "import torch; torch.cuda.init()"` says.'
        )
    if not spec.num_gpus and not platform.is_cpu():
        raise DeviceError(
            f"vLLM {version} is a build for GPUs and there is none to use; use --engine"
            " transformers on the CPU (or a CPU build of vLLM)."
        )


def start_vllm(spec: EngineSpec, arguments: Mapping[str, Any], version: str) -> Started:
    """Raises ModelError for what vLLM does not take, DeviceError for what fails on the way."""
    import vllm
    from vllm.usage.usage_lib import UsageContext

    cannot = f"{spec.model_dir}: vLLM {version} cannot start with it: "
    context = UsageContext.LLM_CLASS  # others' defaults batch for latency
    try:
        config = vllm.EngineArgs(**arguments).create_engine_config(context)
    except Exception as error:  # each check fails in its own way
        raise ModelError(cannot + reason(error)) from error
    draws_here = samples_on_cpu(spec) and draw_here(config)
    others, mark = multiprocessing.active_children(), LogMark()
    try:
        llm = vllm.LLMEngine.from_vllm_config(config, usage_context=context, disable_log_stats=True)
    except Exception as error:  # kernels, quantisers, memory
        raise DeviceError(cannot + _cause(error, mark)) from error
    own = [process for process in multiprocessing.active_children() if process not in others]
    started = Started(llm, ProcessWatch(llm.engine_core, own), draws_here, mark)
    _warm_up(spec, started, version)
    return started


def _warm_up(spec: EngineSpec, started: Started, version: str) -> None:
    # A model that cannot generate at all must say so now, and not kill worker after worker.
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    try:
        started.llm.add_request("warm-up", {"prompt_token_ids": [0]}, params)
        while started.llm.has_unfinished_requests():
            started.llm.step()
    except Exception as error:  # attention backends refuse head sizes, kernels fail to build
        why = f"{spec.model_dir}: vLLM {version} loads it, but cannot generate:"
        why = f"{why} {started.cause(error)}"
        started.close()
        raise (DeviceError if started.watch.was_killed else ModelError)(why) from error


def _cause(error: Exception, mark: LogMark) -> str:
    """Of an error that may be about another process, whose own is in the log alone."""
    said = reason(error)
    if ELSEWHERE not in said:
        return said
    return mark.last_error() or f"{said} (in this worker's log)"


def reason(error: BaseException) -> str:
    """What an error says, in one line; pydantic's errors say it in parts."""
    parts = getattr(error, "errors", None)
    if callable(parts):
        try:
            return "; ".join(str(part["msg"]).removeprefix("Value error, ") for part in parts())
        except (TypeError, KeyError):
            pass
    text = " ".join(str(error).split())
    return text or type(error).__name__
