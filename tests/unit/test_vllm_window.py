"""How many requests vLLM is given at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ragfleet.engines.vllm_window import Window, cache_tokens


@pytest.mark.parametrize(
    ("num_seqs", "tokens", "max_new_tokens", "max_model_len", "at_a_time", "size"),
    [
        (1024, 400_000, 256, None, 312, 468),
        (256, 400_000, 256, None, 256, 384),
        (4, 131_072, 8, None, 4, 20),
        (1024, 400_000, 4096, 2048, 195, 292),  # no request is longer than the model's limit
        (1024, 500, 4096, None, 1, 17),
        (1024, None, 256, None, 1024, 1536),
        (4096, None, 256, None, 4096, 2048),
    ],
)
def test_the_cache_limits_what_runs(
    num_seqs: int,
    tokens: int | None,
    max_new_tokens: int,
    max_model_len: int | None,
    at_a_time: int,
    size: int,
) -> None:
    window = Window(num_seqs, tokens, max_new_tokens, max_model_len)
    assert (window.at_a_time, window.size) == (at_a_time, size)


def test_short_answers_and_shared_prompts_make_room() -> None:
    window = Window(1024, 400_000, 4096)
    assert window.at_a_time == 78
    for _ in range(1000):
        window.answered(2000, 1800, 200)
    assert 800 < window.at_a_time <= 1024
    for _ in range(10_000):
        window.answered(8000, 0, 200)
    assert window.at_a_time < 60


@pytest.mark.parametrize(("before", "after", "fitting"), [(6000, 300, 570), (300, 6000, 32)])
def test_what_was_long_ago_is_forgotten(before: int, after: int, fitting: int) -> None:
    """Costly requests come first."""
    window = Window(1024, 200_000, 100)
    for _ in range(20_000):
        window.answered(before, 0, 100)
    for _ in range(1500):
        window.answered(after, 0, 100)
    assert 0.7 * fitting < window.at_a_time < 1.5 * fitting


@pytest.mark.parametrize(
    ("cache", "tokens"),
    [
        ({"num_gpu_blocks": 10, "block_size": 16, "kv_cache_size_tokens": 120}, 120),
        ({"num_gpu_blocks": 10, "block_size": 16, "kv_cache_size_tokens": None}, 160),
        ({"num_gpu_blocks": 10, "block_size": 16}, 160),
        ({"num_gpu_blocks": None, "block_size": 16}, None),
        ({}, None),
    ],
)
def test_what_the_cache_holds(cache: dict[str, Any], tokens: int | None) -> None:
    assert cache_tokens(SimpleNamespace(**cache)) == tokens
