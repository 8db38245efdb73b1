"""Which of the visible GPUs may be given to workers, in which order, and why not the others.

Owns `gpu_pick`, and what makes a GPU free, partly held or left out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragfleet.config import GpuPick
from ragfleet.errors import DeviceError
from ragfleet.inventory import Gpu, GpuInventory, gib

FREE_FRACTION = 0.9
"""A GPU with this share of its memory free counts as free when the need is unknown: driver, ECC
tables and a desktop's display take a few percent of an idle one."""


@dataclass(frozen=True, slots=True)
class Need:
    """What was asked for."""

    num_workers: int
    total_gpus: int | None
    gpus_per_worker: int | None
    needed_bytes: int | None
    gpu_pick: GpuPick


def gpus_each(usable: Sequence[Gpu], num_workers: int, asked: int | None) -> int:
    """GPUs for each worker; 0 where there are fewer than workers."""
    each = asked or len(usable) // num_workers
    # MIG user guide, "CUDA device enumeration": a process can enumerate a single compute instance,
    # and no whole GPU beside it.
    return min(each, 1) if any(gpu.is_mig for gpu in usable[: each * num_workers]) else each


def usable_of(inventory: GpuInventory, need: Need) -> tuple[list[Gpu], list[str]]:
    """The GPUs to share out, at least one, and the lines about the others."""
    kept, left_out = _pick(inventory.gpus, need)
    notes = [*inventory.notes, *left_out]
    if not kept:
        raise DeviceError(
            "\n".join(
                [
                    f"None of the {len(inventory.gpus)} visible GPU(s) has room. Wait for one, or"
                    " take them as they are with --gpu_pick all, or run with --device cpu.",
                    *notes,
                ]
            )
        )
    if need.total_gpus is not None and need.total_gpus > len(kept):
        notes.append(
            f"--total_gpus is {need.total_gpus}, but {len(kept)} can be used: using {len(kept)}."
        )
    return kept[: need.total_gpus], notes


def _pick(gpus: Sequence[Gpu], need: Need) -> tuple[list[Gpu], list[str]]:
    """The GPUs with room, and a line for each of the others."""
    kept = list(gpus)
    if need.gpu_pick == "all":
        return kept, []
    while True:
        # A GPU left out can make the shares of a worker fewer and so what each must hold more:
        # again, until nothing changes.
        each = max(1, gpus_each(kept[: need.total_gpus], need.num_workers, need.gpus_per_worker))
        least = None if need.needed_bytes is None else -(-need.needed_bytes // each)
        free = [gpu for gpu in kept if _has_room(gpu, least)]
        if len(free) == len(kept):
            return kept, [_why_left_out(gpu, least) for gpu in gpus if gpu not in kept]
        kept = free


def _has_room(gpu: Gpu, least_bytes: int | None) -> bool:
    if not gpu.total_bytes:
        return not gpu.holders
    return gpu.free_bytes >= (
        gpu.total_bytes * FREE_FRACTION if least_bytes is None else least_bytes
    )


def _why_left_out(gpu: Gpu, least_bytes: int | None) -> str:
    memory = (
        f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free" if gpu.total_bytes else "in use"
    )
    if least_bytes is not None and gpu.total_bytes:
        memory += f", the model needs {gib(least_bytes)} on it"
    if least_bytes is not None and gpu.total_bytes and least_bytes > gpu.total_bytes:
        return f"GPU {gpu.label} ({gpu.name}) is too small: {memory} (more GPUs per worker help)."
    holders = "; ".join(gpu.holders) or "processes that NVML does not show"
    return f"GPU {gpu.label} ({gpu.name}) is left out: {memory}; held by {holders}."
