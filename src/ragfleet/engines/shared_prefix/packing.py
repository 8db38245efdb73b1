"""Weights in the form that the CPU's matrix products want, and work that the last layer can leave.

Owns the replacement of a model's linear layers by oneDNN-packed ones (the originals are freed, and
can be made again bit by bit), and of its last layer's projections by ones that compute only the
tokens somebody looks at. Both change what is computed where, never the result.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

log = logging.getLogger(__name__)

_PASS_TOKENS_HINT: Final = 64
"""Rows that oneDNN is told to expect; it takes any number."""


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer whose weight is in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _PASS_TOKENS_HINT
        )
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return out

    def unpacked(self) -> nn.Linear:
        weight = self.packed.to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear


def pack_weights(model: nn.Module) -> str | None:
    """Pack every linear layer of `model` in place; why not, where this torch can't.

    An output layer that shares its weight with the embedding is packed as well, so that weight is
    there twice: unpacked, it costs as much time as a quarter of a small model's layers.
    """
    reason = _why_not(model)
    if reason is not None:
        return reason
    for parent, name, child in list(_children(model)):
        if type(child) is nn.Linear:
            setattr(parent, name, PackedLinear(child))
    return None


def unpack_weights(model: Any) -> None:
    """As it was before `pack_weights`."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, PackedLinear):
            setattr(parent, name, child.unpacked())
    model.tie_weights()


def _why_not(model: nn.Module) -> str | None:
    dtype = next(model.parameters()).dtype
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:  # both operations are private: they are tried on numbers whose product is known
        linear = nn.Linear(32, 48, dtype=dtype)
        x = torch.randn(1, 5, 32, dtype=dtype)
        packed = PackedLinear(linear)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(packed(x), linear(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(packed.unpacked().weight, linear.weight, rtol=0, atol=0)
    except (AttributeError, RuntimeError, TypeError, AssertionError) as error:
        return f"torch {torch.__version__} packs them otherwise: {str(error).splitlines()[0]}"
    return None


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


class Wanted:
    """The tokens of the pass at hand that the last layer must compute; None for all."""

    rows: torch.Tensor | None = None


class OnlyWanted(nn.Module):  # type: ignore[misc]
    """A layer that works on each token alone, for the wanted ones; zeros for the rest."""

    def __init__(self, inner: nn.Module, wanted: Wanted) -> None:
        super().__init__()
        self.inner = inner
        self._wanted = wanted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._wanted.rows
        if rows is None:
            whole: torch.Tensor = self.inner(x)
            return whole
        part = self.inner(x[:, rows])
        out: torch.Tensor = part.new_zeros((*x.shape[:-1], part.shape[-1]))
        out[:, rows] = part
        return out


def trim_last_layer(model: Any) -> Wanted:
    """Let the last layer compute wanted tokens alone, where it is built as Llama's is."""
    wanted = Wanted()
    layer = getattr(model.get_decoder(), "layers", [None])[-1]
    attention: Any = getattr(layer, "self_attn", None)
    if hasattr(attention, "o_proj") and type(getattr(layer, "mlp", None)).__name__.endswith("MLP"):
        attention.o_proj = OnlyWanted(attention.o_proj, wanted)
        layer.mlp = OnlyWanted(layer.mlp, wanted)
    return wanted


def restore_last_layer(model: Any) -> None:
    for parent, name, child in list(_children(model)):
        if isinstance(child, OnlyWanted):
            setattr(parent, name, child.inner)
