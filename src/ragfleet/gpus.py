"""GPUs: which there are, who holds them, which of them an outer setting lets us see.

Owns discovery through NVML and the reading of CUDA_VISIBLE_DEVICES; what is found is an
`inventory.GpuInventory`, and `ragfleet.allocation` shares it out. It must not import torch (the
parent that calls it sets the workers' environment before any of them does) and knows nothing of
workers, engines or files. Only `discover_gpus` touches the machine; all else is a function of its
arguments.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ragfleet.errors import DeviceError
from ragfleet.inventory import ComputeMode, Gpu, GpuInventory, gib

_COMPUTE_MODES: Final[Mapping[int, ComputeMode]] = {
    0: "default",
    1: "exclusive",  # for each thread, which is long gone
    2: "prohibited",
    3: "exclusive",
}
_PROCESS_LISTINGS: Final = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
)


def discover_gpus(nvml: Any = None) -> GpuInventory:
    """The GPUs of this machine as the NVIDIA driver reports them, MIG instances one by one.

    `nvml` is the pynvml module, or a stand-in. Never raises for what the machine lacks: without a
    driver or a GPU the inventory is empty and says why; `failed` marks a driver that is there and
    does not work. Calls that one GPU does not support leave their fields at 0 or empty.
    """
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return GpuInventory(
                reason="GPUs cannot be listed: the Python package nvidia-ml-py is missing"
                " (pip install nvidia-ml-py).",
                failed=True,
            )
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded) as error:
        return GpuInventory(reason=f"no NVIDIA driver ({error}).")
    except nvml.NVMLError as error:
        return _broken(error)
    try:
        return _read_inventory(nvml)
    except nvml.NVMLError as error:
        return _broken(error)
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _broken(error: Exception) -> GpuInventory:
    return GpuInventory(
        reason=f"the NVIDIA driver is installed but NVML fails: {error}. nvidia-smi should fail the"
        " same way; a version mismatch after an update is cured by a reboot.",
        failed=True,
    )


def _read_inventory(nvml: Any) -> GpuInventory:
    cuda_driver = _ask(nvml, None, "nvmlSystemGetCudaDriverVersion_v2")
    gpus: list[Gpu] = []
    notes: list[str] = []
    skipped: set[int] = set()
    count = nvml.nvmlDeviceGetCount()
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if _ask(nvml, (0, 0), "nvmlDeviceGetMigMode", handle)[0] == 1:
                instances = _read_mig_instances(nvml, handle, index)
                if not instances:
                    notes.append(f"GPU {index} is left out: MIG mode is on and it has no instance.")
                    skipped.add(index)
                gpus += instances
            else:
                gpus.append(_read_gpu(nvml, handle, index))
        except nvml.NVMLError as error:
            # One lost or forbidden GPU must not cost the others.
            notes.append(f"GPU {index} is left out: NVML says {error}.")
            skipped.add(index)
    reason = None
    if not gpus:
        reason = " ".join(notes) if notes else "the NVIDIA driver lists no GPU."
    return GpuInventory(
        gpus=tuple(gpus),
        driver=_ask(nvml, None, "nvmlSystemGetDriverVersion"),
        cuda_driver=f"{cuda_driver // 1000}.{cuda_driver % 1000 // 10}" if cuda_driver else None,
        reason=reason,
        failed=not gpus and count > 0,
        notes=tuple(notes) if gpus else (),
        skipped=frozenset(skipped),
    )


def _read_mig_instances(nvml: Any, parent: Any, index: int) -> list[Gpu]:
    parent_uuid = _text(nvml.nvmlDeviceGetUUID(parent))
    instances = []
    for position in range(_ask(nvml, 0, "nvmlDeviceGetMaxMigDeviceCount", parent)):
        try:
            handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, position)
        except nvml.NVMLError:  # positions need not be filled
            continue
        gpu_instance = _ask(nvml, None, "nvmlDeviceGetGpuInstanceId", handle)
        compute_instance = _ask(nvml, None, "nvmlDeviceGetComputeInstanceId", handle)
        instances.append(
            replace(
                _read_gpu(nvml, handle, index),
                parent_uuid=parent_uuid,
                mig_name=f"MIG-{parent_uuid}/{gpu_instance}/{compute_instance}",
            )
        )
    return instances


def _read_gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes, free_bytes = int(memory.total), int(memory.free)
    except nvml.NVMLError_NotSupported:
        total_bytes = free_bytes = 0
    holders, displays = _read_holders(nvml, handle)
    mode = _ask(nvml, 0, "nvmlDeviceGetComputeMode", handle)
    capability = _ask(nvml, None, "nvmlDeviceGetCudaComputeCapability", handle)
    return Gpu(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_ask(nvml, "NVIDIA GPU", "nvmlDeviceGetName", handle),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        holders=holders,
        displays=displays,
        compute_mode=_COMPUTE_MODES.get(mode, "default"),
        compute_capability=None if capability is None else tuple(capability),
    )


def _read_holders(nvml: Any, handle: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all processes on it, those of them that only draw)."""
    used_bytes: dict[int, int] = {}
    computing: set[int] = set()
    for listing in _PROCESS_LISTINGS:
        for process in _ask(nvml, (), listing, handle):
            # A process can be in both lists, with the same memory.
            known = used_bytes.get(process.pid, 0)
            used_bytes[process.pid] = max(known, process.usedGpuMemory or 0)
            if listing == _PROCESS_LISTINGS[0]:
                computing.add(process.pid)
    holders, displays = [], []
    for pid, used in sorted(used_bytes.items()):
        # The name can come with arguments; those are nobody's business (and may hold keys).
        path = str(_ask(nvml, "", "nvmlSystemGetProcessName", pid)).split(" ")[0]
        name = f" ({os.path.basename(path)})" if path else ""
        holders.append(f"pid {pid}{name}" + (f", {gib(used)}" if used else ""))
        if pid not in computing:
            displays.append(holders[-1])
    return tuple(holders), tuple(displays)


