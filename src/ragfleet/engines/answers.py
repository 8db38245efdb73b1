"""Generated text to answer: what every engine with a model does to its output.

Owns the cutting at stop strings and the separation of a model's thinking. The answer is otherwise
the model's text as it is, white space included. Knows nothing of tokens or engines.
"""

from __future__ import annotations

from collections.abc import Sequence

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """`text` before the first stop string in it; None when there is none."""
    found = [index for stop in stops if (index := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def split_reasoning(text: str, prompt: str) -> tuple[str | None, str]:
    """(reasoning, answer). Reasoning is None for models that do not think.

    The thinking begins in the answer, or in the prompt where the chat template opened it. Without
    an end mark the tokens ran out while thinking: there is no answer, and "" says so.
    """
    body = text.lstrip()
    if body.startswith(THINK_OPEN):
        body = body[len(THINK_OPEN) :]
    elif not prompt.rstrip().endswith(THINK_OPEN):
        return None, text
    reasoning, _, answer = body.partition(THINK_CLOSE)
    return reasoning.strip(), answer.strip()
