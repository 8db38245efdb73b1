"""The ways in which a device holds keys and values and reads a pass.

The one place that knows of them all; the loop and the self-check see a `Way`, and nothing of what
is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch

from ragfleet.engines.checkpoint import CONTEXT_BYTES
from ragfleet.engines.decoding import TokenChooser
from ragfleet.engines.heap import keep_freed_memory
from ragfleet.engines.protocol import EngineSpec
from ragfleet.engines.shared_prefix.attention import Probing
from ragfleet.engines.shared_prefix.budget import NUM_SLOTS
from ragfleet.engines.shared_prefix.cache import (
    KeyValueCache,
    Shape,
    default_budget_bytes,
    useful_bytes,
)
from ragfleet.engines.shared_prefix.decoder import Capture, Decoder, eagerly
from ragfleet.engines.shared_prefix.forward import Forward, Readable
from ragfleet.engines.shared_prefix.fused_layers import Fused
from ragfleet.engines.shared_prefix.graphs import Graphs
from ragfleet.engines.shared_prefix.passes import TensorPass
from ragfleet.engines.shared_prefix.scheduler import Limits, Pass
from ragfleet.engines.shared_prefix.varlen import (
    Kernels,
    flash_varlen,
    plain_varlen,
    why_not_flash,
)
from ragfleet.engines.shared_prefix.varlen_cache import VarlenCache
from ragfleet.engines.shared_prefix.varlen_pass import packed_pass

PASS_TOKENS: Final = 512
"""Of a pass: matrix products gain nothing from more, and what lies between them stays in caches."""
GPU_SLOTS: Final = 512
"""A step of so many computes longer than it reads the weights, and a small model's long enough to
be worth what the host does for it."""
GPU_PASS_TOKENS: Final = 4096
"""So many are bound by arithmetic on any GPU, and what lies between layers stays small."""
GPU_LEAST_FREE_SHARE: Final = 0.125
"""Passes that read prompts are not captured, so each should fill several slots."""
GPU_PREFIX_TOKENS_PER_SLOT: Final = 4096
"""Of the GPU's default budget: a whole prompt each, should nothing be shared. Nobody else wants its
memory, and what is kept may be asked for once more."""
GPU_SHARE: Final = 0.8
"""Of the memory that is free after loading; the rest is for what lies between layers, and for plain
batches should they be needed."""


class Unsupported(Exception):
    """Why the loop can't take a model or a device; one line for the log."""


class Cache(Protocol):
    """Keys and values of a loop."""

    @property
    def num_bytes(self) -> int: ...

    def taint(self, slot: int) -> None:
        """What was written into a slot may not be finite."""
        ...

    def poison(self) -> None:
        """Of a new cache: make what it holds not finite, so that it shows where it is read."""
        ...


MakePass = Callable[[Pass, Mapping[int, int], Any, Probing | None], Readable]
"""Of what the scheduler says, the token that each slot feeds, the way's own cache, and what looks
on; keys and values are written into the cache while the model reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a device reads passes."""

    dtypes: frozenset[torch.dtype]
    """Those it is made for."""
    make_cache: Callable[[Shape, Limits], Cache]
    make_pass: MakePass
    make_decoder: Callable[[Forward, Any, TokenChooser], Decoder] | None = None
    """For passes of rows alone; None: they are passes as all others."""
    default_budget: Callable[[Shape, EngineSpec, Mapping[str, Any]], int]
    """Bytes for keys and values, where nobody says how many."""
    begin: Callable[[EngineSpec], list[str]]
    """Settings of the process for this way; lines for the log of what could not be set. What fails
    later is told to `EngineSpec.degrade`."""
    packs_weights: bool
    fused: Fused | None = None
    """See `Forward`."""
    num_slots: int
    """Decoded together unless --batch_size says otherwise."""
    pass_tokens: int
    least_free_share: float = 0.0
    """Of the slots, that admission waits for: where passes with runs cost more than others."""
    extra_tokens: int = 0
    """Places of a cache beyond those of its limits."""


