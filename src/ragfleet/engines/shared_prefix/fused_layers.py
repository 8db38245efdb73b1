"""Norms and rotations of a model's own code, each a handful of operations, by one kernel.

Owns which of a model's modules compute what the kernel computes, found by trying both on numbers,
and their exchange while passes run. What computes something else stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

Rotate = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]
"""query [1, heads, tokens, dim], key [1, kv_heads, tokens, dim], cos and sin [1, tokens, dim]: both
with rotary positions."""
ROTATION: Final = "apply_rotary_pos_emb"
"""What transformers calls it, in the Python module of each model."""


class FusedLayers:
    """Of one model: `use`, `undo`, in turns."""

    def __init__(self, model: nn.Module, rotate: Rotate) -> None:
        self._norms = [
            (module, _fused_norm(module)) for module in model.modules() if _is_fused_norm(module)
        ]
        self._rotations: list[tuple[ModuleType, Any, Any]] = []
        self.notes: list[str] = []
        """Lines for the log, of what stays as it is."""
        for home in {sys.modules[type(module).__module__] for module in model.modules()}:
            own = getattr(home, ROTATION, None)
            if own is None:
                continue
            reason = _why_not_rotate(own, rotate, next(model.parameters()))
            if reason is None:
                self._rotations.append((home, own, _rotation(own, rotate)))
            else:
                self.notes.append(f"rotations are the model's own: {reason}")
        if not self._norms:
            self.notes.append("norms are the model's own")

    def use(self) -> None:
        for module, forward in self._norms:
            module.forward = forward
        for home, _, fused in self._rotations:
            setattr(home, ROTATION, fused)

    def undo(self) -> None:
        """The model as it was."""
        for module, _ in self._norms:
            vars(module).pop("forward", None)
        for home, own, _ in self._rotations:
            setattr(home, ROTATION, own)


def _is_fused_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not hasattr(module, "variance_epsilon") or weight is None or "forward" in vars(module):
        return False
    x = torch.arange(3 * weight.numel(), device=weight.device).sin().to(weight.dtype)
    x = x.view(3, -1)
    with torch.inference_mode():
        return weight.ndim == 1 and _is_close(module(x), _fused_norm(module)(x))


def _fused_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon = module.weight, module.variance_epsilon

    def forward(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, epsilon)

    return forward


def _rotation(own: Any, rotate: Rotate) -> Any:
    def rotation(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *others: Any,
        **more: Any,
    ) -> Any:
        if others or more or cos.shape != (1, query.shape[2], query.shape[3]):
            return own(query, key, cos, sin, *others, **more)
        return rotate(query, key, cos, sin)

    return rotation


def _why_not_rotate(own: Any, rotate: Rotate, like: torch.Tensor) -> str | None:
    """Laid out as layers have them: tokens before heads."""
    options: Any = {"device": like.device}
    try:
        query = torch.arange(5 * 4 * 64, **options).sin().to(like.dtype).view(1, 5, 4, 64)
        key = torch.arange(5 * 2 * 64, **options).cos().to(like.dtype).view(1, 5, 2, 64)
        cos = torch.arange(5 * 64, **options).sin().to(like.dtype).view(1, 5, 64)
        asked = (query.transpose(1, 2), key.transpose(1, 2), cos, cos.roll(7, 2))
        for one, other in zip(rotate(*asked), own(*asked), strict=True):
            if not _is_close(one, other):
                return "it computes something else"
    except Exception as error:  # a model's own code, and a compiler
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    tolerance = 1e-5 if one.dtype == torch.float32 else 2e-2
    return bool(torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance))
