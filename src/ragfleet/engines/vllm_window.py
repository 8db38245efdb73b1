"""How many requests vLLM has at a time, and how many it is given.

Owns the estimate of what a request takes of the KV cache, which knows better with each answer.
Imports no vLLM.
"""

from __future__ import annotations

from typing import Any, Final

MAX_WINDOW: Final = 2048
"""As many as the worker's journal holds; more in flight is more to repeat after a death."""
_TYPICAL_PROMPT: Final = 1024
"""Tokens, until prompts were seen: an engine is told nothing of them when it starts."""
_WEIGHT: Final = 32
"""Answers that the first estimate counts for."""
_MOST_WEIGHT: Final = 512
"""Answers that what came before counts for: costly requests come first, and others later."""


class Window:
    """`num_seqs` is the most that vLLM runs, `cache_tokens` what they have to share; None: unknown.

    vLLM's own limit is for a whole GPU with short prompts: 1,024 on a large one, where with a model
    of 8 billion parameters some hundred prompts of passages find room.
    """

    def __init__(
        self,
        num_seqs: int,
        cache_tokens: int | None,
        max_new_tokens: int,
        max_model_len: int | None = None,
    ) -> None:
        self._num_seqs = num_seqs
        self._cache_tokens = cache_tokens
        tokens = _TYPICAL_PROMPT + max_new_tokens
        self._tokens = float(_WEIGHT * min(tokens, max_model_len or tokens))
        self._count = _WEIGHT

    def answered(self, prompt_tokens: int, cached_tokens: int, new_tokens: int) -> None:
        """What one took, beside what was there already; half of its answer over its time."""
        self._tokens += prompt_tokens - cached_tokens + new_tokens / 2
        self._count += 1
        if self._count >= _MOST_WEIGHT:
            self._tokens, self._count = self._tokens / 2, self._count // 2

    @property
    def at_a_time(self) -> int:
        """Requests that vLLM is likely to run together."""
        if self._cache_tokens is None:
            return self._num_seqs
        fitting = int(self._cache_tokens * self._count / self._tokens)
        return max(1, min(self._num_seqs, fitting))

    @property
    def size(self) -> int:
        """Half as many more, so that its queue is never empty."""
        return min(MAX_WINDOW, self.at_a_time + max(16, self.at_a_time // 2))


def cache_tokens(cache: Any) -> int | None:
    """Tokens that the KV cache holds, by vLLM's CacheConfig after the start."""
    # Where layers have caches of several kinds, blocks times their size are not it.
    tokens = getattr(cache, "kv_cache_size_tokens", None)
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    return tokens or (blocks * size if blocks and size else None)
