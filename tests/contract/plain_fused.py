"""What `fused_layers.Fused` asks of a device, in torch's own operations."""

from __future__ import annotations

import torch
from torch.nn import functional

from ragfleet.engines.shared_prefix.fused_layers import Fused


def plain_rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def plain_gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return functional.silu(gate) * up


PLAIN = Fused(plain_rotate, plain_gated)
