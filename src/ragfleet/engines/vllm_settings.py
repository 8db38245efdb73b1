"""What vLLM is started with, its arguments and environment, and how each request is sampled.

Owns the tensor-parallel size and what has to differ on the CPU and where GPUs are shared; how much
of a GPU's memory vLLM may take is worked out in `vllm_memory`. Imports no vLLM.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any, Final

from ragfleet.allocation import tensor_parallel_size
from ragfleet.engines.protocol import EngineSpec, SamplingParams
from ragfleet.engines.vllm_memory import (
    SHARED_SEQS,
    SHARED_TOKENS,
    shared_cache_bytes,
    utilisation,
)
from ragfleet.engines.vllm_window import cache_tokens
from ragfleet.errors import ConfigError
from ragfleet.inventory import Gpu
from ragfleet.layout import WEIGHTS_SHARE
from ragfleet.model_files import read_json, weights_bytes

_DTYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CPU_CACHE_SHARE: Final = 0.25
_MAX_CPU_CACHE_BYTES: Final = 4 << 30
"""vLLM fills it with zeros at the start: a second per GiB."""
LEAST_TEMPERATURE: Final = 0.01
"""vLLM raises what is lower to this, and says so for each request."""
DRAW: Final = "ragfleet_draw"
"""In a request's `extra_args`: its seed and sampling, for `vllm_draws`."""
_DRAWS: Final = "ragfleet.engines.vllm_draws:SeededDraws"


