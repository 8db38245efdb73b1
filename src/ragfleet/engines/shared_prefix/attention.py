"""Attention in parts, and how a model's own forward comes to use it.

Owns the kernels for one part (queries over one range of keys) with its log-sum-exp, the exact merge
of parts (Hydragen, arXiv 2402.05099), and the function that transformers calls in every layer.
Knows nothing of slots, pools or passes: those come as an object with an `attend` method.
"""

from __future__ import annotations

import logging
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface

log = logging.getLogger(__name__)

NAME: Final = "ragfleet_shared_prefix"
"""Unknown to transformers' table of masks, so that it makes none."""
MASKED: Final = -1e30
"""Added to scores that must not count. Infinity would make NaN of rows with nothing to see."""
BLOCK_TOKENS: Final = 64
"""Of a long run, asked together: a block's products leave out the keys that come after it."""


class Attending(Protocol):
    """What a forward hands down to each layer's attention as `shared_prefix`."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv_heads, dim], positions applied;
        returns [tokens, heads, dim]."""
        ...

    def check(self, module: Any, key: torch.Tensor, value: torch.Tensor, **others: Any) -> None:
        """Raises where a layer wants what is not computed here."""
        ...


class Probing(Protocol):
    """What looks at each layer of a pass: see `support.Probe`."""

    long_run: int
    """In place of `passes.LONG_RUN`."""

    def check(self, module: Any, key: torch.Tensor, value: torch.Tensor, **others: Any) -> None:
        """See `Attending`."""
        ...


def unchecked(module: Any, key: torch.Tensor, value: torch.Tensor, **others: Any) -> None:
    """The check of a pass that nobody looks at: the models that come here were checked when the
    loop was made."""


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    shared_prefix: Attending,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Of transformers' attention interface: [1, heads, tokens, dim] to [1, tokens, heads, dim]."""
    shared_prefix.check(module, key, value, attention_mask=attention_mask, **others)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = shared_prefix.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling,
    )
    return out[None], None


def register() -> None:
    """Make `NAME` known to transformers. Once or many times."""
    AttentionInterface.register(NAME, attention_forward)


def attend_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[a, b, queries, dim] over [a, b, keys, dim], any strides: outputs [a, b, queries, dim], and
    the fp32 log-sum-exp of the scores [a, b, queries].

    `causal`: queries and keys are the same tokens. With fewer queries than keys the kernel would
    align them at the first key, so what stands before is a part of its own.
    """
    if _FLASH is not None and not query.is_cuda:
        out, lse = _FLASH(query, key, value, 0.0, causal, scale=scaling)
        return out, lse
    return plain_part(query, key, value, scaling, causal)


def batched_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As two batched products: [a, queries, dim] over [a, keys, dim], `mask` added to the scores;
    outputs [a, queries, dim], and the fp32 log-sum-exp of the scores [a, queries]."""
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling).float()
    probs = torch.softmax(scores, dim=-1)
    # exp(top - lse) is the top's probability.
    lse = scores.amax(dim=-1) - probs.amax(dim=-1).log()
    return torch.bmm(probs.to(value.dtype), value), lse


def causal_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The last tokens of a sequence: query [tokens, heads, dim] over key and value [kv_heads, keys,
    dim], whose last `tokens` keys are the queries' own; returns [tokens, heads, dim].

    In blocks of `BLOCK_TOKENS`, each two batched products around a softmax. torch's fused kernel
    has small blocks of queries and keys, and no way to begin behind the first key.
    """
    num_tokens, num_heads, dim = query.shape
    kv_heads, num_keys = key.shape[:2]
    group = num_heads // kv_heads
    # [kv_heads, tokens * group, dim]: the heads of a group stand together.
    asked = query.unflatten(1, (kv_heads, group)).transpose(0, 1).flatten(1, 2) * scaling
    out = query.new_empty((num_tokens, kv_heads, group, dim))
    later = query.new_full((BLOCK_TOKENS, BLOCK_TOKENS), MASKED).triu_(1)[:, None]
    for start in range(0, num_tokens, BLOCK_TOKENS):
        size = min(BLOCK_TOKENS, num_tokens - start)
        seen = num_keys - num_tokens + start + size
        block = asked[:, start * group : (start + size) * group]
        scores = torch.bmm(block, key[:, :seen].transpose(1, 2))
        scores.unflatten(1, (size, group))[..., seen - size :] += later[:size, :, :size]
        torch.softmax(scores, dim=-1, out=scores)
        part = torch.bmm(scores, value[:, :seen]).unflatten(1, (size, group))
        out[start : start + size] = part.transpose(0, 1)
    return out.flatten(1, 2)


def plain_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_part` in torch's public operations, for versions without the fused one."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    if causal:
        count = query.shape[-2]
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, MASKED)
    lse = torch.logsumexp(scores, dim=-1)
    probs = (scores - lse[..., None]).exp()
    return torch.matmul(probs.to(value.dtype), value), lse


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts over different keys as if they were one: outputs [..., dim], log-sums [...]."""
    weight = torch.sigmoid(other_lse - lse)[..., None].to(out.dtype)
    return torch.lerp(out, other, weight), torch.logaddexp(lse, other_lse)


def _find_flash() -> Any | None:
    """torch's fused CPU attention that also returns the log-sum-exp. It is private, so it is tried
    on known numbers first; a version in which it is missing or differs gets `plain_part`."""
    try:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        numbers = torch.arange(48, dtype=torch.float32).reshape(1, 2, 6, 4).sin()
        got = flash(numbers, numbers[:, :1].expand(1, 2, 6, 4), numbers, 0.0, True, scale=0.5)
        wanted = plain_part(numbers, numbers[:, :1].expand(1, 2, 6, 4), numbers, 0.5, True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, AssertionError, ValueError) as error:
        log.warning(
            "torch %s has no fused CPU attention as it is used here, a slower way is taken: %s",
            torch.__version__,
            error,
        )
        return None
    return flash


_FLASH = _find_flash()