def _ask(nvml: Any, default: Any, name: str, *arguments: Any) -> Any:
    """A fact that can be done without: `default` where the GPU or the driver does not give it."""
    try:
        # Bindings differ in what they have, and older ones give bytes for text.
        return _text(getattr(nvml, name)(*arguments))
    except (nvml.NVMLError, AttributeError, UnicodeDecodeError):  # names need not be UTF-8
        return default


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def visible_gpus(inventory: GpuInventory, cuda_visible_devices: str | None) -> GpuInventory:
    """What an outer CUDA_VISIBLE_DEVICES leaves of `inventory`, in the order it names them.

    Follows CUDA (CUDA programming guide, "CUDA environment variables"; for repetitions, the driver
    behaviour that torch.cuda's parser reproduces): None is no restriction; ordinals, UUIDs and MIG
    names don't mix, the first entry decides; UUIDs may be cut to any unique prefix; an entry that
    names nothing ends the list (so '' and '-1' hide all); a repeated entry hides all. The ordinal
    or UUID of a GPU in MIG mode means its first instance. Two things differ: of several MIG names
    CUDA shows a process only the first, but here they are shared out, one to a worker; and the
    ordinal of a GPU that is there and can't be opened (`skipped`) is passed over.
    """
    if cuda_visible_devices is None or not inventory.gpus:
        return inventory
    setting = f"CUDA_VISIBLE_DEVICES={cuda_visible_devices!r}"
    kind, names, stopper = _parse_visible(cuda_visible_devices)
    if not names and _hides_on_purpose(stopper):
        reason = f"{setting} hides all {len(inventory.gpus)} GPUs."
        return replace(inventory, gpus=(), reason=reason)
    table = _names_of(inventory.gpus, kind)
    chosen: list[Gpu] = []
    for name in names:
        if kind == "ordinal" and int(name) in inventory.skipped:
            continue
        gpu = _look_up(table, name, prefixes=kind != "ordinal")
        if gpu is None:
            stopper = name
            break
        chosen.append(gpu)
    repeated = len(set(names)) < len(names) or len({gpu.uuid for gpu in chosen}) < len(chosen)
    if repeated or not chosen:
        why = f"starts with {stopper!r}, no GPU of this machine"
        if repeated:
            why = "names a GPU twice"
        elif stopper is None:
            lost = " ".join(inventory.notes)
            return replace(inventory, gpus=(), reason=f"{setting}: {lost}", failed=True)
        reason = f"{setting} {why}, and CUDA then shows none; correct or unset it."
        return replace(inventory, gpus=(), reason=reason, failed=True)
    notes = list(inventory.notes)
    if stopper is not None and not _hides_on_purpose(stopper):
        notes.append(
            f"{setting}: {stopper!r} is no GPU of this machine; CUDA ignores it and what follows."
        )
    if kind == "ordinal" and len({gpu.name for gpu in inventory.gpus if not gpu.is_mig}) > 1:
        notes.append(
            f"{setting} is read in nvidia-smi's order (CUDA_DEVICE_ORDER=PCI_BUS_ID); this machine"
            " mixes GPU models, so CUDA's default order may differ: name UUIDs to be sure."
        )
    return replace(inventory, gpus=tuple(chosen), notes=tuple(notes))


