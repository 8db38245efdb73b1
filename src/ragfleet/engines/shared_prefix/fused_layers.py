"""What a model's own layers compute in many small operations, in few.

Owns which of a model's modules can be exchanged, found by trying both ways on numbers, and their
exchange while passes run: RMS norms, rotations, MLPs, and the products of queries, keys and values.
What computes something else stays as it is. Joined weights stay joined: the layers' own become
views of them, so none is there twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

ROTATION: Final = "apply_rotary_pos_emb"
"""What transformers calls it, in the Python module of each model."""
TOLERANCE: Final = 0.02
"""Of the whole. Rounding in bf16 makes 0.005."""
Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Fused:
    """Kernels of a device."""

    rotate: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ]
    """query [1, heads, tokens, dim], key [1, kv_heads, tokens, dim], cos and sin [1, tokens, dim]:
    both with rotary positions, halves against each other."""
    gated: Forward
    """[..., 2 * size] to [..., size]: SiLU of the first half times the second."""


class FusedLayers:
    """Of one model: `use` and `undo` in turns, `passing` around its forward while in use."""

    def __init__(self, model: nn.Module, fused: Fused) -> None:
        self._joined: list[_Joined] = []
        self._forwards: list[tuple[Any, Forward]] = []
        self._rotations: list[tuple[ModuleType, Any, Any]] = []
        self.notes: list[str] = []
        """Lines for the log, of what stays as it is."""
        modules = list(model.modules())
        for what, make in (("norms", _norm), ("MLPs", self._mlp), ("projections", self._qkv)):
            found = [one for module in modules for one in make(module, fused)]
            self._forwards += found
            if not found:
                self.notes.append(f"{what} are the model's own")
        asked = _asked(next(model.parameters()))
        homes = {sys.modules.get(type(module).__module__) for module in modules}
        for home in homes:
            own = getattr(home, ROTATION, None)
            if home is None or own is None:
                continue
            if _agree(partial(fused.rotate, *asked), partial(own, *asked)):
                self._rotations.append((home, own, _rotation(own, fused)))
            else:
                self.notes.append("rotations are the model's own")

    def use(self) -> None:
        for module, forward in self._forwards:
            module.forward = forward

    def undo(self) -> None:
        """The model as it was."""
        for module, _ in self._forwards:
            vars(module).pop("forward", None)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Rotations are found in the Python modules of models, which others may be using too."""
        for home, _, rotation in self._rotations:
            setattr(home, ROTATION, rotation)
        try:
            yield
        finally:
            for home, own, _ in self._rotations:
                setattr(home, ROTATION, own)
            for joined in self._joined:
                joined.forget()

    def _mlp(self, module: Any, fused: Fused) -> list[tuple[Any, Forward]]:
        linears = _linears(module, ("gate_proj", "up_proj"))
        if not linears or not hasattr(module, "down_proj") or not _is_untouched(module):
            return []
        gate, up = linears

        def by_parts(x: torch.Tensor) -> torch.Tensor:
            both = torch.cat((gate(x), up(x)), -1)
            out: torch.Tensor = module.down_proj(fused.gated(both))
            return out

        x = _numbers((1, 3, gate.in_features), gate.weight)
        with torch.inference_mode():
            x = x / gate(x).float().std()
        # Activations are alike near 0, and clamps are seen far from it only.
        if not all(_agree(partial(by_parts, x * n), partial(module, x * n)) for n in (3, 60)):
            return []
        joined = _Joined(linears)
        self._joined.append(joined)

        def forward(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = module.down_proj(fused.gated(joined(x)))
            return out

        return [(module, forward)]

    def _qkv(self, module: Any, fused: Fused) -> list[tuple[Any, Forward]]:
        linears = _linears(module, ("q_proj", "k_proj", "v_proj"))
        if not linears:
            return []
        joined = _Joined(linears)
        self._joined.append(joined)
        return list(zip(linears, joined.forwards(), strict=True))


class _Joined:
    """Linear layers of one input as one product. Their weights become views of its."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._linears = linears
        self._sizes = [linear.out_features for linear in linears]
        self._weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias for linear in linears]
        self._bias = None if biases[0] is None else torch.cat([one.detach() for one in biases])
        self._x: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()
        for linear, weight in zip(linears, self._weight.split(self._sizes), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def forget(self) -> None:
        """Keep no pass's tensors alive, nor take another's input for this one."""
        self._x, self._parts = None, ()

    def forwards(self) -> list[Forward]:
        """Of the layers: who is asked first computes for all, if they are asked for the same."""

        def forward_of(index: int) -> Forward:
            linear = self._linears[index]

            def forward(x: torch.Tensor) -> torch.Tensor:
                if not index:
                    self._x, self._parts = x, self(x).split(self._sizes, -1)
                elif x is not self._x:
                    return functional.linear(x, linear.weight, linear.bias)
                part = self._parts[index]
                if index == len(self._linears) - 1:
                    self.forget()
                return part

            return forward

        return [forward_of(index) for index in range(len(self._linears))]


def _linears(module: Any, names: Sequence[str]) -> list[nn.Linear]:
    """Those of the names, where they can be joined."""
    linears: list[Any] = [getattr(module, name, None) for name in names]
    linears = [one for one in linears if type(one) is nn.Linear and _is_untouched(one)]
    if len({id(one.weight) for one in linears}) < len(names):  # tied ones too are left alone
        return []
    alike = {(one.in_features, one.bias is None, one.weight.dtype) for one in linears}
    return linears if len(alike) == 1 else []


def _is_untouched(module: Any) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)


def _norm(module: Any, fused: Fused) -> list[tuple[Any, Forward]]:
    weight = getattr(module, "weight", None)
    if not hasattr(module, "variance_epsilon") or weight is None or not _is_untouched(module):
        return []
    epsilon = module.variance_epsilon

    def forward(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, epsilon)

    x = _numbers((3, weight.numel()), weight) + 0.7  # a mean, for what subtracts it
    return [(module, forward)] if _agree(partial(forward, x), partial(module, x)) else []


def _rotation(own: Any, fused: Fused) -> Any:
    def rotation(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *others: Any,
        **more: Any,
    ) -> Any:
        known = cos.shape == sin.shape == (1, query.shape[2], query.shape[3])
        laid_out = all(one.stride(-1) == 1 for one in (query, key, cos, sin))
        if others or more or not known or not laid_out:
            return own(query, key, cos, sin, *others, **more)
        return fused.rotate(query, key, cos, sin)

    return rotation


def _asked(like: torch.Tensor) -> list[torch.Tensor]:
    """What a rotation is asked, laid out as layers have it: tokens before heads."""
    query, key = (_numbers((1, 5, heads, 64), like).transpose(1, 2) for heads in (4, 2))
    cos = _numbers((1, 5, 64), like)
    return [query, key, cos, cos.roll(7, 2)]


def _numbers(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(count, device=like.device).sin().to(like.dtype).view(shape)


def _agree(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Whether they give the same tensor, or the same few, up to the rounding of half precision."""
    try:
        with torch.inference_mode():
            found, wanted = one(), other()
            pairs = [(found, wanted)] if torch.is_tensor(found) else zip(found, wanted, strict=True)
            return all(map(_are_alike, *zip(*pairs, strict=True)))
    except Exception:  # a model's own code that wants to be asked otherwise
        return False


def _are_alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    size = float(wanted.float().norm())
    difference = float((found.float() - wanted.float()).norm())
    return found.dtype == wanted.dtype and 0 < size < math.inf and difference <= TOLERANCE * size
