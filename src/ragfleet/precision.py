"""In which precision a model runs: what is asked for, its checkpoint's own, what its GPUs can do.

Owns `--precision`. Nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from ragfleet.config import RunConfig
from ragfleet.errors import DeviceError
from ragfleet.inventory import Gpu
from ragfleet.model_files import read_json

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES: Final[Mapping[str, Precision]] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}
_BF16_CAPABILITY: Final = (8, 0)
"""Ampere. Before it torch imitates bf16, slowly, and vLLM refuses it."""


def resolve_precision(config: RunConfig, model_dir: Path | None, on_gpu: bool) -> Precision:
    """What `--precision` means on a GPU that can do all, or on the CPU."""
    if config.precision != "auto":
        return config.precision
    if not on_gpu or model_dir is None:
        return "fp32"
    found = read_json(model_dir / "config.json")
    text = found.get("text_config") or {}
    name = found.get("dtype") or found.get("torch_dtype") or text.get("dtype")
    return _DTYPES.get(str(name), "bf16")


def precision_on(
    gpus: Sequence[Gpu],
    precision: Precision,
    engine: str,
    *,
    is_auto: bool,
    earlier: str | None = None,
) -> tuple[Precision, list[str]]:
    """(what these GPUs compute in where `precision` is wanted, lines for the header).

    `earlier`: in which the run was begun. With `is_auto` that is kept, for which GPUs are free is
    no matter of the run. Raises DeviceError where a GPU can't do what was asked for.
    """
    asked, way = "--precision bf16", "Use --precision fp16."
    if is_auto and gpus and earlier in ("bf16", "fp16"):
        is_auto, asked = False, "The run was begun in bf16"
        precision = "bf16" if earlier == "bf16" else "fp16"
        way = "Use other GPUs or --engine transformers, or begin another with --precision fp16."
    older = [
        gpu
        for gpu in gpus
        if gpu.compute_capability is not None and gpu.compute_capability < _BF16_CAPABILITY
    ]
    if precision != "bf16" or not older:
        return precision, []
    gpu, number = older[0], ".".join(map(str, older[0].compute_capability or ()))
    what = f"GPU {gpu.label} ({gpu.name}, compute capability {number}) has no bf16"
    if is_auto:
        return "fp16", [f"{what}: fp16 is taken. Where that overflows: --precision fp32."]
    if engine == "vllm":
        raise DeviceError(f"{asked}: {what}, and vLLM refuses it. {way}")
    return precision, [f"Warning: {what}, which is imitated slowly; --precision fp16 is faster."]