def way_of(shape: Shape) -> Way:
    """The way of the device that `shape` is on. Raises Unsupported."""
    if shape.device.type == "cpu":
        return CPU
    if shape.device.type == "cuda":
        return _cuda(shape)
    raise Unsupported(f"it has no way for {shape.device.type} devices")


def varlen_way(
    kernels: Kernels,
    capture: Capture,
    begin: Callable[[EngineSpec], list[str]] = lambda spec: [],
    fused: Fused | None = None,
) -> Way:
    """Many ranges in one call of a kernel. On any device: tests have it on the CPU."""
    return Way(
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        make_cache=VarlenCache,
        make_pass=partial(packed_pass, kernels),
        make_decoder=partial(Decoder, kernels, capture),
        default_budget=_part_of_gpu,
        begin=begin,
        packs_weights=False,
        fused=fused,
        num_slots=GPU_SLOTS,
        pass_tokens=GPU_PASS_TOKENS,
        least_free_share=GPU_LEAST_FREE_SHARE,
        extra_tokens=VarlenCache.EXTRA_TOKENS,
    )


def _cuda(shape: Shape) -> Way:
    if shape.dtype == torch.float32:
        slow = "fp32 has no fused attention here: it goes range by range, exact and slow"
        return varlen_way(Kernels(plain_varlen), eagerly, lambda spec: [slow])
    reason = why_not_flash(shape.dtype, shape.head_dim, shape.device)
    if reason is not None:
        raise Unsupported(f"the fused attention is missing, or not as it is used here: {reason}")
    graphs = Graphs()
    kernels, fused, why_not_triton = _with_triton(shape)

    def begin(spec: EngineSpec) -> list[str]:
        graphs.degrade = spec.degrade or (lambda text: None)
        why_not = {"Triton": why_not_triton, "CUDA graphs": graphs.why_not}
        return [f"decoding goes without {what}: {why}" for what, why in why_not.items() if why]

    return varlen_way(kernels, graphs.capture, begin, fused)


def _with_triton(shape: Shape) -> tuple[Kernels, Fused | None, str | None]:
    """(kernels, those for layers, None), or what there is without Triton, and why."""
    try:
        from ragfleet.engines.shared_prefix import triton_kernels

        triton_kernels.try_rows(shape.dtype, shape.head_dim, shape.group, shape.device)
    except Exception as error:  # no Triton, no compiler for what it makes, or other numbers
        return Kernels(flash_varlen), None, f"{type(error).__name__}: {error}".splitlines()[0]
    fused = Fused(triton_kernels.rotate, triton_kernels.gated)
    return Kernels(flash_varlen, triton_kernels.attend_rows, triton_kernels.merge), fused, None


def _part_of_gpu(shape: Shape, spec: EngineSpec, sizes: Mapping[str, Any]) -> int:
    # What torch keeps between tensors is not there in one piece.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(shape.device)
    if spec.gpu_memory_bytes is not None:
        kept = torch.cuda.memory_reserved(shape.device)
        free = min(free, spec.gpu_memory_bytes - CONTEXT_BYTES - kept)
    useful = useful_bytes(shape, **sizes, prefix_tokens=GPU_PREFIX_TOKENS_PER_SLOT)
    return min(useful, int(free * GPU_SHARE))


def _part_of_memory(shape: Shape, spec: EngineSpec, sizes: Mapping[str, Any]) -> int:
    return default_budget_bytes(shape, **sizes, num_threads=spec.num_threads)


def _keep_memory(spec: EngineSpec) -> list[str]:
    reason = keep_freed_memory()
    return [] if reason is None else [f"memory is mapped anew in every pass: {reason}"]


CPU: Final = Way(
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    make_cache=KeyValueCache,
    make_pass=TensorPass,
    default_budget=_part_of_memory,
    begin=_keep_memory,
    packs_weights=True,
    num_slots=NUM_SLOTS,
    pass_tokens=PASS_TOKENS,
)
