"""One pass through the model's own forward.

Owns the model's state while the loop uses it: the name of its attention, its packed weights, its
trimmed last layer, its fused layers. `plain` gives the model back as transformers made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch

from ragfleet.engines.shared_prefix import attention
from ragfleet.engines.shared_prefix.fused_layers import Fused, FusedLayers
from ragfleet.engines.shared_prefix.packing import (
    Wanted,
    pack_weights,
    restore_last_layer,
    trim_last_layer,
    unpack_weights,
)


class Readable(attention.Attending, Protocol):
    """A pass as tensors, on the model's device."""

    input_ids: torch.Tensor
    """[1, tokens]"""
    position_ids: torch.Tensor
    logit_rows: torch.Tensor
    """Tokens whose logits are wanted, in the order of `slots`; one at least."""
    slots: list[int]
    num_tokens: int


class Forward:
    """A model made ready for passes."""

    def __init__(self, model: Any, *, pack: bool = True, fused: Fused | None = None) -> None:
        attention.register()
        self._model = model
        self._fused: FusedLayers | None = None
        self._plain_attention = model.config._attn_implementation
        self.notes: list[str] = []
        """Lines for the log."""
        try:
            self.why_not_packed = pack_weights(model) if pack else None
            self._wanted: Wanted = trim_last_layer(model)
            if fused is not None:
                self._fused = FusedLayers(model, fused)
                self.notes = self._fused.notes
            self._use(attention.NAME)
        except BaseException:
            self.undo()
            raise

    def __call__(self, tensors: Readable) -> torch.Tensor:
        """Logits [len(tensors.slots), vocab]; keys and values are written by the way."""
        everything = len(tensors.logit_rows) == tensors.num_tokens
        self._wanted.rows = None if everything else tensors.logit_rows
        passing = nullcontext() if self._fused is None else self._fused.passing()
        with torch.inference_mode(), passing:
            out = self._model(
                input_ids=tensors.input_ids,
                position_ids=tensors.position_ids,
                use_cache=False,
                logits_to_keep=tensors.logit_rows,
                shared_prefix=tensors,
            )
        logits: torch.Tensor = out.logits[0, : len(tensors.slots)]
        return logits

    @contextmanager
    def plain(self) -> Iterator[None]:
        """For `generate`: transformers' own attention, every token in the last layer."""
        self._wanted.rows = None
        self._use(self._plain_attention)
        try:
            yield
        finally:
            self._use(attention.NAME)

    def undo(self) -> None:
        """The model as it was."""
        restore_last_layer(self._model)
        unpack_weights(self._model)
        self._use(self._plain_attention)

    def _use(self, name: str) -> None:
        if self._fused is not None:
            self._fused.use() if name == attention.NAME else self._fused.undo()
        # The setter for users also looks for kernels to download; this is what it does in the end.
        for config in (self._model.config, self._model.config.get_text_config()):
            config._attn_implementation = name