def _parse_visible(value: str) -> tuple[str, list[str], str | None]:
    """(kind, the names in order, the entry that ended the list early if one did)."""
    entries = [entry.strip() for entry in value.split(",")]
    kind = entries[0][:4] if entries[0].startswith(("GPU-", "MIG-")) else "ordinal"
    names: list[str] = []
    for entry in entries:
        if kind != "ordinal":
            name = entry if entry.startswith(kind) else None
        else:
            # CUDA reads with strtoul: '1', '+1' and '1x' are 1; anything else is an end.
            number = re.match(r"\+?([0-9]+)", entry)
            name = str(int(number[1])) if number else None
        if name is None:
            return kind, names, entry
        names.append(name)
    return kind, names, None


def _hides_on_purpose(entry: str | None) -> bool:
    """Whether an entry is one of the customary ways (Slurm's NoDevFiles too) to say 'no more'."""
    return entry is not None and (entry in ("", "NoDevFiles", "none") or entry.startswith("-"))


def _names_of(gpus: Sequence[Gpu], kind: str) -> dict[str, Gpu]:
    table: dict[str, Gpu] = {}
    for gpu in gpus:
        if kind == "ordinal":
            table.setdefault(str(gpu.index), gpu)
        elif kind == "GPU-":
            table.setdefault(gpu.parent_uuid or gpu.uuid, gpu)
        elif gpu.mig_name is not None:
            table[gpu.uuid] = table[gpu.mig_name] = gpu
    return table


def _look_up(table: Mapping[str, Gpu], name: str, *, prefixes: bool) -> Gpu | None:
    if name in table or not prefixes:
        return table.get(name)
    found = {gpu.uuid: gpu for key, gpu in table.items() if key.startswith(name)}
    return next(iter(found.values())) if len(found) == 1 else None


def explain_torch_blind(
    inventory: GpuInventory, torch_version: str, torch_cuda: str | None
) -> DeviceError:
    """The error for 'NVML sees GPUs and torch does not', with the likely fix.

    `torch_version` is `torch.__version__`, `torch_cuda` is `torch.version.cuda` (None in builds
    without CUDA). Within one major version newer CUDA runs on older drivers (CUDA minor version
    compatibility), so only a newer major is called the cause.
    """
    driver_cuda = inventory.cuda_driver or "unknown"
    facts = (
        f"NVML sees {len(inventory.gpus)} GPU(s) (driver {inventory.driver or 'unknown'}, CUDA up"
        f" to {driver_cuda}), but torch {torch_version}"
        f" ({f'built for CUDA {torch_cuda}' if torch_cuda else 'built without CUDA'}) sees none."
    )
    if torch_cuda is None:
        fix = (
            f"Install a CUDA build of torch for CUDA {driver_cuda} or older"
            " (https://pytorch.org/get-started/locally/)"
        )
    elif inventory.cuda_driver and _major(torch_cuda) > _major(inventory.cuda_driver):
        fix = (
            f"Update the driver, or install a torch built for CUDA {_major(driver_cuda)}.x"
            " (https://pytorch.org/get-started/locally/)"
        )
    else:
        fix = (
            'See what `python -c "import torch; torch.cuda.init()"` says: usually the rights on'
            " /dev/nvidia*, a container without GPU access, or a stopped nvidia-fabricmanager"
        )
    return DeviceError(f"{facts} {fix}; or run with --device cpu.")


def _major(version: str) -> int:
    return int(version.split(".", maxsplit=1)[0])
