"""Which of the visible GPUs may be given to workers, in which order, and why not the others.

Owns `gpu_pick`, and what makes a GPU idle, partly held or left out. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ragfleet.config import GpuPick
from ragfleet.errors import DeviceError
from ragfleet.inventory import Gpu, GpuInventory, gib

FREE_FRACTION: Final = 0.9
"""A GPU with this share of its memory free counts as idle: driver, ECC tables and a desktop's
display take a few percent of one."""
WEIGHTS_FACTOR: Final = 1.05
"""Layers don't split evenly, and each tensor is rounded up."""
WORK_BYTES: Final = 3 << 29
"""Least memory beside the weights on each GPU: CUDA's context, activations, a few requests."""


@dataclass(frozen=True, slots=True)
class Need:
    """What was asked for."""

    num_workers: int
    total_gpus: int | None
    gpus_per_worker: int | None
    weights_bytes: int | None
    """Of one worker's model, spread evenly over its GPUs; None: not known."""
    gpu_pick: GpuPick

    def least_bytes(self, each: int) -> int | None:
        """Memory that must be free on each of a worker's `each` GPUs."""
        if self.weights_bytes is None:
            return None
        return int(WEIGHTS_FACTOR * -(-self.weights_bytes // each)) + WORK_BYTES


def gpus_each(usable: Sequence[Gpu], num_workers: int, asked: int | None) -> int:
    """GPUs for each worker; 0 where there are fewer than workers."""
    each = asked or len(usable) // num_workers
    # MIG user guide, "CUDA device enumeration": a process can enumerate a single compute instance,
    # and no whole GPU beside it.
    return min(each, 1) if any(gpu.is_mig for gpu in usable[: each * num_workers]) else each


def is_idle(gpu: Gpu) -> bool:
    """Whether nobody computes on it, as far as can be seen."""
    if gpu.reserved_by is not None:
        return False
    if not gpu.total_bytes:
        return not gpu.computing
    return gpu.free_bytes >= gpu.total_bytes * FREE_FRACTION


def usable_of(inventory: GpuInventory, need: Need) -> tuple[list[Gpu], list[str]]:
    """The GPUs to share out, at least one, idle ones first; and the lines about the others.

    Raises DeviceError where there is none, with what each lacks.
    """
    kept, each = _pick(inventory.gpus, need)
    least = need.least_bytes(each)
    lines = [_why_left_out(gpu, least, need) for gpu in inventory.gpus if gpu not in kept]
    notes = [*inventory.notes, *lines]
    if not kept:
        raise DeviceError("\n".join([_none_left(inventory.gpus, need, each), *notes]))
    if need.total_gpus is not None and need.total_gpus > len(kept):
        notes.append(
            f"--total_gpus is {need.total_gpus}, but {len(kept)} can be used: using {len(kept)}."
        )
    return kept[: need.total_gpus], notes


def beside_others(gpu: Gpu) -> str:
    """The line about a GPU that is used although it is partly held."""
    return f"GPU {gpu.label} ({gpu.name}) is used beside others: {_memory(gpu)}; {_held_by(gpu)}."


def _pick(gpus: Sequence[Gpu], need: Need) -> tuple[list[Gpu], int]:
    """The GPUs with room, and how many of them a worker would have; where none has room, how many
    it would have had."""
    kept = [gpu for gpu in gpus if gpu.compute_mode != "prohibited"]
    each = 1
    if need.gpu_pick == "all":
        return kept, each
    kept.sort(key=lambda gpu: not is_idle(gpu))
    while kept:
        # A GPU left out can make the shares of a worker fewer and so what each must hold more:
        # again, until nothing changes.
        each = max(1, gpus_each(kept[: need.total_gpus], need.num_workers, need.gpus_per_worker))
        least = need.least_bytes(each)
        free = [gpu for gpu in kept if _has_room(gpu, least)]
        if len(free) == len(kept):
            break
        kept = free
    return kept, each


def _has_room(gpu: Gpu, least_bytes: int | None) -> bool:
    if gpu.reserved_by is not None or (gpu.compute_mode == "exclusive" and gpu.computing):
        return False
    if least_bytes is None or not gpu.total_bytes:
        return is_idle(gpu)
    return gpu.free_bytes >= least_bytes


def _why_left_out(gpu: Gpu, least_bytes: int | None, need: Need) -> str:
    name = f"GPU {gpu.label} ({gpu.name})"
    if gpu.compute_mode == "prohibited":
        return (
            f"{name} is left out: its compute mode prohibits any use (nvidia-smi -c DEFAULT allows"
            " it)."
        )
    if gpu.compute_mode == "exclusive" and gpu.computing:
        return f"{name} is left out: one process at a time may use it, and it is {_held_by(gpu)}."
    memory = _memory(gpu)
    if least_bytes is not None and gpu.total_bytes and gpu.reserved_by is None:
        memory += f", the model needs {gib(least_bytes)} on it"
        if _is_too_small(gpu, least_bytes):
            return f"{name} is too small: {memory} (more GPUs per worker help)."
    return f"{name} is left out: {memory}; {_held_by(gpu)}."


def _is_too_small(gpu: Gpu, least_bytes: int) -> bool:
    """Whether it would not do even if nobody else used it."""
    return bool(gpu.total_bytes) and (
        least_bytes > gpu.total_bytes or (is_idle(gpu) and least_bytes > gpu.free_bytes)
    )


def _memory(gpu: Gpu) -> str:
    if not gpu.total_bytes:
        return "in use"
    return f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"


def _held_by(gpu: Gpu) -> str:
    known = [*gpu.holders, *([gpu.reserved_by] if gpu.reserved_by is not None else [])]
    return f"held by {'; '.join(known) or 'processes that NVML does not show'}"


def _none_left(gpus: Sequence[Gpu], need: Need, each: int) -> str:
    least = need.least_bytes(each)
    message = f"None of the {len(gpus)} visible GPU(s) has room"
    larger = _larger_share(gpus, need, each)
    if least is not None and (larger or any(_is_too_small(gpu, least) for gpu in gpus)):
        message += (
            f" for {need.num_workers} worker(s) with {each} GPU(s) each, which takes {gib(least)}"
            " on each GPU"
        )
    if larger is not None:
        return f"{message}. What works: {larger}."
    return (
        f"{message}. Wait for one, or take them as they are with --gpu_pick all, or run with"
        " --device cpu."
    )


def _larger_share(gpus: Sequence[Gpu], need: Need, each: int) -> str | None:
    """The flags that give each worker enough GPUs for the model; None where nothing does."""
    if need.weights_bytes is None or any(gpu.is_mig for gpu in gpus):
        return None
    found = []
    for size in range(each + 1, len(gpus) + 1):
        num_fitting = sum(_has_room(gpu, need.least_bytes(size)) for gpu in gpus)
        if workers := min(num_fitting, need.total_gpus or num_fitting) // size:
            # Heads and layers split by most sizes that GPUs come in.
            found.append((len(gpus) % size != 0, size, workers))
    if not found:
        return None
    _, size, workers = min(found)
    return f"--num_workers {workers} --gpus_per_worker {size}"
