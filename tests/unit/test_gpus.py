"""GPUs without GPUs: discovery against a stand-in for NVML, the rest against fake inventories."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragfleet.allocation import (
    Allocation,
    allocate,
    tensor_parallel_note,
    tensor_parallel_size,
    worker_environment,
)
from ragfleet.errors import DeviceError
from ragfleet.gpus import discover_gpus, explain_torch_blind, visible_gpus
from ragfleet.inventory import GIB, GpuInventory, fake_inventory


def indices(allocation: Allocation) -> list[list[int]]:
    return [[gpu.index for gpu in worker.gpus] for worker in allocation.workers]


def give(inventory: GpuInventory, num_workers: int, **options: Any) -> Allocation:
    return allocate(inventory, num_workers=num_workers, cpu_cores=16, **options)


# --- allocation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "workers", "each"), [(8, 4, 2), (8, 2, 4), (8, 8, 1), (4, 2, 2)])
@pytest.mark.parametrize("explicit", [False, True])
def test_documented_table(gpus: int, workers: int, each: int, explicit: bool) -> None:
    options = {"total_gpus": gpus, "gpus_per_worker": each} if explicit else {}
    allocation = give(fake_inventory(gpus), workers, **options)
    assert indices(allocation) == [list(range(i * each, (i + 1) * each)) for i in range(workers)]
    assert allocation.gpus_per_worker == each
    assert allocation.notes == ()


def test_four_of_eight() -> None:
    assert indices(give(fake_inventory(8), 2, total_gpus=4)) == [[0, 1], [2, 3]]


def test_five_usable_for_four_times_two() -> None:
    machine = fake_inventory(8, busy={1: "pid 7 (python), 70 GiB", 2: "pid 7", 6: "pid 8"})
    with pytest.raises(DeviceError) as caught:
        give(machine, 4, total_gpus=8, gpus_per_worker=2)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "need 8 GPUs" in message
    assert "can give 5" in message
    assert "--num_workers 2 --gpus_per_worker 2" in message
    assert "--num_workers 4 --gpus_per_worker 1" in message
    assert "pid 7 (python), 70 GiB" in message
    # Not asked for explicitly, it is arithmetic: one each, and one over.
    allocation = give(machine, 4, total_gpus=8)
    assert indices(allocation) == [[0], [3], [4], [5]]
    assert "--total_gpus is 8, but 5 can be used: using 5." in allocation.notes
    assert "4 worker(s) with 1 of 5 GPUs each: GPU 7 unused." in allocation.notes


def test_error_names_the_flag_that_limits() -> None:
    with pytest.raises(DeviceError, match="--total_gpus allows 4"):
        give(fake_inventory(8), 4, total_gpus=4, gpus_per_worker=2)


def test_error_when_neither_number_can_stay() -> None:
    with pytest.raises(DeviceError, match="--num_workers 1 --gpus_per_worker 2"):
        give(fake_inventory(2), 4, gpus_per_worker=4)


def test_busy_gpus_are_left_out_and_named() -> None:
    machine = fake_inventory(4, busy={0: "pid 7 (python), 70 GiB"})
    allocation = give(machine, 3)
    assert indices(allocation) == [[1], [2], [3]]
    (note,) = allocation.notes
    assert "GPU 0" in note
    assert "10.0 GiB of 80.0 GiB free" in note
    assert "pid 7 (python), 70 GiB" in note
    assert indices(give(machine, 4, gpu_pick="all")) == [[0], [1], [2], [3]]


def test_free_is_measured_against_the_need() -> None:
    machine = fake_inventory(4, busy={0: "pid 7, 40 GiB", 1: "pid 8, 70 GiB"})
    assert indices(give(machine, 3, weights_bytes=30 * GIB)) == [[2], [3], [0]]
    # 70 GiB over 4 GPUs would fit beside pid 7 and not beside pid 8; over the 3 that are left it is
    # 26 GiB each, which still fits.
    assert indices(give(machine, 1, weights_bytes=70 * GIB)) == [[2, 3, 0]]
    # 130 over 3 is 47 each: now GPU 0 falls out too, and 69.8 fit on each of the rest.
    assert indices(give(machine, 1, weights_bytes=130 * GIB)) == [[2, 3]]


def test_all_busy_is_an_error_not_cpu() -> None:
    with pytest.raises(DeviceError, match=r"(?s)--gpu_pick all.*--device cpu.*pid 9"):
        give(fake_inventory(1, busy={0: "pid 9"}), 1)


def test_too_large_a_model_is_told_apart_from_others_jobs() -> None:
    with pytest.raises(DeviceError, match=r"too small.*needs 148\.5 GiB"):
        give(fake_inventory(2), 2, weights_bytes=140 * GIB)
    assert indices(give(fake_inventory(2), 1, weights_bytes=140 * GIB)) == [[0, 1]]


def test_held_memory_without_a_visible_holder() -> None:
    gpu = replace(fake_inventory(1).gpus[0], free_bytes=GIB)
    with pytest.raises(DeviceError, match="processes that NVML does not show"):
        give(GpuInventory(gpus=(gpu,)), 1)


def test_unknown_memory_goes_by_holders() -> None:
    gpus = [replace(gpu, total_bytes=0, free_bytes=0) for gpu in fake_inventory(2).gpus]
    gpus[0] = replace(gpus[0], holders=("pid 7 (python)",))
    allocation = give(GpuInventory(gpus=tuple(gpus)), 2)
    assert indices(allocation) == [[1], [1]]
    assert allocation.workers[0].memory_bytes_per_gpu is None
    assert any("in use; held by pid 7" in note for note in allocation.notes)
    one_of_two = GpuInventory(gpus=(gpus[1], fake_inventory(2).gpus[0]))
    assert give(one_of_two, 1).workers[0].memory_bytes_per_gpu is None


def test_more_workers_than_gpus_share() -> None:
    allocation = give(fake_inventory(2), 5)
    assert indices(allocation) == [[0], [1], [0], [1], [0]]
    assert [worker.share for worker in allocation.workers] == [3, 2, 3, 2, 3]
    assert [worker.memory_bytes_per_gpu for worker in allocation.workers] == [
        80 * GIB // share for share in (3, 2, 3, 2, 3)
    ]
    (note,) = allocation.notes
    assert note.startswith("warning: 5 workers share 2 GPU(s)")
    assert "26.7 GiB" in note


def test_sharing_is_refused_where_the_model_cannot_fit() -> None:
    with pytest.raises(DeviceError, match="--num_workers 4 or fewer"):
        give(fake_inventory(2), 5, weights_bytes=30 * GIB)
    assert len(give(fake_inventory(2), 4, weights_bytes=30 * GIB).workers) == 4
    assert len(give(fake_inventory(2), 5, weights_bytes=30 * GIB, gpu_pick="all").workers) == 5


def test_explicit_gpus_per_worker_never_shares() -> None:
    with pytest.raises(DeviceError, match="need 5 GPUs"):
        give(fake_inventory(2), 5, gpus_per_worker=1)


def test_fewer_than_usable_are_said() -> None:
    allocation = give(fake_inventory(8), 2, gpus_per_worker=1)
    assert indices(allocation) == [[0], [1]]
    assert allocation.notes == ("2 worker(s) with 1 of 8 GPUs each: GPU 2, 3, 4, 5, 6, 7 unused.",)


def test_mig_instances_are_devices() -> None:
    allocation = give(fake_inventory(2, mig={0: 3}), 4)
    assert [worker.gpus[0].is_mig for worker in allocation.workers] == [True, True, True, False]
    environments = [worker_environment(worker) for worker in allocation.workers]
    assert environments[0]["CUDA_VISIBLE_DEVICES"].startswith("MIG-")
    assert environments[3]["CUDA_VISIBLE_DEVICES"].startswith("GPU-")


@pytest.mark.parametrize("asked", [None, 2])
def test_a_worker_never_gets_two_mig_instances(asked: int | None) -> None:
    allocation = give(fake_inventory(1, mig={0: 4}), 2, gpus_per_worker=asked)
    assert [len(worker.gpus) for worker in allocation.workers] == [1, 1]
    assert any("only one MIG instance" in note for note in allocation.notes)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"total_gpus": 0}])
def test_cpu_by_choice(options: dict[str, Any]) -> None:
    broken = GpuInventory(reason="broken", failed=True)
    for machine in (fake_inventory(8), fake_inventory(0), broken):
        allocation = give(machine, 3, **options)
        assert allocation.gpus_per_worker == 0
        assert allocation.notes == ()
        for worker, threads in zip(allocation.workers, ("6", "5", "5"), strict=True):
            assert worker_environment(worker) == {
                "CUDA_VISIBLE_DEVICES": "",
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                "OMP_NUM_THREADS": threads,
                "OMP_WAIT_POLICY": "PASSIVE",
                "GOMP_SPINCOUNT": "10000",
                "MKL_NUM_THREADS": threads,
            }


def test_cpu_for_want_of_a_gpu_even_when_gpus_are_asked_for() -> None:
    allocation = give(fake_inventory(0), 32, total_gpus=8, gpus_per_worker=2)
    assert {worker.num_threads for worker in allocation.workers} == {1}
    (note,) = allocation.notes
    assert note.startswith("Running on CPU (--total_gpus 8 asks for GPUs): ")
    (only,) = give(fake_inventory(0), 2, gpus_per_worker=2).notes
    assert only.startswith("Running on CPU (--gpus_per_worker 2 asks for GPUs): ")
    assert give(fake_inventory(0), 2).notes[0].startswith("Running on CPU: ")
    assert "no NVIDIA driver" in note


def test_a_broken_driver_is_an_error_not_cpu() -> None:
    with pytest.raises(DeviceError, match=r"version mismatch.*--device cpu"):
        give(GpuInventory(reason="Driver/library version mismatch.", failed=True), 1)


def test_environment_on_gpu_leaves_threads_alone() -> None:
    (worker,) = give(fake_inventory(2), 1).workers
    assert worker_environment(worker) == {
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in fake_inventory(2).gpus),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def test_impossible_numbers() -> None:
    with pytest.raises(ValueError):
        give(fake_inventory(1), 0)
    with pytest.raises(ValueError):
        allocate(fake_inventory(1), num_workers=1, cpu_cores=0)


def test_describe() -> None:
    assert give(fake_inventory(4), 2).describe() == (
        "worker  GPUs  free per GPU  threads\n"
        "0       0 1   80.0 GiB      -\n"
        "1       2 3   80.0 GiB      -"
    )
    assert "0/MIG-00000000" in give(fake_inventory(1, mig={0: 1}), 1).describe()
    assert "40.0 GiB (1/2)" in give(fake_inventory(1), 2).describe()
    assert give(fake_inventory(0), 1).describe().splitlines()[1] == "0       CPU   -             16"


@given(
    num_gpus=st.integers(0, 12),
    busy=st.sets(st.integers(0, 11)),
    mig=st.dictionaries(st.integers(0, 11), st.integers(1, 4), max_size=3),
    num_workers=st.integers(1, 16),
    total_gpus=st.none() | st.integers(0, 16),
    gpus_per_worker=st.none() | st.integers(1, 6),
    needed_gib=st.none() | st.integers(0, 300),
)
def test_allocations_are_disjoint_usable_and_even(
    *,
    num_gpus: int,
    busy: set[int],
    mig: dict[int, int],
    num_workers: int,
    total_gpus: int | None,
    gpus_per_worker: int | None,
    needed_gib: int | None,
) -> None:
    machine = fake_inventory(num_gpus, busy=dict.fromkeys(busy, "pid 7"), mig=mig)
    free = {gpu.uuid for gpu in machine.gpus if not gpu.holders}
    try:
        allocation = give(
            machine,
            num_workers,
            total_gpus=total_gpus,
            gpus_per_worker=gpus_per_worker,
            weights_bytes=None if needed_gib is None else needed_gib * GIB,
        )
    except DeviceError:
        assert num_gpus
        return
    assert [worker.worker for worker in allocation.workers] == list(range(num_workers))
    assert {len(worker.gpus) for worker in allocation.workers} == {allocation.gpus_per_worker}
    given_out = [uuid for worker in allocation.workers for uuid in worker.gpu_uuids]
    assert set(given_out) <= free
    if total_gpus is not None:
        assert len(set(given_out)) <= total_gpus
    for worker in allocation.workers:
        assert worker.share == max(1, given_out.count(worker.gpu_uuids[0]) if worker.gpus else 1)
        assert len(worker.gpus) <= 1 or not any(gpu.is_mig for gpu in worker.gpus)
        if needed_gib is not None and worker.gpus and not any(gpu.is_mig for gpu in worker.gpus):
            assert (worker.memory_bytes_per_gpu or 0) * len(worker.gpus) >= needed_gib * GIB
    if all(worker.share == 1 for worker in allocation.workers):
        assert len(set(given_out)) == len(given_out)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((8, 28), 7),
        ((8, 28, 4), 4),  # 7 ways would leave 4 key/value heads neither split nor repeated
        ((8, 32, 8), 8),
        ((8, 32, 2), 8),
        ((8, 71, 1), 1),
        ((6, 40, 40), 5),
        ((6, 40, 40, 13824), 4),
        ((4, 28, 4), 4),
        ((3, 28, 4), 2),
        ((1, 28, 4), 1),
        ((0, 28, 4), 1),
    ],
)
def test_tensor_parallel_size(arguments: tuple[int, ...], size: int) -> None:
    assert tensor_parallel_size(*arguments) == size


def test_tensor_parallel_note() -> None:
    note = tensor_parallel_note(8, 28, 4)
    assert note is not None
    assert "over 4 of each worker's 8 GPUs" in note
    assert "28 attention heads (4 key/value) don't split 8 ways; 4 of them untouched" in note
    assert "28 attention heads don't split" in (tensor_parallel_note(8, 28) or "")
    assert tensor_parallel_note(4, 28, 4) is None


# --- CUDA_VISIBLE_DEVICES -----------------------------------------------------------------------


UUIDS = [gpu.uuid for gpu in fake_inventory(4).gpus]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,1", [2, 1]),
        (" 3 , 0", [3, 0]),
        ("0,2,-1,1", [0, 2]),  # the CUDA programming guide's own example
        ("1gpu2,2ampere", [1, 2]),  # strtoul
        ("0,,1", [0]),
        ("1,9,2", [1]),
        (f"1,{UUIDS[2]}", [1]),
        (f"{UUIDS[2]},1", [2]),
        (f"{UUIDS[3]},{UUIDS[0]}", [3, 0]),
        ("GPU-00000002,GPU-00000001", [2, 1]),
        ("GPU-00000002,GPU-0000", [2]),  # not a unique prefix: the list ends
    ],
)
def test_outer_setting(value: str | None, expected: list[int]) -> None:
    visible = visible_gpus(fake_inventory(4), value)
    assert [gpu.index for gpu in visible.gpus] == expected
    assert not visible.failed


@pytest.mark.parametrize("value", ["", "-1", "-1,0", " ", "NoDevFiles", "none"])
def test_outer_setting_hides_all_on_purpose(value: str) -> None:
    visible = visible_gpus(fake_inventory(4), value)
    assert visible.gpus == ()
    assert not visible.failed
    (note,) = give(visible, 1).notes
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides all 4 GPUs" in note


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("0,0", "twice"),
        ("0,9,0", "twice"),
        (f"{UUIDS[1]},{UUIDS[1]}", "twice"),
        (f"{UUIDS[1]},GPU-00000001", "twice"),
        ("7", "'7'"),
        ("GPU-ffff", "'GPU-ffff'"),
        ("GPU-", "'GPU-'"),
        ("cuda:0", "'cuda:0'"),
        ("MIG-0", "'MIG-0'"),
    ],
)
def test_outer_setting_that_cuda_would_reject(value: str, why: str) -> None:
    visible = visible_gpus(fake_inventory(4), value)
    assert visible.gpus == ()
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=") as caught:
        give(visible, 1)
    assert why in str(caught.value)


def test_outer_setting_that_ends_early_is_said() -> None:
    (note,) = visible_gpus(fake_inventory(4), "1,9,2").notes
    assert "'9' is no GPU of this machine" in note
    assert visible_gpus(fake_inventory(4), "0,2,-1,1").notes == ()


def test_ordinals_on_mixed_models_are_said() -> None:
    first, second = fake_inventory(2).gpus
    mixed = GpuInventory(gpus=(first, replace(second, name="Another GPU")))
    (note,) = visible_gpus(mixed, "1").notes
    assert "PCI_BUS_ID" in note
    assert visible_gpus(mixed, second.uuid).notes == ()


def test_outer_mig_names() -> None:
    machine = fake_inventory(2, mig={0: 3})
    instances = [gpu for gpu in machine.gpus if gpu.is_mig]
    by_uuid = f"{instances[2].uuid},{instances[0].uuid}"
    assert visible_gpus(machine, by_uuid).gpus == (instances[2], instances[0])
    assert visible_gpus(machine, "MIG-00000001").gpus == (instances[1],)
    assert visible_gpus(machine, str(instances[1].mig_name)).gpus == (instances[1],)
    # An ordinal or the parent's UUID is the first instance, as for CUDA.
    assert visible_gpus(machine, "0").gpus == (instances[0],)
    assert visible_gpus(machine, str(instances[0].parent_uuid)).gpus == (instances[0],)
    assert visible_gpus(machine, f"{instances[0].uuid},{instances[0].mig_name}").failed


def test_nothing_to_restrict() -> None:
    assert visible_gpus(fake_inventory(0), "0") == fake_inventory(0)


# --- discovery ----------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NVMLErrorLibraryNotFound(NVMLError):
    pass


class NVMLErrorDriverNotLoaded(NVMLError):
    pass


class NVMLErrorNotSupported(NVMLError):
    pass


class NVMLErrorGpuIsLost(NVMLError):
    pass


@dataclass
class FakeHandle:
    uuid: str
    total_gib: float | None = 80
    used_gib: float = 0
    compute: Sequence[tuple[int, float | None]] = ()
    graphics: Sequence[tuple[int, float | None]] = ()
    mig_mode: int | None = None
    instances: dict[int, FakeHandle] = field(default_factory=dict)
    compute_mode: int = 0


@dataclass
class FakeNvml:
    """The calls of pynvml that discovery makes."""

    handles: Sequence[FakeHandle | NVMLError] = ()
    init_error: NVMLError | None = None
    count_error: NVMLError | None = None
    shut_down: int = 0

    NVMLError = NVMLError
    NVMLError_LibraryNotFound = NVMLErrorLibraryNotFound
    NVMLError_DriverNotLoaded = NVMLErrorDriverNotLoaded
    NVMLError_NotSupported = NVMLErrorNotSupported

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.init_error

    def nvmlShutdown(self) -> None:
        self.shut_down += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54.15"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12040

    def nvmlDeviceGetCount(self) -> int:
        if self.count_error:
            raise self.count_error
        return len(self.handles)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeHandle:
        handle = self.handles[index]
        if isinstance(handle, NVMLError):
            raise handle
        return handle

    def nvmlDeviceGetMigMode(self, handle: FakeHandle) -> list[int]:
        if handle.mig_mode is None:
            raise NVMLErrorNotSupported("Not Supported")
        return [handle.mig_mode, handle.mig_mode]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeHandle) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeHandle, index: int) -> FakeHandle:
        if index not in handle.instances:
            raise NVMLError("Not Found")
        return handle.instances[index]

    def nvmlDeviceGetGpuInstanceId(self, handle: FakeHandle) -> int:
        return 5

    def nvmlDeviceGetComputeInstanceId(self, handle: FakeHandle) -> int:
        return 0

    def nvmlDeviceGetComputeMode(self, handle: FakeHandle) -> int:
        return handle.compute_mode

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeHandle) -> list[int]:
        return [8, 0]

    def nvmlDeviceGetUUID(self, handle: FakeHandle) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: FakeHandle) -> str:
        return "NVIDIA A100-SXM4-80GB"

    def nvmlDeviceGetMemoryInfo(self, handle: FakeHandle) -> SimpleNamespace:
        if handle.total_gib is None:
            raise NVMLErrorNotSupported("Not Supported")
        return SimpleNamespace(
            total=int(handle.total_gib * GIB), free=int((handle.total_gib - handle.used_gib) * GIB)
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeHandle) -> list[SimpleNamespace]:
        return self._processes(handle.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeHandle) -> list[SimpleNamespace]:
        if handle.mig_mode is None and not handle.graphics:
            raise NVMLErrorNotSupported("Not Supported")
        return self._processes(handle.graphics)

    @staticmethod
    def _processes(processes: Sequence[tuple[int, float | None]]) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if used is None else int(used * GIB))
            for pid, used in processes
        ]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        names = {1234: "/opt/conda/bin/python train.py --api_key secret", 8: "Xorg"}
        if pid == 666:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        if pid not in names:
            raise NVMLError("Not Found")
        return names[pid]


def test_discovery() -> None:
    nvml = FakeNvml(
        handles=[
            FakeHandle("GPU-aaaa", compute=[(1234, 20.1)], graphics=[(8, 0.1), (1234, 20.1)]),
            FakeHandle("GPU-bbbb", total_gib=None, compute=[(99, None), (666, 1)]),
        ]
    )
    inventory = discover_gpus(nvml)
    first, second = inventory.gpus
    assert (first.index, first.uuid, first.total_bytes) == (0, "GPU-aaaa", 80 * GIB)
    assert first.holders == ("pid 8 (Xorg), 0.1 GiB", "pid 1234 (python), 20.1 GiB")
    assert first.displays == ("pid 8 (Xorg), 0.1 GiB",)
    assert first.computing == ("pid 1234 (python), 20.1 GiB",)
    assert (first.compute_mode, first.compute_capability) == ("default", (8, 0))
    assert (second.total_bytes, second.free_bytes) == (0, 0)
    assert second.holders == ("pid 99", "pid 666, 1.0 GiB")
    assert (inventory.driver, inventory.cuda_driver) == ("550.54.15", "12.4")
    assert (inventory.reason, inventory.failed, inventory.notes) == (None, False, ())
    assert nvml.shut_down == 1


@pytest.mark.parametrize(
    ("number", "mode"),
    [(0, "default"), (1, "exclusive"), (2, "prohibited"), (3, "exclusive"), (9, "default")],
)
def test_discovery_of_the_compute_mode(number: int, mode: str) -> None:
    (gpu,) = discover_gpus(FakeNvml(handles=[FakeHandle("GPU-a", compute_mode=number)])).gpus
    assert gpu.compute_mode == mode


def test_older_bindings_give_bytes_and_lack_calls() -> None:
    class Older(FakeNvml):
        def __getattribute__(self, name: str) -> Any:
            if name in ("nvmlDeviceGetComputeMode", "nvmlDeviceGetCudaComputeCapability"):
                raise AttributeError(name)
            return super().__getattribute__(name)

        def nvmlDeviceGetUUID(self, handle: FakeHandle) -> Any:
            return handle.uuid.encode()

        def nvmlDeviceGetName(self, handle: FakeHandle) -> Any:
            return b"Tesla V100-SXM2"

        def nvmlSystemGetDriverVersion(self) -> Any:
            return b"470.82"

        def nvmlSystemGetProcessName(self, pid: int) -> Any:
            return b"/usr/bin/python\xff"

    mig = FakeHandle("GPU-b", mig_mode=1, instances={0: FakeHandle("MIG-1")})
    inventory = discover_gpus(Older(handles=[FakeHandle("GPU-a", compute=[(7, 1)]), mig]))
    first, second = inventory.gpus
    assert (first.uuid, first.name, inventory.driver) == ("GPU-a", "Tesla V100-SXM2", "470.82")
    assert first.holders == ("pid 7 (python\ufffd), 1.0 GiB",)
    assert (second.parent_uuid, second.mig_name) == ("GPU-b", "MIG-GPU-b/5/0")
    assert (first.compute_mode, first.compute_capability) == ("default", None)


def test_slurms_list_goes_on_after_a_lost_gpu() -> None:
    handles = [FakeHandle(f"GPU-{number}") for number in range(4)]
    nvml = FakeNvml(handles=[*handles[:1], NVMLErrorGpuIsLost("GPU is lost"), *handles[2:]])
    inventory = discover_gpus(nvml)
    assert inventory.skipped == {1}
    visible = visible_gpus(inventory, "0,1,2,3")
    assert [gpu.index for gpu in visible.gpus] == [0, 2, 3]
    assert visible.notes == ("GPU 1 is left out: NVML says GPU is lost.",)
    assert [gpu.index for gpu in visible_gpus(inventory, "0,9,2").gpus] == [0]
    only = visible_gpus(inventory, "1")
    assert (only.gpus, only.failed) == ((), True)
    assert only.reason == "CUDA_VISIBLE_DEVICES='1': GPU 1 is left out: NVML says GPU is lost."


def test_discovery_of_mig() -> None:
    parent = FakeHandle(
        "GPU-aaaa",
        mig_mode=1,
        instances={
            0: FakeHandle("MIG-1111", total_gib=20),
            2: FakeHandle("MIG-2222", total_gib=10, used_gib=5, compute=[(1234, 5)]),
        },
    )
    inventory = discover_gpus(FakeNvml(handles=[parent, FakeHandle("GPU-bbbb", mig_mode=0)]))
    assert [(gpu.index, gpu.uuid, gpu.is_mig) for gpu in inventory.gpus] == [
        (0, "MIG-1111", True),
        (0, "MIG-2222", True),
        (1, "GPU-bbbb", False),
    ]
    assert inventory.gpus[0].parent_uuid == "GPU-aaaa"
    assert inventory.gpus[0].mig_name == "MIG-GPU-aaaa/5/0"
    assert inventory.gpus[1].free_bytes == 5 * GIB
    assert inventory.gpus[1].holders == ("pid 1234 (python), 5.0 GiB",)


def test_discovery_leaves_out_what_does_not_work() -> None:
    lost = NVMLErrorGpuIsLost("GPU is lost")
    empty = FakeHandle("GPU-cccc", mig_mode=1)
    inventory = discover_gpus(FakeNvml(handles=[lost, FakeHandle("GPU-bbbb"), empty]))
    assert [gpu.index for gpu in inventory.gpus] == [1]
    assert "GPU 0 is left out: NVML says GPU is lost." in inventory.notes
    assert any("GPU 2" in note and "no instance" in note for note in inventory.notes)
    nothing_left = discover_gpus(FakeNvml(handles=[lost]))
    assert nothing_left.failed
    with pytest.raises(DeviceError, match="GPU is lost"):
        give(nothing_left, 1)


@pytest.mark.parametrize(
    ("nvml", "failed", "reason"),
    [
        (FakeNvml(init_error=NVMLErrorLibraryNotFound("no library")), False, "no NVIDIA driver"),
        (FakeNvml(init_error=NVMLErrorDriverNotLoaded("not loaded")), False, "no NVIDIA driver"),
        (FakeNvml(init_error=NVMLError("version mismatch")), True, "version mismatch"),
        (FakeNvml(count_error=NVMLError("Unknown Error")), True, "Unknown Error"),
        (FakeNvml(), False, "lists no GPU"),
    ],
)
def test_no_gpu_is_told_apart_from_a_fault(nvml: FakeNvml, failed: bool, reason: str) -> None:
    inventory = discover_gpus(nvml)
    assert inventory.gpus == ()
    assert inventory.failed is failed
    assert reason in str(inventory.reason)


def test_missing_package_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    inventory = discover_gpus()
    assert inventory.failed
    assert "pip install nvidia-ml-py" in str(inventory.reason)


def test_real_nvml_never_raises() -> None:
    inventory = discover_gpus()
    assert bool(inventory.gpus) != bool(inventory.reason)


# --- torch that sees nothing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "cuda", "fix"),
    [
        ("2.13.0+cpu", None, "Install a CUDA build of torch for CUDA 12.4 or older"),
        ("2.13.0+cu130", "13.0", "Update the driver, or install a torch built for CUDA 12.x"),
        ("2.13.0+cu128", "12.8", "torch.cuda.init"),
    ],
)
def test_torch_blind(version: str, cuda: str | None, fix: str) -> None:
    error = explain_torch_blind(fake_inventory(4), version, cuda)
    assert isinstance(error, DeviceError)
    for part in ("4 GPU(s)", "550.54.15", version, fix, "--device cpu"):
        assert part in str(error)


def test_importing_loads_neither_torch_nor_nvml() -> None:
    code = "import sys, ragfleet.allocation; print(sorted({'torch', 'pynvml'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.strip() == "[]"
