"""transformers' own continuous batching as an arm of `gpu.py`: what ours is measured against.

Through the manager behind `generate_batch`, which takes a length for each request. Written against
transformers 5.17 and 5.23.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Sequence
from typing import Any, Final

from transformers import GenerationConfig

import gpu_flash
from gpu_arms import Host, OnHost, timed
from gpu_trials import Answers
from gpu_work import answer_tokens
from ragfleet.engines.protocol import Prepared

NO_END: Final = -1
CONTINUOUS_SHARE: Final = 0.6
"""Of the memory that ours leaves free: continuous batching's, for keys and values and for what its
passes need. The rest is for the other arms' passes."""


def has_flash_package() -> bool:
    """Which continuous batching then takes by itself."""
    return any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface")))


class Continuous(OnHost):
    """transformers' own continuous batching: the manager that `generate_batch` makes.

    It is made at a cell's first run and kept until its last one, warm, as a loop of ours is.
    """

    def __init__(self, host: Host, *, stock: bool) -> None:
        """`stock`: with the attention that transformers chooses by itself."""
        super().__init__(host)
        self.name = "stock" if stock else "continuous"
        self.what = "what transformers chooses"
        self._requests: Sequence[Prepared] = ()
        self._manager: Any = None
        self._attention: str | None = None
        """What its passes ask for; None: not known before the manager is made."""
        self._is_lent = False
        if not stock and not has_flash_package():
            self._attention, self.what = gpu_flash.install(host.device, host.model.dtype)
            self._is_lent = self._attention is not None

    @property
    def attention(self) -> str:
        return f"{self.what}: {self._attention or 'not known yet'}"

    def open(self, requests: Sequence[Prepared]) -> None:
        self._requests = requests

    def close(self) -> None:
        if self._manager is not None:
            with self.host.as_made():
                self._manager.stop(block=True, timeout=20)
                self._manager.destroy()
            self._manager = None
        self.host.free()

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        try:
            return self._run(requests)
        except Exception as error:
            self.close()
            if not self._is_lent:
                raise
            traceback.print_exc()
            # Better a weaker peer than none, and said to be so.
            self._attention, self._is_lent = None, False
            self.what = f"what transformers chooses (torch's kernel: {error!r:.200})"
            return self._run(requests)

    def _run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        with self.host.as_made() as model:
            before = model.config._attn_implementation
            try:
                if self._is_lent:
                    gpu_flash.install(self.host.device, model.dtype)
                if self._attention is not None:
                    model.config._attn_implementation = self._attention
                if self._manager is None:
                    self.host.free()
                    self._manager = self._make_manager(model)
                    self._attention = model.config._attn_implementation
                return timed(self.host.device, lambda: self._answers(requests))
            finally:
                model.config._attn_implementation = before

    def _make_manager(self, model: Any) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        most_new = max(map(answer_tokens, self._requests))
        lengths = [len(request.token_ids) + most_new for request in self._requests]
        room: dict[str, Any] = {"max_memory_percent": CONTINUOUS_SHARE}
        if self.host.is_toy:  # a cache for millions of its tokens, and masks over all of them
            blocks = sum(length // 256 + 2 for length in lengths)
            room = {"num_blocks": blocks, "max_batch_tokens": 512}
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=most_new, do_sample=False, eos_token_id=NO_END, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**room),
            workload_hints=WorkloadHints(
                max_prompt_length=max(lengths) - most_new,
                max_generated_length=most_new,
                num_requests=len(self._requests),
            ),
        )
        manager.warmup()
        manager.start()
        return manager

    def _answers(self, requests: Sequence[Prepared]) -> Answers:
        # In the order in which its own add_requests hands prompts in, for the sake of its cache.
        for request in sorted(requests, key=lambda r: list(r.token_ids), reverse=True):
            self._manager.add_request(
                list(request.token_ids),
                request_id=request.key.hex(),
                max_new_tokens=answer_tokens(request),
                eos_token_id=NO_END,
            )
        answers: Answers = {}
        while len(answers) < len(requests):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error or "a request failed; its log says why")
                answers[bytes.fromhex(result.request_id)] = list(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise RuntimeError("its generation thread ended")
        return answers
