"""vLLM on what `gpu.py` measured, from a checkpoint of the same weights: as its documentation shows
it, and behind this package's engine.

vLLM is no dependency: it is imported where somebody asks for it, once the others' memory is free.
Both arms have vLLM in a process of its own, which is its default, and ends with `end`. Its prefix
cache is not emptied: it holds nothing that another round asks for.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from gpu_arms import WholeArm, drive
from gpu_trials import Answers
from gpu_work import answer_tokens
from ragfleet.engines.protocol import EngineSpec, Prepared, PromptSettings, SamplingParams
from ragfleet.engines.vllm import VllmEngine

MEMORY: Final = 0.85
"""Of the GPU, for weights, keys and values."""
BLOCK: Final = 128


def save_tokenizer(checkpoint: Path) -> None:
    """One that knows a single word: prompts are ids, and answers are compared by theirs."""
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    Tokenizer(words).save(str(checkpoint / "tokenizer.json"))
    settings = {"chat_template": "{{ messages[-1]['content'] }}"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))


class RawVllm(WholeArm):
    """Its own scheduler and prefix cache, as its documentation shows it; groups together."""

    name = "vllm"
    notes: Sequence[str] = ()

    def __init__(self, checkpoint: Path, most_tokens: int, most_new: int) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self.llm: Any = LLM(
            str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=_rounded(most_tokens),
            enable_prefix_caching=True,
            gpu_memory_utilization=MEMORY,
        )

    def end(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        from vllm import SamplingParams as Params

        params = [
            Params(
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


class _OwnLengths(VllmEngine):
    """Answers as long as their requests say. Nothing else ends them: there is no end marker."""

    _submitted: Prepared | None = None
    """The one for which the engine makes parameters, of which it only tells the seed."""

    def submit(self, prepared: Prepared) -> None:
        self._submitted = prepared
        super().submit(prepared)

    def _sampling_params(self, seed: int | None) -> Any:
        params = super()._sampling_params(seed)
        if self._submitted is not None:
            params.max_tokens = answer_tokens(self._submitted)
        return params


class OursOnVllm(WholeArm):
    """The package's engine, as a worker drives it."""

    name = "ours_on_vllm"

    def __init__(self, checkpoint: Path, most_tokens: int, most_new: int) -> None:
        save_tokenizer(checkpoint)
        self.engine = _OwnLengths(
            EngineSpec(
                model_dir=checkpoint,
                sampling=SamplingParams(max_new_tokens=most_new),
                prompts=PromptSettings(system_prompt=""),
                precision="bf16",
                num_gpus=int(torch.cuda.is_available()),
                num_threads=torch.get_num_threads(),
                max_model_len=_rounded(most_tokens),
                engine_options={"gpu_memory_utilization": MEMORY},
            )
        )
        try:
            self.notes = self.engine.start().notes
        except BaseException:
            self.engine.close()
            raise

    def end(self) -> None:
        self.engine.close()

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        started = time.perf_counter()
        answers = drive(self.engine, requests)
        return time.perf_counter() - started, answers


def _rounded(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK
