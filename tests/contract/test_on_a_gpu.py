"""The shared-prefix loop on a GPU: what the tests on the CPU leave to it.

`python -m pytest -m gpu tests/contract/test_on_a_gpu.py`: the fused kernel, fp32 token by token
without it, half precision with it and with captured steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import Make
from test_shared_prefix import answer, loop_of, prompt_sets

from models import Reference, make_model
from ragfleet.engines.shared_prefix.varlen import why_not_flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fused_kernel_is_as_its_source_says(dtype: torch.dtype, head_dim: int) -> None:
    assert why_not_flash(dtype, head_dim, torch.device("cuda:0")) is None


def test_fp32_gives_the_tokens_of_plain_generation(start: Make, reference: Reference) -> None:
    engine = start(num_gpus=1, prefix_sharing="on", batch_size=5, max_new_tokens=10)
    loop_of(engine)
    for prompts in prompt_sets().values():
        for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
            tokens = reference.generate(prompt, 10, [3])
            assert list(found.token_ids) == [token for token in tokens if token != 3]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_fused_and_captured(
    start: Make, tmp_path: Path, precision: str, temperature: float
) -> None:
    model = make_model(tmp_path / "m", "--head_dim", "32", "--initializer_range", "0.02")
    engine = start(
        model_dir=model,
        num_gpus=1,
        prefix_sharing="on",
        precision=precision,
        max_new_tokens=32,
        temperature=temperature,
        top_p=0.9,
    )
    loop = loop_of(engine)
    assert not [note for note in loop.notes if "CUDA graphs" in note]
    for prompts in prompt_sets().values():
        assert len(answer(engine, prompts)) == len(prompts)
    assert not loop._num_failures
    assert loop._decoder is not None
    buckets = loop._decoder._buckets.values()
    assert any(bucket.step != bucket._step for bucket in buckets), "nothing was captured"
