"""Tensors that say they are on a GPU and are computed on the CPU: who mixes devices, who waits.

`PretendedGpu` looks at each of torch's public operations. What a GPU refuses is refused: tensors of
two devices in one operation and, within a captured step, whatever asks the device for a number or
brings one there. Waits elsewhere are counted. What torch's operations do among themselves is not
seen.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch
from fake_flash import fake_flash, use
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ragfleet.engines import checkpoint, transformers
from ragfleet.engines.shared_prefix.decoder import Step
from ragfleet.engines.shared_prefix.graphs import Graphs

GPU: Final = torch.device("cuda:0")
CPU: Final = torch.device("cpu")
_ON_THE_HOST: Final = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "equal",
        "allclose",
        "is_nonzero",
        "bincount",
    ]
)
"""Answered there, or by as many numbers as the device has to be asked for."""
_TOLD: Final = {
    "torch.Tensor.device.__get__": GPU,
    "torch.Tensor.is_cuda.__get__": True,
    "torch.Tensor.is_cpu.__get__": False,
}
_COPIES: Final = frozenset(["tensor", "as_tensor", "to", "copy_", "__setitem__", "__getitem__"])
"""Take tensors, or numbers, of both devices."""


class PretendedGpu(TorchFunctionMode):
    """A device. Which tensors are on it is written on them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """By the function of the package that waits, and what for."""
        self.num_repeated = 0
        """Captured steps that ran."""
        self._is_capturing = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        full = str(resolve_name(func) or getattr(func, "__name__", func))
        if full in _TOLD and _is_here(args[0]):
            return _TOLD[full]
        if func is torch.device:
            return func(*args, **kwargs)
        name = full.rsplit(".", 1)[1] if "." in full else full
        tensors = [one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)]
        here = [one for one in tensors if _is_here(one)]
        there = [one for one in tensors if not _is_here(one)]
        target, args, kwargs = _without_device(args, kwargs)
        goes_here = bool(here) if target is None else target
        if name == "copy_":
            goes_here = _is_here(args[0])
        if name in _COPIES:
            if (here and (there or not goes_here)) or (goes_here and not here):
                self._wait(f"{name}, {'from' if goes_here else 'to'} the host")
        elif here and any(one.dim() for one in there):
            raise RuntimeError(f"{full}: expected all tensors to be on the same device")
        if here and (name in _ON_THE_HOST or _counts_first(name, args, kwargs)):
            self._wait(name)
        found = func(*args, **kwargs)
        return put(found) if goes_here and name not in ("cpu", "numpy") else found

    def capture(self, step: Step) -> Step:
        """See `decoder.Capture`."""

        def repeat() -> None:
            self._is_capturing = True
            try:
                step()
            finally:
                self._is_capturing = False
            self.num_repeated += 1

        step()
        repeat()
        return repeat

    def _wait(self, what: str) -> None:
        if self._is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        frames = [frame for frame in traceback.extract_stack() if "/ragfleet/" in frame.filename]
        place = frames[-1].filename.rsplit("/ragfleet/", 1)[1] if frames else ""
        self.waits[f"{place}:{frames[-1].name if frames else ''}: {what}"] += 1


def put(found: Any) -> Any:
    """All tensors in it are on the device from now on."""

    def put_one(one: Any) -> Any:
        if torch.is_tensor(one):
            one.is_pretended = True
        return one

    return tree_map(put_one, found)


def _is_here(tensor: Any) -> bool:
    return hasattr(tensor, "is_pretended")


def _without_device(args: Any, kwargs: Any) -> tuple[bool | None, Any, Any]:
    """Whether the device is asked for, and the same call for the CPU. None: nobody says."""
    found: list[bool] = []

    def told(one: Any) -> Any:
        is_name = isinstance(one, str) and one.split(":")[0] in ("cuda", "cpu")
        if not is_name and not isinstance(one, torch.device):
            return one
        found.append(torch.device(one).type == "cuda")
        return CPU if found[-1] else one

    args = tuple(told(one) for one in args)
    kwargs = {name: told(one) if name == "device" else one for name, one in kwargs.items()}
    return (found[-1] if found else None), args, kwargs


def _counts_first(name: str, args: Any, kwargs: Any) -> bool:
    """How large the result is depends on numbers on the device."""
    if name == "repeat_interleave":
        return len(args) > 1 and torch.is_tensor(args[1]) and kwargs.get("output_size") is None
    if name not in ("__getitem__", "__setitem__"):
        return False
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(torch.is_tensor(one) and one.dtype == torch.bool for one in indices)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    """Engines with `num_gpus=1` that are started within it are on the device; torch's fused kernel
    is there, and CUDA graphs."""
    device = PretendedGpu()

    def fused(*args: Any, **kwargs: Any) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)]
        assert all(map(_is_here, tensors)), "expected all tensors to be on the same device"
        with torch._C.DisableTorchFunction():
            return put(fake_flash(*args, **kwargs))

    def load(*args: Any) -> Any:
        model, notes = load_model(*args)
        for one in (*model.parameters(), *model.buffers()):
            put(one)
        return model, notes

    load_model = transformers.load_model
    use(monkeypatch, fused)
    monkeypatch.setattr(checkpoint, "_devices", lambda spec: (None, []))
    monkeypatch.setattr(transformers, "load_model", load)
    monkeypatch.setattr(Graphs, "_captured", lambda self, step: device.capture(step))
    for name, answer in {
        "get_device_name": "a pretended GPU",
        "mem_get_info": (50 << 20, 80 << 20),
        "memory_allocated": 0,
        "memory_reserved": 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    with device:
        yield device
