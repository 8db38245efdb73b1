"""Raw `vllm.LLM.generate` on what `gpu.py` measured, from a checkpoint of the same weights.

vLLM is no dependency: it is imported where somebody asks for it, once the others' memory is free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_trials import Answers
from gpu_work import answer_tokens
from ragfleet.engines.protocol import Prepared


class RawVllm:
    """Its own scheduler and prefix cache, as its documentation shows it; groups together."""

    name, part = "vllm", None

    def __init__(self, checkpoint: Path, most_tokens: int) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: one GPU
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self.llm: Any = LLM(
            str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=-(-most_tokens // 128) * 128,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.85,
        )

    def group(self, share: int) -> int:
        return share

    def open(self, requests: Sequence[Prepared]) -> None:
        pass

    def close(self) -> None:
        pass

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        params = [
            SamplingParams(
                max_tokens=answer_tokens(request),
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts: Any = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return seconds, {
            request.key: list(output.outputs[0].token_ids)
            for request, output in zip(requests, outputs, strict=True)
        }
