"""Which GPUs of a shared machine are taken, in which order, and what is said about the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ragfleet.allocation import Allocation, allocate
from ragfleet.errors import DeviceError
from ragfleet.inventory import GIB, Gpu, GpuInventory, fake_inventory
from ragfleet.picking import is_idle

LLAMA_70B = int(70.55 * 2e9)


def give(inventory: GpuInventory, num_workers: int, **options: Any) -> Allocation:
    return allocate(inventory, num_workers=num_workers, cpu_cores=16, **options)


def indices(allocation: Allocation) -> list[list[int]]:
    return [[gpu.index for gpu in worker.gpus] for worker in allocation.workers]


def with_gpu(inventory: GpuInventory, index: int, **facts: Any) -> GpuInventory:
    gpus = [replace(gpu, **facts) if gpu.index == index else gpu for gpu in inventory.gpus]
    return replace(inventory, gpus=tuple(gpus))


# ---- order


def test_idle_gpus_come_before_those_that_others_use() -> None:
    machine = fake_inventory(4, busy={0: "pid 7 (python), 40 GiB", 2: "pid 8 (python), 50 GiB"})
    allocation = give(machine, 2, gpus_per_worker=1, weights_bytes=15 * GIB)
    assert indices(allocation) == [[1], [3]]
    assert allocation.notes == ("2 worker(s) with 1 of 4 GPUs each: GPU 0, 2 unused.",)
    allocation = give(machine, 3, weights_bytes=15 * GIB)
    assert indices(allocation) == [[1], [3], [0]]
    assert allocation.notes == (
        "3 worker(s) with 1 of 4 GPUs each: GPU 2 unused.",
        "GPU 0 (Fake GPU) is used beside others: 40.0 GiB of 80.0 GiB free; held by pid 7 (python),"
        " 40 GiB.",
    )
    assert indices(give(machine, 1, total_gpus=2, weights_bytes=15 * GIB)) == [[1, 3]]


def test_a_shared_gpu_that_others_use_is_said() -> None:
    machine = fake_inventory(1, busy={0: "pid 7 (python), 40 GiB"})
    allocation = give(machine, 2, weights_bytes=10 * GIB)
    assert indices(allocation) == [[0], [0]]
    assert "used beside others" in allocation.notes[-1]


def test_all_takes_gpus_as_they_are_and_says_so() -> None:
    machine = fake_inventory(3, busy={0: "pid 7 (python), 70 GiB"})
    machine = with_gpu(machine, 1, reserved_by="another ragfleet run, pid 9")
    allocation = give(machine, 3, gpu_pick="all", weights_bytes=15 * GIB)
    assert indices(allocation) == [[0], [1], [2]]
    assert [note.partition(";")[2] for note in allocation.notes] == [
        " held by pid 7 (python), 70 GiB.",
        " held by another ragfleet run, pid 9.",
    ]


def test_what_another_run_reserved_is_left_out_however_empty_it_looks() -> None:
    machine = with_gpu(fake_inventory(2), 0, reserved_by="another ragfleet run, pid 9")
    allocation = give(machine, 1, weights_bytes=15 * GIB)
    assert indices(allocation) == [[1]]
    assert allocation.notes == (
        "GPU 0 (Fake GPU) is left out: 80.0 GiB of 80.0 GiB free; held by another ragfleet run,"
        " pid 9.",
    )
    alone = GpuInventory(gpus=machine.gpus[:1])
    with pytest.raises(DeviceError, match=r"(?s)--gpu_pick all.*another ragfleet run, pid 9"):
        give(alone, 1, weights_bytes=15 * GIB)


# ---- room for a model


def test_a_70b_fits_two_idle_gpus_of_80_gib() -> None:
    machine = fake_inventory(8, 79.0)
    assert indices(give(machine, 4, weights_bytes=LLAMA_70B)) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_too_small_a_share_is_reported_as_it_was_asked_and_with_what_works() -> None:
    with pytest.raises(DeviceError) as caught:
        give(fake_inventory(8, 60), 4, weights_bytes=LLAMA_70B)
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "None of the 8 visible GPU(s) has room for 4 worker(s) with 2 GPU(s) each, which takes"
        " 70.5 GiB on each GPU. What works: --num_workers 2 --gpus_per_worker 4."
    )
    assert len(lines) == 8
    assert "GPU 0 (Fake GPU) is too small: 60.0 GiB of 60.0 GiB free" in lines[0]
    assert indices(give(fake_inventory(8, 60), 2, weights_bytes=LLAMA_70B))[0] == [0, 1, 2, 3]


def test_one_worker_with_all_gpus_may_be_what_works() -> None:
    with pytest.raises(DeviceError, match=r"What works: --num_workers 1 --gpus_per_worker 2\.\n"):
        give(fake_inventory(2), 2, weights_bytes=LLAMA_70B)


def test_where_no_share_works_none_is_named() -> None:
    with pytest.raises(DeviceError) as caught:
        give(fake_inventory(2, 24), 1, weights_bytes=LLAMA_70B)
    assert "What works" not in str(caught.value)
    busy = fake_inventory(2, busy=dict.fromkeys(range(2), "pid 7, 79 GiB"))
    with pytest.raises(
        DeviceError, match=r"^None of the 2 visible GPU\(s\) has room\. Wait for one"
    ):
        give(busy, 2, weights_bytes=15 * GIB)


# ---- compute modes


def test_prohibited_gpus_are_never_used() -> None:
    machine = with_gpu(fake_inventory(2), 0, compute_mode="prohibited")
    for pick in ("free", "all"):
        allocation = give(machine, 1, gpu_pick=pick)
        assert indices(allocation) == [[1]]
        assert "compute mode prohibits any use" in allocation.notes[0]
    with pytest.raises(DeviceError, match="compute mode prohibits"):
        give(GpuInventory(gpus=machine.gpus[:1]), 1)


def test_an_exclusive_gpu_with_a_process_is_left_out_though_it_has_room() -> None:
    machine = fake_inventory(2, busy={0: "pid 7 (python), 1 GiB"})
    machine = with_gpu(machine, 0, compute_mode="exclusive")
    allocation = give(machine, 1, weights_bytes=GIB)
    assert indices(allocation) == [[1]]
    assert "one process at a time may use it" in allocation.notes[0]
    desktop = with_gpu(machine, 0, displays=("pid 7 (python), 1 GiB",))
    assert indices(give(desktop, 2, weights_bytes=GIB)) == [[0], [1]]
    mps = with_gpu(machine, 0, holders=("pid 7 (nvidia-cuda-mps-server), 0.1 GiB",))
    assert indices(give(mps, 2, weights_bytes=GIB)) == [[0], [1]]


def test_sharing_an_exclusive_gpu_is_refused() -> None:
    machine = with_gpu(fake_inventory(2), 1, compute_mode="exclusive")
    assert indices(give(machine, 3)) == [[0], [1], [0]]
    with pytest.raises(DeviceError, match=r"GPU 1 .*2 workers would share it.*--num_workers 2"):
        give(machine, 4)
    assert len(give(machine, 4, gpu_pick="all").workers) == 4


# ---- memory that NVML does not give


def test_a_desktop_does_not_hold_a_gpu_of_unknown_memory() -> None:
    gpu = Gpu(
        index=0,
        uuid="GPU-a",
        name="NVIDIA GB10",
        total_bytes=0,
        free_bytes=0,
        holders=("pid 8 (Xorg)", "pid 9 (gnome-shell)"),
        displays=("pid 8 (Xorg)", "pid 9 (gnome-shell)"),
    )
    assert is_idle(gpu)
    assert indices(give(GpuInventory(gpus=(gpu,)), 1, weights_bytes=15 * GIB)) == [[0]]
    held = replace(gpu, holders=(*gpu.holders, "pid 7 (python)"))
    with pytest.raises(DeviceError, match=r"in use; held by .*pid 7 \(python\)"):
        give(GpuInventory(gpus=(held,)), 1, weights_bytes=15 * GIB)
