"""What the loop asks of a GPU, operation by operation, as a digest: does a change alter it?

    python -m pytest -s tests/contract/trace_operations.py

No test, but a way to compare two commits where no GPU is at hand: copy this file beside the tests
of the other one. Each of torch's operations on a pretended GPU counts, with the type, shape and
strides of its tensors and its other arguments, and so do the answers. Not seen: what CUDA graphs
and kernels in Triton do, which are not there.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Make
from pretended_gpu import pretended_gpu
from test_shared_prefix import answer, prompt_sets
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import make_model
from ragfleet.engines import decoding


class Trace(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations, and digests them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.digest = hashlib.sha256()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        words = [_word(one) for one in tree_leaves((args, kwargs, found))]
        self.digest.update(f"{func} {' '.join(words)}\n".encode())
        self.count += 1
        return found


def _word(one: Any) -> str:
    if isinstance(one, torch.Tensor):
        strides = None if one.is_mkldnn else one.stride()
        return f"{one.dtype}{tuple(one.shape)}{strides}"
    known = int | float | bool | str | torch.dtype | None
    return repr(one) if isinstance(one, known) else type(one).__name__


@pytest.mark.parametrize(
    ("precision", "temperature"), [("bf16", 0.0), ("bf16", 0.8), ("fp16", 0.0), ("fp32", 0.0)]
)
def test_say_what_was_asked(
    start: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    temperature: float,
) -> None:
    model_dir = make_model(tmp_path / "m", "--head_dim", "32", "--initializer_range", "0.02")
    seeds, seeded = itertools.count(), random.Random
    monkeypatch.setattr(decoding.random, "Random", lambda seed=None: seeded(next(seeds)))
    settings: Any = {"prefix_sharing": "on", "batch_size": 5, "max_new_tokens": 16, "top_p": 0.9}
    settings |= {"precision": precision, "temperature": temperature}
    trace = Trace()
    with pretended_gpu(monkeypatch), trace:
        engine = start(model_dir=model_dir, num_gpus=1, **settings)
        for name, prompts in prompt_sets().items():
            tokens = [tuple(one.token_ids) for one in answer(engine, prompts)]
            trace.digest.update(f"{name} {tokens}\n".encode())
    assert trace.count
    digest = trace.digest.hexdigest()[:16]
    print(f"\n{precision} {temperature}: {trace.count:,} operations, {digest}")
