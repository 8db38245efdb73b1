"""Which part of its GPUs' memory vLLM is told to take.

Owns the reading of what is free when a worker starts, and the arithmetic. Imports no vLLM.

vLLM asks for a part of *all* memory (`gpu_memory_utilization`, 0.9 or a little more by default) and
refuses to start where less is free, so what others hold must be taken off. What is told here comes
from NVML, whose total is a little larger than CUDA's: the part is on the safe side.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from ragfleet.gpus import discover_gpus, visible_gpus
from ragfleet.inventory import GIB, Gpu

UTILISATION: Final = 0.9
"""The most of a GPU."""
SHARED_TOKENS: Final = 8192
SHARED_SEQS: Final = 256
"""`max_num_batched_tokens` and `max_num_seqs` where workers share a GPU. vLLM's defaults go by the
whole GPU, and what a step may need of memory goes by them."""
_CONTEXT_BYTES: Final = GIB
"""CUDA's own, and what else is there by the time vLLM looks."""
_STEP_BYTES: Final = 3 * GIB
"""Beside weights and cache, where workers share a GPU: activations, context and CUDA graphs."""
_WAIT_S: Final = 15.0
_PATIENCE_S: Final = 3.0
_POLL_S: Final = 0.5


def worker_gpus() -> tuple[Gpu, ...]:
    """Those that this process sees, as NVML finds them now; empty where their memory is unknown."""
    gpus = visible_gpus(discover_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")).gpus
    return gpus if all(gpu.total_bytes for gpu in gpus) else ()


def settled_gpus(
    share_bytes: int | None,
    look: Callable[[], tuple[Gpu, ...]] = worker_gpus,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Gpu, ...]:
    """The worker's GPUs, once the memory of its predecessor is back.

    The driver takes some seconds to give back what a killed process held. Waits while less than
    this worker's share is free (`share_bytes`); where it shares with none, while less than nearly
    all is free and that grows, for somebody else may hold the rest.
    """
    started_s = grown_s = clock()
    most = -1
    while True:
        gpus, now_s = look(), clock()
        free = min((gpu.free_bytes for gpu in gpus), default=0)
        if free > most:
            most, grown_s = free, now_s
        enough = all(gpu.free_bytes >= UTILISATION * _due(gpu, share_bytes) for gpu in gpus)
        gave_up = share_bytes is None and now_s - grown_s >= _PATIENCE_S
        if enough or gave_up or now_s - started_s >= _WAIT_S:
            return gpus
        sleep(_POLL_S)


def _due(gpu: Gpu, share_bytes: int | None) -> int:
    return gpu.total_bytes if share_bytes is None else share_bytes


def utilisation(gpus: Sequence[Gpu], share_bytes: int | None) -> float:
    """`gpu_memory_utilization`: what is free on the fullest of `gpus`, or this worker's share."""
    parts = (
        min(UTILISATION * _due(gpu, share_bytes), gpu.free_bytes - _CONTEXT_BYTES) / gpu.total_bytes
        for gpu in gpus
    )
    return max(0.01, math.floor(1000 * min(parts)) / 1000)


def shared_cache_bytes(share_bytes: int, weights_bytes: int) -> int | None:
    """KV cache of one of the workers on a GPU; None where the share does not hold the weights.

    Fixed, for vLLM's own measure fails when another worker allocates meanwhile.
    """
    room_bytes = share_bytes - weights_bytes
    if room_bytes <= 0:
        return None
    # Small models on small shares: a step needs less for them.
    return int(max(0.9 * (room_bytes - _STEP_BYTES), 0.25 * room_bytes))
