"""The transformers engine on a GPU: what the tests on the CPU leave to it.

On a real one by `python -m pytest -m gpu tests/contract/test_on_a_gpu.py`: the fused kernel, fp32
token by token without it, half precision with it and with captured steps, plain batches. By
default all but the kernel on a pretended one: see `pretended_gpu`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Make, ask, drive
from plain_fused import plain_gated, plain_rotate
from pretended_gpu import PretendedGpu, pretended_gpu
from test_shared_prefix import answer, loop_of, prompt_sets

from models import Reference, make_model
from ragfleet.engines import decoding
from ragfleet.engines.protocol import Completion
from ragfleet.engines.shared_prefix import varlen_pass
from ragfleet.engines.shared_prefix.forward import Forward
from ragfleet.engines.shared_prefix.varlen import (
    Levels,
    Ranges,
    attend_levels,
    flash_varlen,
    merge_levels,
    why_not_flash,
)
from ragfleet.errors import EngineDead

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
Gpu = Callable[[], AbstractContextManager[PretendedGpu | None]]
"""Engines with `num_gpus=1` that are started and asked within it are on it. None: a real one."""


@pytest.fixture(params=[pytest.param("real", marks=[pytest.mark.gpu, NEEDS_GPU]), "pretended"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return nullcontext if request.param == "real" else partial(pretended_gpu, monkeypatch)


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """The fused kernel wants heads of a multiple of 8; small logits, for half precision."""
    return make_model(tmp_path / "m", "--head_dim", "32", "--initializer_range", "0.02")


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_kernel_is_as_its_source_says(dtype: torch.dtype, head_dim: int) -> None:
    assert why_not_flash(dtype, head_dim, torch.device("cuda:0")) is None


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(
    ("head_dim", "group"), [(16, 3), (64, 4), (64, 71), (96, 1), (128, 8), (128, 32), (256, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_triton_give_what_plain_operations_do(
    dtype: torch.dtype, head_dim: int, group: int
) -> None:
    from ragfleet.engines.shared_prefix import triton_kernels

    triton_kernels.try_rows(dtype, head_dim, group, torch.device("cuda:0"))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_triton_takes_what_the_fused_kernel_gives(num_tokens: int, num_levels: int) -> None:
    from ragfleet.engines.shared_prefix import triton_kernels

    device = torch.device("cuda:0")
    torch.manual_seed(0)
    options: Any = {"dtype": torch.bfloat16, "device": device}
    query, (key, value) = (
        torch.randn(num_tokens, 8, 64, **options),
        torch.randn(2, 400, 2, 64, **options),
    )
    own = Ranges.of([(1, 300 + n, 40) for n in range(num_tokens)], device)
    levels = Ranges.of([(4 * num_tokens, 90 * n, 80) for n in range(num_levels)], device)
    found = attend_levels(flash_varlen, query, key, value, levels, num_levels, 0.2)
    absent = torch.zeros(num_levels, num_tokens, dtype=torch.bool, device=device)
    shared = Levels(*found, absent)
    wanted = merge_levels(shared, flash_varlen(query, key, value, own, 0.2))
    for one in (
        triton_kernels.attend_rows(query, key, value, own, shared, 0.2),
        triton_kernels.merge(shared, flash_varlen(query, key, value, own, 0.2)),
    ):
        torch.testing.assert_close(one, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_in_triton_are_rounded_once(dtype: torch.dtype) -> None:
    from ragfleet.engines.shared_prefix import triton_kernels

    torch.manual_seed(0)
    tolerance: Any = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps / 8}
    for dim, heads in ((64, 6), (96, 32), (128, 1)):
        options: Any = {"dtype": dtype, "device": "cuda:0"}
        query, key = (torch.randn(1, 37, n, dim, **options).transpose(1, 2) for n in (heads, 2))
        cos, sin = torch.randn(2, 1, 37, dim, **options)
        exact = plain_rotate(*(one.float() for one in (query, key, cos, sin)))
        for one, other in zip(triton_kernels.rotate(query, key, cos, sin), exact, strict=True):
            torch.testing.assert_close(one.float(), other, **tolerance)
        both = torch.randn(1, 37, 2 * dim * heads, **options)
        wanted = plain_gated(both.float())
        torch.testing.assert_close(triton_kernels.gated(both).float(), wanted, **tolerance)


def test_fp32_gives_the_tokens_of_plain_generation(
    reference: Reference, gpu: Gpu, start: Make
) -> None:
    sets = prompt_sets()
    with gpu() as pretended:
        engine = start(num_gpus=1, prefix_sharing="on", batch_size=5, max_new_tokens=10)
        loop_of(engine)
        if pretended is not None:  # where a pass lays out what is told elsewhere
            sets = {name: sets[name] for name in ("groups with a head", "no head")}
        found = {name: answer(engine, prompts) for name, prompts in sets.items()}
    for name, prompts in sets.items():
        for prompt, one in zip(prompts, found[name], strict=True):
            tokens = reference.generate(prompt, 10, [3])
            assert list(one.token_ids) == [token for token in tokens if token != 3]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_fused_and_captured(
    gpu: Gpu, start: Make, narrow: Path, precision: str, temperature: float
) -> None:
    sets = prompt_sets()
    with gpu() as pretended:
        engine = start(
            model_dir=narrow,
            num_gpus=1,
            prefix_sharing="on",
            precision=precision,
            max_new_tokens=16,
            temperature=temperature,
            top_p=0.9,
        )
        loop = loop_of(engine)
        if pretended is not None:
            sets = {name: sets[name] for name in ("questions that begin alike",)}
        for prompts in sets.values():
            assert len(answer(engine, prompts)) == len(prompts)
        assert not [note for note in loop.notes if "CUDA graphs" in note]
        if pretended is None:
            assert loop.degraded is None
            assert not [note for note in loop.notes if "the model's own" in note]
        else:
            assert "decoding goes without Triton" in str(loop.degraded)
        assert not loop._num_failures
        assert loop._decoder is not None
        buckets = loop._decoder._buckets.values()
        assert any(bucket.step != bucket._step for bucket in buckets), "nothing was captured"


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_plain_batches_answer_as_on_the_cpu(gpu: Gpu, start: Make, temperature: float) -> None:
    settings: Any = {"temperature": temperature, "top_p": 0.9, "max_new_tokens": 9}
    settings |= {"batch_size": 4, "prefix_sharing": "off"}
    requests = [ask(n, f"What is {n}?", "A text. " * (n % 3 + 4), seed=n) for n in range(12)]
    wanted = drive(start(**settings), requests)
    with gpu() as pretended:
        found = drive(start(num_gpus=1, **settings), requests)
    for key, outcome in wanted.items():
        other = found[key]
        assert isinstance(outcome, Completion)
        assert isinstance(other, Completion)
        assert other.token_ids == outcome.token_ids
    if pretended is not None:
        waits = pretended.waits["engines/decoding.py:__call__: tolist"]
        assert waits == len(requests) // 4 * 9, "one transfer for each step of a batch"


def test_a_gpu_that_fails_within_a_pass_ends_the_worker(
    monkeypatch: pytest.MonkeyPatch, start: Make, narrow: Path
) -> None:
    """It gives no memory back either."""

    def broken(*args: Any, **others: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pretended_gpu(monkeypatch):
        engine = start(model_dir=narrow, num_gpus=1, precision="bf16")
        loop_of(engine)
        monkeypatch.setattr(Forward, "__call__", broken)
        monkeypatch.setattr(type(engine._model), "generate", broken)  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "empty_cache", broken)
            with pytest.raises(EngineDead, match="illegal memory access"):
                drive(engine, [ask(1)])


# ---- the pretended one bites


def test_a_captured_step_that_waits(
    monkeypatch: pytest.MonkeyPatch, start: Make, narrow: Path
) -> None:
    floor = decoding.nucleus_floor

    def waiting(probs: torch.Tensor, top_p: float) -> torch.Tensor:
        assert bool((probs >= 0).all())
        return floor(probs, top_p)

    monkeypatch.setattr(decoding, "nucleus_floor", waiting)
    settings: Any = {"precision": "bf16", "temperature": 0.8, "top_p": 0.9}
    with pretended_gpu(monkeypatch):
        engine = start(model_dir=narrow, num_gpus=1, prefix_sharing="on", **settings)
        assert "not permitted when stream is capturing: __bool__" in str(loop_of(engine).notes)


def test_a_tensor_left_on_the_host(
    monkeypatch: pytest.MonkeyPatch, start: Make, narrow: Path
) -> None:
    part = varlen_pass._part_of

    def left(*args: Any, **others: Any) -> varlen_pass.Part:
        made = part(*args, **others)
        absent = torch.zeros(made.absent.shape, dtype=torch.bool)
        return dataclasses.replace(made, absent=absent)

    monkeypatch.setattr(varlen_pass, "_part_of", left)
    with pretended_gpu(monkeypatch):
        engine = start(model_dir=narrow, num_gpus=1, precision="bf16")
        assert "same device" in str(engine.start().degraded)
