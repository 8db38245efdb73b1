"""How many workers a run has and what each gets: the question to the machine, `layout` answers it.

Owns `--num_workers`, its default and `auto`, and the facts that the pure modules need: the model's
size from its files, memory and cores of this machine, about how long the prompts are. Nothing is
loaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ragfleet.allocation import Allocation, allocate, usable_gpus
from ragfleet.config import RunConfig
from ragfleet.engines.vllm_options import told_gpus
from ragfleet.errors import ConfigError, DeviceError, ModelError
from ragfleet.gpu_locks import GpuLocks
from ragfleet.inventory import GpuInventory, gib, reserved
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.layout import (
    Demand,
    ModelSize,
    Split,
    check_memory,
    choose_gpus,
    cpu_workers,
    engine_gpus,
    faster_layout,
    layout_of,
    layouts,
)
from ragfleet.loop_memory import LoopMemory, loop_memory
from ragfleet.model_files import context_limit, read_json, weights_bytes

_WANTED_REQUESTS: Final = 64
"""In flight at a worker, so that reading the weights is shared by many."""
_SAMPLED_BYTES: Final = 1 << 20
_BYTES_PER_TOKEN: Final = 3.5
_FRAME_TOKENS: Final = 60
"""System prompt, heading and chat template around a record."""
_CPU_SIZED_BYTES: Final = 4 << 30
"""Weights, in fp32 a billion parameters, that a CPU still answers with in bearable time."""


@dataclass(frozen=True, kw_only=True)
class Seating:
    """What seats are made from.

    Attributes:
        needs_no_gpu: the engine computes nothing here, or nothing at all.
        is_remote: a server computes; one worker keeps it busy.
        gpu_precision, cpu_precision: of the weights, there and there.
        splits_heads: the engine computes one model on several GPUs at once.
    """

    config: RunConfig
    torchrun: TorchrunRank | None
    environ: Mapping[str, str]
    inventory: GpuInventory
    model_dir: Path | None
    needs_no_gpu: bool = False
    is_remote: bool = False
    gpu_precision: str = "bf16"
    cpu_precision: str = "fp32"
    splits_heads: bool = False

    @property
    def split(self) -> Split:
        return "heads" if self.splits_heads else "layers"

    @property
    def on_cpu(self) -> bool:
        config = self.config
        return (
            self.needs_no_gpu
            or config.device == "cpu"
            or config.total_gpus == 0
            or not (self.inventory.gpus or self.inventory.failed)
        )


def seat_alone(
    seating: Seating, locks: GpuLocks, *, take: bool
) -> tuple[int, Allocation, list[str]]:
    """`seat`, on GPUs that no other run of ragfleet has been given.

    `take`: theirs from now on, until `locks` are released; else they are only looked at.
    """
    config = seating.config
    if seating.on_cpu:
        return seat(seating)
    inventory = seating.inventory
    if config.gpu_pick == "free":
        inventory = reserved(inventory, locks.holders(gpu.uuid for gpu in inventory.gpus))
    while True:
        num_workers, allocation, notes = seat(replace(seating, inventory=inventory))
        if not take:
            return num_workers, allocation, notes
        given = (gpu.uuid for gpu in allocation.gpus)
        lost = locks.take(given, all_or_none=config.gpu_pick == "free")
        if not lost or config.gpu_pick == "all":
            return num_workers, allocation, [*notes, *([locks.note] if locks.note else [])]
        # Another run was quicker. Each round marks at least one more, so this ends.
        inventory = reserved(inventory, lost)


def seat(seating: Seating) -> tuple[int, Allocation, list[str]]:
    """(number of workers, what each gets, lines for the header).

    Raises ConfigError and DeviceError, with the sums where nothing fits.
    """
    config, inventory, notes = seating.config, seating.inventory, []
    sizes = None if config.gpus_per_worker is None else [config.gpus_per_worker]
    gpus_per_worker = config.gpus_per_worker
    is_auto = config.num_workers == "auto" and seating.torchrun is None
    num_workers = 1 if is_auto else count_workers(config, seating.torchrun)
    if is_auto and seating.on_cpu:
        num_workers, note = _auto_on_cpu(seating)
        notes.append(note)
    elif is_auto and not inventory.failed:
        num_workers, gpus_per_worker, note, inventory = _auto_on_gpus(seating, sizes)
        notes.append(note)
    if seating.on_cpu:
        _check_cpu(seating, num_workers)
    allocation = allocate(
        inventory,
        num_workers=num_workers,
        cpu_cores=usable_cores(),
        total_gpus=0 if seating.needs_no_gpu else config.total_gpus,
        gpus_per_worker=None if seating.needs_no_gpu else gpus_per_worker,
        gpu_pick=config.gpu_pick,
        device="cpu" if seating.needs_no_gpu else config.device,
        # What is chosen by the sums above takes GPUs that are free as a whole.
        weights_bytes=None if is_auto else _weights(seating, seating.gpu_precision),
    )
    if is_auto and sizes is None:
        allocation = replace(allocation, is_worked_out=True)
    if not is_auto:
        notes += _more_on_cpu(seating) if seating.on_cpu else _faster(seating, allocation)
    return num_workers, allocation, notes


def count_workers(config: RunConfig, torchrun: TorchrunRank | None) -> int:
    """What is asked for; under torchrun what it started. `auto` is 1 here."""
    asked = None if config.num_workers == "auto" else config.num_workers
    if torchrun is None:
        return asked or 1
    if config.api_mode == "batch" and torchrun.world_size > 1:
        raise ConfigError("--api_mode batch needs one worker: start it without torchrun.")
    if asked not in (None, torchrun.world_size):
        raise ConfigError(
            f"--num_workers {config.num_workers} and torchrun's {torchrun.world_size} processes"
            " disagree; leave --num_workers out under torchrun."
        )
    return torchrun.world_size


def usable_cores() -> int:
    """Cores this process may run on (an outer taskset or a container's cpuset is respected)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- what is asked for, on the CPU


def _check_cpu(seating: Seating, num_workers: int) -> None:
    """Raises DeviceError where the CPU is no place for what was asked for."""
    config, weights = seating.config, _weights(seating, seating.cpu_precision)
    if weights is None or seating.needs_no_gpu:
        return
    asked = [
        f"--{name} {value}"
        for name in ("total_gpus", "gpus_per_worker")
        if (value := getattr(config, name)) and config.total_gpus != 0
    ]
    if asked and weights > _CPU_SIZED_BYTES:
        raise DeviceError(
            f"{' and '.join(asked)}: no GPU can be used here:"
            f" {seating.inventory.reason or 'there is none.'} On the CPU a model of {gib(weights)}"
            f" ({seating.cpu_precision}) would take days. Start it where there are GPUs, or with"
            f" --device cpu and without {' and '.join(word.split()[0] for word in asked)}."
        )
    # A class of the user's may never load the model.
    if config.inference_class is None:
        check_memory(num_workers, whole_memory_bytes(), weights, _bf16_weights(seating))


def _weights(seating: Seating, precision: str) -> int | None:
    """Bytes of the loaded weights; None where there are none, or they can't be read: then the
    run's identity can't be made either, and says so better."""
    if seating.model_dir is None:
        return None
    try:
        return weights_bytes(seating.model_dir, _precision_bytes(precision)) or None
    except ModelError:
        return None


def _bf16_weights(seating: Seating) -> int | None:
    return _weights(seating, "bf16") if seating.cpu_precision == "fp32" else None


# ---- auto


def _auto_on_cpu(seating: Seating) -> tuple[int, str]:
    if seating.is_remote:
        return 1, "auto: 1 worker, which keeps --max_concurrency requests at the API under way."
    asked = seating.environ.get("OMP_NUM_THREADS", "")
    num_threads = int(asked) if asked.isdigit() and int(asked) else 1
    weights, loop = None, LoopMemory()
    if seating.model_dir is not None and not seating.needs_no_gpu:
        weights = weights_bytes(seating.model_dir, _precision_bytes(seating.cpu_precision))
        loop = _loop_memory(seating, seating.model_dir)
    available = available_memory_bytes()
    workers, why = cpu_workers(
        usable_cores(),
        num_threads,
        available,
        weights,
        loop.of_worker,
        is_asked=loop.asked_bytes is not None,
        bf16_bytes=_bf16_weights(seating),
    )
    return workers, f"auto: {why}"


def _loop_memory(seating: Seating, model_dir: Path) -> LoopMemory:
    size = read_model_size(model_dir, _precision_bytes(seating.cpu_precision))
    memory_bytes, num_cores = whole_memory_bytes() or 0, os.cpu_count() or 1
    return loop_memory(seating.config, model_dir, size, memory_bytes, num_cores)


def _auto_on_gpus(seating: Seating, sizes: list[int] | None) -> tuple[int, int, str, GpuInventory]:
    """(workers, GPUs of each, the line with the sum, the GPUs without those that are too small)."""
    config, inventory = seating.config, seating.inventory
    gpus = usable_gpus(inventory, total_gpus=config.total_gpus, gpu_pick=config.gpu_pick)
    told = told_gpus(config.engine_options) if seating.splits_heads and sizes is None else None
    asked = f"--gpus_per_worker {sizes[0]}" if sizes else f"--engine_options, {told} a worker,"
    sizes = [told] if told else sizes
    if sizes and sizes[0] > len(gpus):
        raise DeviceError(f"{asked} is more than the {len(gpus)} usable GPUs.")
    model = _model_size(seating)
    if any(gpu.is_mig for gpu in gpus):
        sizes = [1]
    has_memory = all(gpu.total_bytes for gpu in gpus)
    if model is None or not has_memory:
        num_gpus = sizes[0] if sizes else 1
        workers = len(gpus) // num_gpus
        unknown = "the model's size" if has_memory else "the GPUs' memory"
        return workers, num_gpus, f"auto: {workers}×{num_gpus}: {unknown} is not known.", inventory
    free = [gpu.free_bytes for gpu in gpus]
    demand, is_told = _demand(seating), told is not None
    layout, least = choose_gpus(free, model, demand, seating.split, sizes, is_told=is_told)
    note = f"auto: {layout.name}: {layout.arithmetic()}."
    small = [gpu for gpu in gpus if gpu.free_bytes < least]
    if small:
        note += f" GPU {', '.join(gpu.label for gpu in small)} left out: the others hold more."
        kept = tuple(gpu for gpu in inventory.gpus if gpu not in small)
        inventory = replace(inventory, gpus=kept)
    num_gpus = sizes[0] if sizes else layout.num_gpus
    return layout.num_workers, num_gpus, note, inventory


def _more_on_cpu(seating: Seating) -> list[str]:
    """The line for who left the number of workers open where a model runs on several cores."""
    is_open = seating.config.num_workers is None and seating.torchrun is None
    if not is_open or seating.model_dir is None or seating.needs_no_gpu or seating.is_remote:
        return []
    try:
        workers, _ = _auto_on_cpu(seating)
    except (DeviceError, ModelError):  # that is for others to say, who say it better
        return []
    if workers == 1:
        return []
    return [
        f"--num_workers auto would start {workers}; with a small model two of one thread were 1.15"
        " times as fast as one of two."
    ]


def _faster(seating: Seating, allocation: Allocation) -> list[str]:
    """The line about a faster split, where the numbers that were asked for are not the best."""
    config, model = seating.config, _model_size(seating)
    given = [gpu for worker in allocation.workers for gpu in worker.gpus]
    shared = any(worker.share > 1 for worker in allocation.workers)
    if model is None or shared or not given or not all(gpu.total_bytes for gpu in given):
        return []
    try:
        usable = usable_gpus(
            seating.inventory, total_gpus=config.total_gpus, gpu_pick=config.gpu_pick
        )
    except DeviceError:  # partly held GPUs, with room enough for what was asked for
        return []
    if any(gpu.is_mig for gpu in usable) or told_gpus(config.engine_options):
        return []
    demand, taken = _demand(seating), allocation.gpus_per_worker
    free = [gpu.free_bytes for gpu in given]
    all_free = [gpu.free_bytes for gpu in usable]
    found = layouts(all_free, model, demand, seating.split)
    if seating.splits_heads:  # the engine takes as few of them as will do, of other numbers too
        taken = engine_gpus(free, model, taken)
        found = [one for one in found if engine_gpus(all_free, model, one.num_gpus) == one.num_gpus]
    current = layout_of(free, model, demand, len(allocation.workers), taken, seating.split)
    flag = "--num_workers" if seating.torchrun is None else "torchrun --nproc_per_node"
    line = faster_layout(current, found, flag)
    return [] if line is None else [line]


def _demand(seating: Seating) -> Demand:
    config = seating.config
    assert seating.model_dir is not None
    prompt = typical_prompt_tokens(config.contexts_file)
    limit = config.max_model_len or context_limit(seating.model_dir)
    if limit is not None:
        prompt = min(prompt, max(1, limit - config.max_new_tokens))
    return Demand(
        num_requests=config.batch_size or _WANTED_REQUESTS,
        prompt_tokens=prompt,
        answer_tokens=config.max_new_tokens,
    )


def typical_prompt_tokens(contexts_file: Path) -> int:
    """About how many tokens a prompt has, by the first lines of the file; 512 where unreadable."""
    try:
        with open(contexts_file, "rb") as file:
            lines = file.readlines(_SAMPLED_BYTES)
    except OSError:
        return 512
    mean_bytes = sum(map(len, lines)) / max(1, len(lines))
    return _FRAME_TOKENS + math.ceil(mean_bytes / _BYTES_PER_TOKEN)


# ---- the model and the machine


def _precision_bytes(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _model_size(seating: Seating) -> ModelSize | None:
    if seating.model_dir is None:
        return None
    return read_model_size(seating.model_dir, _precision_bytes(seating.gpu_precision))


def read_model_size(model_dir: Path, dtype_bytes: int) -> ModelSize | None:
    """Of a model's files; None where config.json does not say enough. Raises ModelError."""
    config = read_json(model_dir / "config.json")
    config = config.get("text_config") or config

    def number(*names: str) -> int | None:
        found = (config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    layers = number("num_hidden_layers", "n_layer", "n_layers")
    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head", "n_heads")
    if layers is None or hidden is None or heads is None:
        return None
    return ModelSize(
        weights_bytes=weights_bytes(model_dir, dtype_bytes),
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads") or heads,
        head_dim=number("head_dim") or hidden // heads,
        vocab_size=number("vocab_size") or 32_000,
        dtype_bytes=dtype_bytes,
    )


def available_memory_bytes() -> int | None:
    """Memory that new processes can have without swapping; a container's limit counts."""
    return _memory_bytes("MemAvailable:")


def whole_memory_bytes() -> int | None:
    """Memory of the machine, or the container."""
    return _memory_bytes("MemTotal:")


def _memory_bytes(which: str) -> int | None:
    available = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(which):
                available = int(line.split()[1]) << 10
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return available
    return min(available, int(limit)) if available is not None and limit.isdigit() else available