def environment(spec: EngineSpec) -> dict[str, str]:
    """Variables vLLM reads at import; those already set stay."""
    variables = {
        # Nothing is reported to anybody, and nothing is asked of the Hub: the model is a folder.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        # A worker has threads; a fork of it could inherit a held lock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not spec.num_gpus:
        # Its own process is for overlapping with a GPU; on the CPU it only takes memory.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return variables


def engine_arguments(
    spec: EngineSpec, *, needs_tokenizer: bool, gpus: Sequence[Gpu] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of vLLM's EngineArgs, and notes for the log; `engine_options` go last.

    `gpus` are the worker's as they are now; empty where there are none or NVML can't say.
    Raises ConfigError for a number of stages that they are not enough for.
    """
    notes: list[str] = []
    arguments: dict[str, Any] = {
        "model": str(spec.model_dir),
        "dtype": _DTYPES[spec.precision],
        "load_format": "safetensors",
        "trust_remote_code": spec.trust_remote_code,
        # -1: the model's own limit, or less where the KV cache is too small for it.
        "max_model_len": spec.max_model_len or -1,
        "skip_tokenizer_init": not needs_tokenizer,
        # Nothing but text is sent. What reads images takes memory, and vLLM's own tokenizer.
        "language_model_only": True,
        "generation_config": "vllm",  # nothing from generation_config.json
        # vLLM's default is 0 in every process: unseeded draws of two workers would be the same.
        "seed": random.SystemRandom().randrange(2**31),
        "disable_log_stats": True,
        "tensor_parallel_size": 1,
    }
    if spec.batch_size is not None:
        arguments["max_num_seqs"] = spec.batch_size
    if spec.num_gpus:
        if "tensor_parallel_size" not in spec.engine_options:
            arguments["tensor_parallel_size"], note = _parallel_size(spec, gpus)
            notes += [note] if note else []
        if gpus:
            sizes = {**arguments, **spec.engine_options}
            used = sizes["tensor_parallel_size"] * sizes.get("pipeline_parallel_size", 1)
            arguments["gpu_memory_utilization"] = _utilisation(spec, gpus, used)
        if spec.gpu_memory_bytes is not None:
            arguments |= _shared_gpu(spec, _asked_share(spec, spec.gpu_memory_bytes, gpus))
    else:
        arguments["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = _cpu_cache_bytes(spec)
    return {**arguments, **spec.engine_options}, notes


def samples_on_cpu(spec: EngineSpec) -> bool:
    return not spec.num_gpus and spec.sampling.temperature > 0


def draw_here(config: Any) -> bool:
    """Have seeded draws made in `vllm_draws`, by vLLM's VllmConfig; False where that cannot be.

    Model runner V2 needs it not: its seeds are without generators, its logits processors are
    others. With speculative decoding vLLM takes no logits processors.
    """
    if getattr(config, "use_v2_model_runner", False) or config.speculative_config is not None:
        return False
    model = config.model_config
    model.logits_processors = [*(model.logits_processors or ()), _DRAWS]
    return True


def request_sampling(
    sampling: SamplingParams, seed: int | None, *, draws_here: bool
) -> dict[str, Any]:
    """Those of the keyword arguments of vLLM's SamplingParams that say how tokens are chosen."""
    temperature = sampling.temperature and max(sampling.temperature, LEAST_TEMPERATURE)
    chosen = {"temperature": temperature, "top_p": sampling.top_p}
    if seed is None:
        return chosen
    if draws_here:
        return {"temperature": 0.0, "extra_args": {DRAW: {"seed": seed, "sampling": chosen}}}
    # 63 bits: some of vLLM's samplers keep seeds as signed numbers.
    return {**chosen, "seed": seed & (2**63 - 1)}


def cache_notes(cache: Any) -> list[str]:
    """For the log, of vLLM's CacheConfig after the start."""
    tokens = cache_tokens(cache)
    if tokens is None:
        return []
    notes = [f"KV cache: {tokens:,} tokens"]
    if not cache.enable_prefix_caching:
        notes.append("the prefix cache is off: each prompt is prefilled in full")
    return notes


def _parallel_size(spec: EngineSpec, gpus: Sequence[Gpu]) -> tuple[int, str | None]:
    """The fewest GPUs that hold the model: each further one only adds communication.

    Tensor parallel, in each of the `pipeline_parallel_size` stages that the user may ask for.
    """
    stages = spec.engine_options.get("pipeline_parallel_size", 1)
    if not isinstance(stages, int) or stages < 1 or spec.num_gpus % stages:
        raise ConfigError(
            f"--engine_options: this worker's {spec.num_gpus} GPU(s) are not pipeline_parallel_size"
            f" ({stages}) equal stages; choose another, or other --gpus_per_worker."
        )
    sizes = _valid_sizes(spec, spec.num_gpus // stages)
    size = sizes[-1]
    if gpus:
        stage_bytes = _weights_bytes(spec) / stages
        size = next(
            (
                size
                for size in sizes
                if stage_bytes / size <= WEIGHTS_SHARE * _room_bytes(spec, gpus, stages * size)
            ),
            size,
        )
    if stages * size == spec.num_gpus:
        return size, None
    how = f"tensor parallel over {size}" if stages == 1 else f"{stages} stages of {size}"
    how += f" of this worker's {spec.num_gpus} GPUs"
    return size, (
        f"{how}, the others stay untouched: the model fits, and more workers are faster than more"
        " GPUs for each"
        if size < sizes[-1] or sizes[-1] == 1
        else f"{how}: the model's heads don't split {spec.num_gpus // stages} ways"
    )


def _utilisation(spec: EngineSpec, gpus: Sequence[Gpu], num_used: int) -> float:
    """Of the first GPUs, which are those that vLLM takes: what others hold of the rest is nothing
    to it."""
    return utilisation(gpus[: max(1, num_used)], spec.gpu_memory_bytes)


def _room_bytes(spec: EngineSpec, gpus: Sequence[Gpu], num_used: int) -> float:
    """What vLLM takes of each of its GPUs."""
    part = spec.engine_options.get("gpu_memory_utilization")
    if not isinstance(part, int | float):
        part = _utilisation(spec, gpus, num_used)
    return float(part * min(gpu.total_bytes for gpu in gpus[:num_used]))


def _valid_sizes(spec: EngineSpec, most: int) -> list[int]:
    assert spec.model_dir is not None
    config = read_json(spec.model_dir / "config.json")
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int):
        return list(range(1, most + 1))
    shape = (heads, config.get("num_key_value_heads"), config.get("intermediate_size"))
    return [size for size in range(1, most + 1) if tensor_parallel_size(size, *shape) == size]


def _weights_bytes(spec: EngineSpec) -> int:
    assert spec.model_dir is not None
    return weights_bytes(spec.model_dir, 4 if spec.precision == "fp32" else 2)


def _asked_share(spec: EngineSpec, share_bytes: int, gpus: Sequence[Gpu]) -> int:
    """Less than the worker's share where `gpu_memory_utilization` asks for less: vLLM does not look
    at it when it is told how large a cache is."""
    part = spec.engine_options.get("gpu_memory_utilization")
    if not isinstance(part, int | float) or not gpus:
        return share_bytes
    return min(share_bytes, int(part * min(gpu.total_bytes for gpu in gpus)))


def _shared_gpu(spec: EngineSpec, share_bytes: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if spec.batch_size is None:
        arguments["max_num_seqs"] = SHARED_SEQS
    if spec.engine_options.get("enable_chunked_prefill") is not False:
        arguments["max_num_batched_tokens"] = SHARED_TOKENS  # else it must hold max_model_len
    cache_bytes = shared_cache_bytes(share_bytes, _weights_bytes(spec))
    if cache_bytes is not None:
        arguments["kv_cache_memory_bytes"] = cache_bytes
    return arguments


def _cpu_cache_bytes(spec: EngineSpec) -> int:
    """A quarter of the free memory, by this worker's share of the cores."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(1.0, spec.num_threads / (os.cpu_count() or 1))
    return min(_MAX_CPU_CACHE_BYTES, int(_CPU_CACHE_SHARE * share * free_bytes))
