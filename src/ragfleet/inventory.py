"""What is known of a machine's GPUs: plain data, and a machine that isn't there.

Owns the words that discovery, picking and allocation share. It knows nothing of NVML, of
environment variables or of workers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

GIB = 1 << 30
ComputeMode = Literal["default", "exclusive", "prohibited"]
"""nvidia-smi -c: any number of processes, one at a time, none."""
_MPS: Final = "nvidia-cuda-mps-server"
"""It computes for others, and shares an exclusive GPU among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device that a process can be given: a whole GPU, or one MIG instance of it."""

    index: int
    """nvidia-smi's number of the (physical) GPU."""
    uuid: str
    """`GPU-…`, or `MIG-…` for an instance."""
    name: str
    total_bytes: int
    """0 where NVML cannot say, as on machines whose GPU shares the system's memory."""
    free_bytes: int
    holders: tuple[str, ...] = ()
    """Processes on it: 'pid 1234 (python), 20.1 GiB'. Other containers' processes don't show."""
    displays: tuple[str, ...] = ()
    """Those of `holders` that only draw, as a desktop does."""
    reserved_by: str | None = None
    """Another run of ragfleet that was given it; its memory need not show yet."""
    compute_mode: ComputeMode = "default"
    compute_capability: tuple[int, int] | None = None
    """(9, 0) is Hopper; None where NVML does not say."""
    parent_uuid: str | None = None
    """MIG only: the UUID of the physical GPU."""
    mig_name: str | None = None
    """MIG only: the older name, `MIG-GPU-<uuid>/<GPU instance>/<compute instance>`."""

    @property
    def is_mig(self) -> bool:
        return self.parent_uuid is not None

    @property
    def computing(self) -> tuple[str, ...]:
        """Those of `holders` that compute on it themselves."""
        return tuple(
            holder for holder in self.holders if holder not in self.displays and _MPS not in holder
        )

    @property
    def label(self) -> str:
        """Short, for tables: '3', or '0/MIG-1a2b3c4d'."""
        return f"{self.index}/{self.uuid[:12]}" if self.is_mig else str(self.index)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuInventory:
    """GPUs in the order in which workers get them."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Version of the NVIDIA driver, '550.54.15'."""
    cuda_driver: str | None = None
    """Newest CUDA the driver supports, '12.4'."""
    reason: str | None = None
    """Why `gpus` is empty."""
    failed: bool = False
    """Empty for a fault, not for want of a GPU: CPU must not be taken in silence."""
    notes: tuple[str, ...] = ()
    """Lines for the run's header: what was left out and why."""
    skipped: frozenset[int] = frozenset()
    """nvidia-smi's numbers of GPUs that are listed and can't be opened."""


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def reserved(inventory: GpuInventory, runs: Mapping[str, str]) -> GpuInventory:
    """With what other runs of ragfleet have marked as theirs: `runs` by UUID, in words."""
    gpus = [replace(gpu, reserved_by=runs.get(gpu.uuid, gpu.reserved_by)) for gpu in inventory.gpus]
    return replace(inventory, gpus=tuple(gpus))


def fake_inventory(
    count: int,
    total_gib: float = 80,
    *,
    busy: Mapping[int, str] | None = None,
    mig: Mapping[int, int] | None = None,
) -> GpuInventory:
    """A machine that isn't there, for tests and dry runs.

    `busy` maps a GPU's index to its holder, 'pid 7 (python), 70 GiB': that much is not free (all of
    it where no size is named). `mig` maps an index to the number of instances it is split into.
    """
    gpus: list[Gpu] = []
    for index in range(count):
        total_bytes = int(total_gib * GIB)
        holder = (busy or {}).get(index)
        size = re.search(r"([\d.]+) GiB", holder or "")
        used_bytes = int(float(size[1]) * GIB) if size else total_bytes if holder else 0
        whole = Gpu(
            index=index,
            uuid=f"GPU-{index:08x}-fa4e-4000-8000-{index:012x}",
            name="Fake GPU",
            total_bytes=total_bytes,
            free_bytes=max(0, total_bytes - used_bytes),
            holders=(holder,) if holder else (),
        )
        num_instances = (mig or {}).get(index)
        if num_instances is None:
            gpus.append(whole)
            continue
        for position in range(num_instances):
            gpus.append(
                replace(
                    whole,
                    uuid=f"MIG-{index:04x}{position:04x}-fa4e-4000-8000-{index:012x}",
                    total_bytes=whole.total_bytes // num_instances,
                    free_bytes=whole.free_bytes // num_instances,
                    parent_uuid=whole.uuid,
                    mig_name=f"MIG-{whole.uuid}/{position + 1}/0",
                )
            )
    return GpuInventory(
        gpus=tuple(gpus),
        driver="550.54.15",
        cuda_driver="12.4",
        reason=None if gpus else "no NVIDIA driver (fake).",
    )
