"""Which worker of one machine gets which GPUs, and the environment that holds it to them.

Owns the arithmetic of `num_workers`, `total_gpus` and `gpus_per_worker`. Pure: what the machine is
like comes in as a `GpuInventory` and numbers, what follows goes out as an `Allocation`. It knows
nothing of processes, engines or ranks across machines: under torchrun it is called once a node,
with LOCAL_WORLD_SIZE, *before* any worker of the node loads a model (afterwards the workers' own
memory would look like somebody else's), and the result is handed to all of them.

GPUs are handed to workers by UUID: an ordinal names different GPUs under different
CUDA_DEVICE_ORDERs, and NVML's order and CUDA's need not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragfleet.config import Device, GpuPick
from ragfleet.errors import DeviceError
from ragfleet.inventory import Gpu, GpuInventory, gib
from ragfleet.picking import Need, beside_others, gpus_each, is_idle, usable_of


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerAllocation:
    """What one worker may use."""

    worker: int
    """0-based on this machine (torchrun's local rank)."""
    gpus: tuple[Gpu, ...] = ()
    """Empty: CPU."""
    num_threads: int = 1
    """CPU threads: its part of the cores, see `threads_of`. Set on CPU only."""
    share: int = 1
    """Workers on each of these GPUs; above 1 they are shared."""

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        return tuple(gpu.uuid for gpu in self.gpus)

    @property
    def cuda_visible_devices(self) -> str:
        """Value of CUDA_VISIBLE_DEVICES: UUIDs, or '' (which hides all GPUs) on CPU."""
        return ",".join(self.gpu_uuids)

    @property
    def memory_bytes_per_gpu(self) -> int | None:
        """Free bytes on the fullest of its GPUs, divided by `share`; None on CPU or if unknown."""
        if not self.gpus or not all(gpu.total_bytes for gpu in self.gpus):
            return None
        return min(gpu.free_bytes for gpu in self.gpus) // self.share


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """All workers of one machine, in order."""

    workers: tuple[WorkerAllocation, ...]
    gpus_per_worker: int
    """0: CPU."""
    notes: tuple[str, ...] = ()
    """One-liners for the header: what is left out, unused, shared, and why."""
    is_worked_out: bool = False
    """The model is to be split over all of a worker's GPUs: that is why it has so many."""

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """All that are given out, each once."""
        found = {gpu.uuid: gpu for worker in self.workers for gpu in worker.gpus}
        return tuple(found.values())

    def describe(self) -> str:
        """A plain-text table, a line per worker."""
        rows = [("worker", "GPUs", "free per GPU", "threads")]
        for worker in self.workers:
            memory = worker.memory_bytes_per_gpu
            rows.append(
                (
                    str(worker.worker),
                    " ".join(gpu.label for gpu in worker.gpus) or "CPU",
                    ("-" if memory is None else gib(memory))
                    + (f" (1/{worker.share})" if worker.share > 1 else ""),
                    "-" if worker.gpus else str(worker.num_threads),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def allocate(
    inventory: GpuInventory,
    *,
    num_workers: int,
    cpu_cores: int,
    total_gpus: int | None = None,
    gpus_per_worker: int | None = None,
    gpu_pick: GpuPick = "free",
    device: Device = "auto",
    weights_bytes: int | None = None,
) -> Allocation:
    """Give worker i the usable GPUs [i·g, (i+1)·g), g = `gpus_per_worker` or total // workers.

    `inventory` holds the *visible* GPUs (`visible_gpus(discover_gpus(), …)`); the usable ones are,
    with `gpu_pick` 'free', those with room for `weights_bytes`, the weights of one worker's model
    spread evenly over its GPUs (None: not known, then nearly all memory must be free). Idle ones
    come first, then partly held ones, each in the order of the inventory.
    `total_gpus` None is all usable ones, 0 is CPU. More workers than GPUs share them round-robin.

    CPU is taken only where `device` is 'cpu', no GPU is asked for, or there is none to be seen.

    Raises DeviceError: the driver fails, all GPUs are held by others, `gpus_per_worker` times
    `num_workers` is more than there are, or the share of a GPU is too small for the model.
    """
    if num_workers < 1 or cpu_cores < 1:
        raise ValueError(f"num_workers={num_workers} and cpu_cores={cpu_cores} must be at least 1.")
    if device == "cpu" or total_gpus == 0:
        return _on_cpu(num_workers, cpu_cores)
    if inventory.failed:
        raise DeviceError(f"No GPU can be used: {inventory.reason} Or run with --device cpu.")
    if not inventory.gpus:
        asked = f" (--total_gpus {total_gpus} asks for GPUs)" if total_gpus else ""
        if gpus_per_worker and not total_gpus:
            asked = f" (--gpus_per_worker {gpus_per_worker} asks for GPUs)"
        why = inventory.reason or "there is no GPU."
        return _on_cpu(num_workers, cpu_cores, f"Running on CPU{asked}: {why}")
    need = Need(num_workers, total_gpus, gpus_per_worker, weights_bytes, gpu_pick)
    usable, notes = usable_of(inventory, need)
    each = gpus_each(usable, num_workers, gpus_per_worker)
    if each * num_workers > len(usable):
        raise DeviceError("\n".join([_too_few(len(usable), num_workers, each, total_gpus), *notes]))
    if each == 0:
        workers = _round_robin(usable, num_workers)
        _check_exclusive(workers, need)
        notes.append(_sharing_note(usable, workers, need))
        notes += [beside_others(gpu) for gpu in usable[:num_workers] if not is_idle(gpu)]
        return Allocation(workers=workers, gpus_per_worker=1, notes=tuple(notes))
    if each < (gpus_per_worker or len(usable) // num_workers):
        notes.append(
            "1 device per worker: CUDA shows a process only one MIG instance, whatever it is given."
        )
    if unused := usable[each * num_workers :]:
        notes.append(
            f"{num_workers} worker(s) with {each} of {len(usable)} GPUs each: GPU"
            f" {', '.join(gpu.label for gpu in unused)} unused."
        )
    notes += [beside_others(gpu) for gpu in usable[: each * num_workers] if not is_idle(gpu)]
    workers = tuple(
        WorkerAllocation(worker=i, gpus=tuple(usable[i * each : (i + 1) * each]))
        for i in range(num_workers)
    )
    return Allocation(workers=workers, gpus_per_worker=each, notes=tuple(notes))


def usable_gpus(inventory: GpuInventory, *, total_gpus: int | None, gpu_pick: GpuPick) -> list[Gpu]:
    """The GPUs that `allocate` would share out among workers whose need is not known.

    Raises DeviceError where others hold all of them.
    """
    return usable_of(inventory, Need(1, total_gpus, None, None, gpu_pick))[0]


def worker_environment(allocation: WorkerAllocation) -> dict[str, str]:
    """Variables for one worker's process.

    The parent sets them when it starts the worker: CUDA and OpenMP read them once, when torch is
    imported. Thread counts are set on CPU only, and over torchrun's OMP_NUM_THREADS=1.
    """
    environment = {
        "CUDA_VISIBLE_DEVICES": allocation.cuda_visible_devices,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    if not allocation.gpus:
        environment["OMP_NUM_THREADS"] = str(allocation.num_threads)
        environment["MKL_NUM_THREADS"] = str(allocation.num_threads)
        # Threads that spin while they wait take the cores from other workers and other people:
        # on busy cores one worker of two threads was four to ten times slower without this.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        # For some 50 us they do: less than waking up takes, and most of an engine's waits.
        environment["GOMP_SPINCOUNT"] = "10000"
    return environment


def tensor_parallel_size(
    num_gpus: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
) -> int:
    """The most GPUs, at most `num_gpus`, that an engine which splits heads can use for a model.

    vLLM's conditions: the size divides the attention heads; it divides the key/value heads, or they
    divide it (each is then replicated); it divides the MLP's intermediate size. What isn't given is
    not checked (key/value heads default to the attention heads).
    """
    key_value_heads = num_key_value_heads or num_attention_heads
    for size in range(num_gpus, 1, -1):
        if (
            num_attention_heads % size == 0
            and (key_value_heads % size == 0 or size % key_value_heads == 0)
            and (intermediate_size or 0) % size == 0
        ):
            return size
    return 1


def tensor_parallel_note(
    num_gpus: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
) -> str | None:
    """The line that says what of a worker's GPUs stays untouched; None where all are used."""
    size = tensor_parallel_size(
        num_gpus, num_attention_heads, num_key_value_heads, intermediate_size
    )
    if size >= num_gpus:
        return None
    heads = f"{num_attention_heads} attention heads"
    if num_key_value_heads is not None:
        heads += f" ({num_key_value_heads} key/value)"
    return (
        f"tensor parallel over {size} of each worker's {num_gpus} GPUs: {heads} don't split"
        f" {num_gpus} ways; {num_gpus - size} of them untouched."
    )


def threads_of(num_workers: int, cpu_cores: int) -> list[int]:
    """Of each worker on the CPU: no core is left over, so the first ones may have one more."""
    least, over = divmod(cpu_cores, num_workers)
    return [max(1, least + (worker < over)) for worker in range(num_workers)]


def _on_cpu(num_workers: int, cpu_cores: int, *notes: str) -> Allocation:
    threads = threads_of(num_workers, cpu_cores)
    workers = tuple(WorkerAllocation(worker=i, num_threads=num) for i, num in enumerate(threads))
    return Allocation(workers=workers, gpus_per_worker=0, notes=notes)


def _too_few(num_gpus: int, num_workers: int, each: int, total_gpus: int | None) -> str:
    pairs = [
        (workers, gpus)
        for workers, gpus in ((num_gpus // each, each), (num_workers, num_gpus // num_workers))
        if workers and gpus
    ] or [(1, num_gpus), (num_gpus, 1)]
    ways = ", or ".join(
        f"--num_workers {workers} --gpus_per_worker {gpus}"
        for workers, gpus in dict.fromkeys(pairs)
    )
    source = "--total_gpus allows" if total_gpus == num_gpus else "this machine can give"
    return (
        f"{num_workers} workers with --gpus_per_worker {each} need {num_workers * each} GPUs, but"
        f" {source} {num_gpus}. What works: {ways}."
    )


def _round_robin(usable: Sequence[Gpu], num_workers: int) -> tuple[WorkerAllocation, ...]:
    return tuple(
        WorkerAllocation(
            worker=i,
            gpus=(usable[i % len(usable)],),
            share=len(range(i % len(usable), num_workers, len(usable))),
        )
        for i in range(num_workers)
    )


def _least_share(workers: Sequence[WorkerAllocation]) -> int | None:
    shares = [worker.memory_bytes_per_gpu for worker in workers]
    return min((share for share in shares if share is not None), default=None)


def _check_exclusive(workers: Sequence[WorkerAllocation], need: Need) -> None:
    """Raises DeviceError where several workers would share a GPU that only one process may use."""
    for worker in workers:
        (gpu,) = worker.gpus
        if worker.share > 1 and gpu.compute_mode == "exclusive" and need.gpu_pick == "free":
            num_gpus = len({other.gpus[0].uuid for other in workers})
            raise DeviceError(
                f"GPU {gpu.label} ({gpu.name}) lets one process use it at a time (its compute mode"
                f" is exclusive), but {worker.share} workers would share it. Use --num_workers"
                f" {num_gpus} or fewer, or nvidia-smi -c DEFAULT; where MPS shares it, --gpu_pick"
                " all."
            )


def _sharing_note(usable: Sequence[Gpu], workers: Sequence[WorkerAllocation], need: Need) -> str:
    """The warning; DeviceError where the model cannot fit into the share."""
    least = _least_share(workers)
    needed = need.least_bytes(1) or 0
    if least is not None and least < needed and need.gpu_pick == "free":
        fitting = len(usable)  # one worker each fits, or the GPU would have been left out
        while (_least_share(_round_robin(usable, fitting + 1)) or 0) >= needed:
            fitting += 1
        raise DeviceError(
            f"{len(workers)} workers share {len(usable)} GPU(s), {gib(least)} for one of them, but"
            f" the model needs {gib(needed)}. Use --num_workers {fitting} or fewer, or --gpu_pick"
            " all to try it anyway."
        )
    part = "an unknown part of the memory" if least is None else f"{gib(least)} or more"
    return (
        f"warning: {len(workers)} workers share {len(usable)} GPU(s) round-robin, {part} for each;"
        f" {len(usable)} worker(s) would have one to themselves."
    )
