"""How many tokens a model leaves to a context, so that none is made that can't be answered.

Measured with the prompts a worker would send. Knows nothing of corpora and of the contexts' file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ragfleet.model_files import model_limit
from ragfleet.preparation import Preparation
from ragfleet.prompts import HEADINGS, RecordPromptError, build_messages

_SLACK: Final = 16
"""Tokens that a text may have more than its pieces one by one: they split anew where they join."""
_LEAST_QUESTION: Final = 64
_MEASURED: Final = 16


@dataclass(frozen=True)
class ContextRoom:
    """Tokens: `limit` = `tokens` + `max_new_tokens` + the rest of the prompt."""

    tokens: int
    limit: int
    max_new_tokens: int

    @property
    def sum(self) -> str:
        return (
            f"of the model's {self.limit:,}, --max_new_tokens takes {self.max_new_tokens:,} and the"
            f" rest of the prompt up to {self.limit - self.max_new_tokens - self.tokens:,}"
        )


def context_room(
    preparation: Preparation, records: Iterable[Mapping[str, Any]]
) -> ContextRoom | None:
    """The room beside answer, system prompt, question and chat template; `tokens` may be negative.

    None where it isn't known: no model here, one without a limit, or prompts made by a user's code
    or by a template that wants what only a context's row has.

    Args:
        records: the questions, as far as they are known: `query` and further fields.
    """
    model_dir, config = preparation.model_dir, preparation.config
    if model_dir is None or preparation.inference_class is not None:
        return None
    limit = model_limit(model_dir, config.max_model_len)
    if limit is None:
        return None
    from ragfleet.tokens import load_tokenizer

    tokenizer = load_tokenizer(model_dir, config.trust_remote_code)

    def length(record: Mapping[str, Any], query: str, method: str | None) -> int:
        messages = build_messages(preparation.prompts, record, query, "", method)
        return len(tokenizer.encode(*tokenizer.render(messages, preparation.prompts)))

    frame = question = 0
    try:
        for record in heapq.nlargest(_MEASURED, records, key=_num_bytes):
            empty = max(length(record, "", method) for method in HEADINGS)
            frame = max(frame, empty)
            longest = max(length(record, record["query"], method) for method in HEADINGS)
            question = max(question, longest - empty)
    except RecordPromptError:
        return None
    # In steps of powers of two, so that a question added later leaves the others' contexts as they
    # are. One that would take a quarter of the model has to find its own room.
    question = max(_LEAST_QUESTION, 1 << max(question - 1, 0).bit_length())
    rest = frame + min(question, limit // 4) + _SLACK
    return ContextRoom(limit - config.max_new_tokens - rest, limit, config.max_new_tokens)


def _num_bytes(record: Mapping[str, Any]) -> int:
    return len(record["query"].encode("utf-8", "replace"))
