"""What vLLM is started with, its arguments and environment, and how each request is sampled.

Owns the tensor-parallel size, the memory for the KV cache where GPUs are shared, and what has to
differ on the CPU. Imports no vLLM.
"""

from __future__ import annotations

import os
import random
from typing import Any, Final

from ragfleet.allocation import tensor_parallel_size
from ragfleet.engines.protocol import EngineSpec, SamplingParams
from ragfleet.gpus import discover_gpus, visible_gpus
from ragfleet.model_files import read_json

_DTYPES: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_UTILISATION: Final = 0.9
"""vLLM's own default share of a GPU's memory, or a little less."""
_WEIGHTS_SHARE: Final = 0.75
"""Most of that which weights may take: with a small KV cache few requests run together."""
_ACTIVATION_BYTES: Final = 1 << 30
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
    spec: EngineSpec, *, needs_tokenizer: bool
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of vLLM's EngineArgs, and notes for the log; `engine_options` go last."""
    notes: list[str] = []
    arguments: dict[str, Any] = {
        "model": str(spec.model_dir),
        "dtype": _DTYPES[spec.precision],
        "load_format": "safetensors",
        "trust_remote_code": spec.trust_remote_code,
        # -1: the model's own limit, or less where the KV cache is too small for it.
        "max_model_len": spec.max_model_len or -1,
        "skip_tokenizer_init": not needs_tokenizer,
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
            arguments["tensor_parallel_size"], note = _parallel_size(spec)
            notes += [note] if note else []
        if spec.gpu_memory_bytes is not None:
            arguments |= _shared_gpu(spec, spec.gpu_memory_bytes)
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
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    if not blocks or not size:
        return []
    notes = [f"KV cache: {blocks * size:,} tokens"]
    if not cache.enable_prefix_caching:
        notes.append("the prefix cache is off: each prompt is prefilled in full")
    return notes


def _parallel_size(spec: EngineSpec) -> tuple[int, str | None]:
    """The fewest GPUs that hold the model: each further one only adds communication."""
    sizes = _valid_sizes(spec)
    memory_bytes = _gpu_bytes()
    if memory_bytes is None:
        size = sizes[-1]
    else:
        room_bytes = _WEIGHTS_SHARE * _UTILISATION * memory_bytes
        weights_bytes = _weights_bytes(spec)
        size = next((size for size in sizes if weights_bytes / size <= room_bytes), sizes[-1])
    if size == spec.num_gpus:
        return size, None
    return size, (
        f"tensor parallel over {size} of this worker's {spec.num_gpus} GPUs, the others stay"
        " untouched: the model fits, and more workers are faster than more GPUs for each"
        if size < sizes[-1] or sizes[-1] == 1
        else f"tensor parallel over {size} of this worker's {spec.num_gpus} GPUs: the model's heads"
        f" don't split {spec.num_gpus} ways"
    )


def _valid_sizes(spec: EngineSpec) -> list[int]:
    assert spec.model_dir is not None
    config = read_json(spec.model_dir / "config.json")
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int):
        return list(range(1, spec.num_gpus + 1))
    shape = (heads, config.get("num_key_value_heads"), config.get("intermediate_size"))
    return [
        size for size in range(1, spec.num_gpus + 1) if tensor_parallel_size(size, *shape) == size
    ]


def _weights_bytes(spec: EngineSpec) -> int:
    assert spec.model_dir is not None
    return sum(path.stat().st_size for path in spec.model_dir.glob("*.safetensors"))


def _gpu_bytes() -> int | None:
    """Memory of the smallest GPU of this worker, which its CUDA_VISIBLE_DEVICES names."""
    gpus = visible_gpus(discover_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")).gpus
    return min((gpu.total_bytes for gpu in gpus if gpu.total_bytes), default=None)


def _shared_gpu(spec: EngineSpec, share_bytes: int) -> dict[str, Any]:
    """A fixed KV cache: vLLM's own measure fails when another worker allocates meanwhile."""
    cache_bytes = share_bytes - _weights_bytes(spec) - _ACTIVATION_BYTES
    total_bytes = _gpu_bytes()
    if cache_bytes <= 0 or total_bytes is None:
        return {}
    # The share is of the whole GPU, and must be free when vLLM starts.
    return {
        "kv_cache_memory_bytes": int(0.9 * cache_bytes),
        "gpu_memory_utilization": round(0.9 * share_bytes / total_bytes, 3),
    }


def _cpu_cache_bytes(spec: EngineSpec) -> int:
    """A quarter of the free memory, by this worker's share of the cores."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = min(1.0, spec.num_threads / (os.cpu_count() or 1))
    return min(_MAX_CPU_CACHE_BYTES, int(_CPU_CACHE_SHARE * share * free_bytes))
