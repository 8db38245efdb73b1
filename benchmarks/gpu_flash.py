"""torch's own flash attention where transformers' continuous batching looks for a package.

Without the flash-attn package continuous batching computes every query of a pass against all keys
of the pass, under a mask: far from what it can do. torch carries the same kernel (FlashAttention 2,
`aten._flash_attention_forward`), so `gpu.py` puts it in that package's place, for a peer at its
strength. Its fast way of decoding, which needs the package's paged kernel, stays off: keys and
values are gathered for each pass. Private names of transformers are used here, 5.17 to 5.23; where
they are others, or the kernel gives other numbers than plain attention, `install` says why not.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import modeling_flash_attention_utils as flash_utils

from ragfleet.engines.shared_prefix import varlen
from ragfleet.engines.shared_prefix.varlen import Ranges

NAME = "flash_attention_2"


def install(device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """(the attention implementation to set in a model's config, what it is), or (None, why not).

    Undone by any later use of transformers' own flash attention: nothing here stays behind.
    """
    kernel = plain_varlen if device.type == "cpu" else flash_varlen
    try:
        _try_out(kernel, device, dtype)
        is_paged = hasattr(flash_utils, "lazy_import_paged_flash_attention")  # until 5.17
        name = f"paged|{NAME}" if is_paged else NAME
        flash_utils._loaded_implementation = name
        flash_utils._flash_fn = None  # of unpacked batches, which do not come here
        flash_utils._flash_varlen_fn = kernel
        flash_utils._flash_with_kvcache_fn = None
        flash_utils._process_flash_kwargs_fn = flash_utils._lazy_define_process_function(kernel)
        if hasattr(flash_utils, "_process_with_kvcache_kwargs_fn"):
            flash_utils._process_with_kvcache_kwargs_fn = dict
        found = flash_utils.lazy_import_flash_attention(name)[0][1]
        if found is not kernel:
            return None, f"transformers keeps its flash attention elsewhere than in {NAME}'s place"
    except Exception as error:  # private names of two libraries, each of which may be another
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return name, f"torch's {kernel.__name__} in the place of the flash-attn package"


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """flash_attn's flash_attn_varlen_func: [tokens, heads, dim], causal from the bottom right."""
    assert tuple(window_size) == (-1, -1), window_size
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        int(max_seqlen_q),
        int(max_seqlen_k),
        dropout_p,
        causal,
        False,
        scale=softmax_scale,
    )[0]
    return out


def plain_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same, sequence by sequence: for devices without the kernel, and to compare with."""
    assert tuple(window_size) == (-1, -1), window_size
    ranges = Ranges(
        starts_q=cu_seqlens_q,
        offsets_k=cu_seqlens_k,
        lengths_k=cu_seqlens_k.diff(),
        max_q=max_seqlen_q,
        max_k=max_seqlen_k,
        causal=causal,
    )
    scale = softmax_scale or q.shape[-1] ** -0.5
    out, _ = varlen.plain_varlen(q.float(), k.float(), v.float(), ranges, scale)
    return out.to(q.dtype)


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raises AssertionError unless `kernel` gives plain attention's numbers."""
    draw = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(count, heads, 64, generator=draw, device=device, dtype=dtype)
        for count, heads in ((9, 4), (19, 2), (19, 2))
    )
    starts_q = torch.tensor([0, 1, 9, 9], dtype=torch.int32, device=device)
    starts_k = torch.tensor([0, 7, 19, 19], dtype=torch.int32, device=device)
    ranges = (starts_q, starts_k, 8, 12)
    found = kernel(q, k, v, *ranges, softmax_scale=0.125, causal=True)
    expected = plain_varlen(q, k, v, *ranges, softmax_scale=0.125, causal=True)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
