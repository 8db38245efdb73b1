"""Stop strings and thinking in finished text."""

from __future__ import annotations

import pytest

from ragfleet.engines.answers import cut_at_stop, split_reasoning


def test_the_earliest_stop_string_cuts() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one two", ("four",)) is None
    assert cut_at_stop("one", ()) is None
    assert cut_at_stop("stop", ("stop",)) == ""


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("plain ", "p", (None, "plain ")),
        ("<think>\nhm\n</think>\n\nyes", "p", ("hm", "yes")),
        ("\n<think></think>yes", "p", ("", "yes")),
        ("hm</think>yes", "assistant\n<think>\n", ("hm", "yes")),
        ("<think>endless", "p", ("endless", "")),
        ("endless", "p<think>", ("endless", "")),
        ("say <think> aloud", "p", (None, "say <think> aloud")),
        ("yes", "p<think>\n\n</think>\n\n", (None, "yes")),
    ],
)
def test_thinking_is_split_off(text: str, prompt: str, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, prompt) == expected
