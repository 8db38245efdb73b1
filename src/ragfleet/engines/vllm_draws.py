"""Draws of seeded requests on vLLM's build for the CPU, made here and not by vLLM.

Owns a logits processor: vLLM's own way to put code between the model and its sampler. vLLM gives a
seeded request a generator, draws from it after each piece of a prompt too, and takes such a draw
back by the generator's offset. Generators on the CPU have none, and vLLM dies there ("CPU Generator
does not use offset", 0.32). To have prompts read whole is no way out: a step may then be as long as
max_model_len, in time and in memory.

Here the n-th token has the n-th draw of the record's stream, however often it is asked for. The
stream and the choice are those of the transformers engine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ragfleet.engines.decoding import TokenChooser
from ragfleet.engines.protocol import SamplingParams
from ragfleet.engines.vllm_settings import DRAW

if TYPE_CHECKING:
    import torch


class SeededDraws(LogitsProcessor):  # type: ignore[misc]
    """Leaves requests that have `DRAW` in `extra_args` one finite logit, that of the token drawn.

    To vLLM such requests are greedy.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._streams: dict[int, _Stream] = {}
        """By the request's row."""
        self._chooser: TokenChooser | None = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._streams, batch_update, self._stream)

    def _stream(self, params: Any, prompt_ids: Any, output_ids: Sequence[int]) -> _Stream | None:
        """Also called for a request that goes on after vLLM had put it off."""
        asked = (params.extra_args or {}).get(DRAW)
        if asked is None:
            return None
        if self._chooser is None:  # all requests of an engine are sampled alike
            self._chooser = TokenChooser(SamplingParams(max_new_tokens=1, **asked["sampling"]))
        return _Stream(asked["seed"], output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[requests, vocab] logits, of which some may belong to the middle of a prompt."""
        if self._chooser is not None and self._streams:
            rows = list(self._streams)
            draws = [stream.draw() for stream in self._streams.values()]
            tokens = self._chooser.pick_by(logits[rows], draws)
            logits[rows] = -float("inf")
            logits[rows, tokens] = 0.0
        return logits


class _Stream:
    """A request's draws, by the number of its tokens so far (`output_ids` grows)."""

    def __init__(self, seed: int, output_ids: Sequence[int]) -> None:
        self._random = random.Random(seed)
        self._output_ids = output_ids
        self._draws: list[float] = []

    def draw(self) -> float:
        while len(self._draws) <= len(self._output_ids):
            self._draws.append(self._random.random())
        return self._draws[len(self._output_ids)]
