"""Users' own classes: what reaches them, what they can call, and how they are blamed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from driving import USER_CLASSES, Make, ask, drive

from models import make_model
from ragfleet.engines.protocol import Completion, Failure, Prepared
from ragfleet.engines.query_based import QueryBasedInference
from ragfleet.engines.query_engines import AsyncEngine, QueryBasedEngine
from ragfleet.engines.user_class import check_class, load_class
from ragfleet.errors import ConfigError, EngineDead, ModelError

# ---- calling the configured engine ------------------------------------------------------------


@pytest.mark.parametrize("user_class", ["Around", "AroundAsync", "Neither"])
def test_super_answers_as_the_configured_engine(start: Make, user_class: str) -> None:
    requests = [ask(number, f"Question {number}?", "word " * number) for number in range(3)]
    plain = drive(start("transformers"), requests)
    through = drive(start("transformers", user_class), requests)
    for request in requests:
        one, other = plain[request.key], through[request.key]
        assert isinstance(one, Completion)
        assert isinstance(other, Completion)
        assert one.text == other.text
        assert one.prompt_tokens == other.prompt_tokens
        assert one.completion_tokens == other.completion_tokens
        assert one.finish_reason == other.finish_reason


def test_calls_of_one_record_are_different_draws(start: Make) -> None:
    texts = []
    for _ in range(2):
        engine = start("transformers", "Around", temperature=1.5)
        request = ask(1, "TWICE", seed=7)
        outcome = drive(engine, [request])[request.key]
        assert isinstance(outcome, Completion)
        assert outcome.completion_tokens == 16
        texts.append(outcome.text)
        first, second = outcome.text.split("|", 1)
        assert first != second
    assert texts[0] == texts[1]


def test_the_configured_engine_fails_as_itself(start: Make) -> None:
    outcome = drive(
        start("transformers", "Around", max_model_len=100), [ask(1, context="word " * 300)]
    )
    failure = outcome[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"


def test_no_model_is_loaded_until_it_is_asked(start: Make, tmp_path: Path) -> None:
    engine = start("transformers", "Sync", model_dir=tmp_path / "nothing here")
    assert isinstance(drive(engine, [ask(1)])[ask(1).key], Completion)
    engine = start("transformers", "Around", model_dir=tmp_path / "nothing here")
    prepared = engine.prepare(ask(1))
    assert isinstance(prepared, Prepared)
    engine.submit(prepared)
    with pytest.raises(ModelError, match="no such folder"):
        engine.step(1.0)


def test_a_dead_engine_is_not_swallowed(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start("echo", "Swallows")
    assert isinstance(engine, QueryBasedEngine)
    assert isinstance(drive(engine, [ask(1)])[ask(1).key], Completion)

    def step(timeout_s: float) -> Any:
        raise EngineDead("the GPU is gone")

    monkeypatch.setattr(engine._inner, "step", step)
    prepared = engine.prepare(ask(2))
    assert isinstance(prepared, Prepared)
    engine.submit(prepared)  # type: ignore[attr-defined]
    with pytest.raises(EngineDead, match="the GPU is gone"):
        engine.step(1.0)  # type: ignore[attr-defined]


# ---- prompts ----------------------------------------------------------------------------------


def test_create_prompt_is_the_user_message(start: Make, tmp_path: Path) -> None:
    prepared = start("transformers", "Prompt").prepare(ask(1))
    assert isinstance(prepared, Prepared)
    assert prepared.prompt == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nr-1: What is it? (rag_fallback)\nA text.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    plain = make_model(tmp_path / "plain", "--no-chat_template")
    prepared = start("transformers", "Prompt", model_dir=plain).prepare(ask(1))
    assert isinstance(prepared, Prepared)
    assert prepared.prompt == "r-1: What is it? (rag_fallback)\nA text."


def test_create_prompt_sees_the_trimmed_context(start: Make) -> None:
    engine = start("transformers", "Prompt", truncate_context="tail", max_model_len=200)
    prepared = engine.prepare(ask(1, context="word " * 500))
    assert isinstance(prepared, Prepared)
    assert len(prepared.token_ids) <= 192
    assert prepared.prompt.count("r-1: What is it? (rag_fallback)\nword word") == 1


def test_a_prompt_that_asks_for_an_answer_takes_none_of_the_others(start: Make) -> None:
    requests = [ask(1), ask(2, "ASK"), ask(3)]
    outcomes = drive(start("transformers", "Prompt"), requests)
    failure = outcomes[requests[1].key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "generation_error"
    assert "create_prompt and setup() can't ask for an answer" in failure.error
    assert all(isinstance(outcomes[requests[n].key], Completion) for n in (0, 2))


def test_a_kind_of_string_is_its_text(start: Make) -> None:
    for user_class in ("KindOfString", "KindOfStringAsync"):
        outcome = drive(start("echo", user_class), [ask(1)])[ask(1).key]
        assert isinstance(outcome, Completion)
        assert (type(outcome.text), outcome.text) == (str, "some text")
    prepared = start("transformers", "KindOfPrompt").prepare(ask(1))
    assert isinstance(prepared, Prepared)
    assert type(prepared.prompt) is str
    assert "user\nsome text<|im_end|>" in prepared.prompt


# ---- concurrency ------------------------------------------------------------------------------


def test_async_answers_run_together_up_to_the_batch_size(start: Make) -> None:
    for batch_size, most in ((None, 8), (3, 3)):
        engine = start("echo", "Async", batch_size=batch_size)
        assert isinstance(engine, AsyncEngine)
        drive(engine, [ask(number) for number in range(12)])
        assert engine._cls.most == most  # type: ignore[attr-defined]
        assert engine._cls.running == 0  # type: ignore[attr-defined]


def test_async_timeouts_and_cancelling_at_the_end(start: Make) -> None:
    engine = start("echo", "Async", request_timeout_s=0.1)
    outcomes = drive(engine, [ask(1, "HANG"), ask(2)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert (failure.error_type, failure.retryable) == ("timeout", True)
    assert "no answer within 0.1 s" in failure.error
    assert isinstance(outcomes[ask(2).key], Completion)

    engine = start("echo", "Async")
    assert isinstance(engine, AsyncEngine)
    for number in range(2):
        prepared = engine.prepare(ask(number, "HANG"))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    begun = time.monotonic()
    assert engine.step(0.05) == []
    engine.abort(ask(0).key)
    engine.close()
    assert time.monotonic() - begun < 3
    assert engine._cls.running == 0  # type: ignore[attr-defined]


# ---- finding the class ------------------------------------------------------------------------


def test_check_class_reads_without_running(tmp_path: Path) -> None:
    assert check_class(f"{USER_CLASSES}:Sync") == "3"
    assert check_class(f"{USER_CLASSES}:Async") is None
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('it ran')\nfrom x import Other\nclass Mine: version = 1.5\n")
    assert check_class(f"{file}:Mine") == "1.5"
    assert check_class(f"{file}:Other") is None


BAD_FILES = {
    "class Mime: pass": r"has no class Mine.* Did you mean Mime\?",
    "x = 1": "has no class Mine.*It has: none",
    "def f(:": r"mine\.py:1: not valid Python",
    "class Mine:\n    version = str(1)": r"mine\.py:2: version must be a plain string",
}


@pytest.mark.parametrize("source", BAD_FILES)
def test_check_class_refuses(tmp_path: Path, source: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ConfigError, match=BAD_FILES[source]):
        check_class(f"{file}:Mine")


@pytest.mark.parametrize("reference", ["mine.py", "mine:Mine", "mine.py:", "mine.py:1x"])
def test_references_must_name_file_and_class(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"must be file\.py:ClassName"):
        check_class(reference)


def test_load_class_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_class(f"{tmp_path}/none.py:Mine", QueryBasedInference)
    with pytest.raises(ConfigError, match=r"NotASubclass is not a subclass .*from ragfleet import"):
        load_class(f"{USER_CLASSES}:NotASubclass", QueryBasedInference)
    file = tmp_path / "failing.py"
    file.write_text("import beside\n")
    (tmp_path / "beside.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="has no class Mine"):
        load_class(f"{file}:Mine", QueryBasedInference)
    file.write_text("\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError: .*failing\.py:2"):
        load_class(f"{file}:Mine", QueryBasedInference)


def test_outside_of_a_record_it_says_so(start: Make) -> None:
    with pytest.raises(ConfigError, match="only while a record is being answered, not in setup"):
        start("echo", "AsksInSetup")


def test_outside_of_a_run_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"QueryBasedInference\.main\(\)"):
        QueryBasedInference().generate_answer("q", "c", None)
    with pytest.raises(RuntimeError, match="only while a record is being answered"):
        _ = QueryBasedInference().record


def test_main_is_the_infer_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    cli = type(sys)("ragfleet.cli")
    cli.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ragfleet.cli", cli)
    loaded = load_class(f"{USER_CLASSES}:Sync", QueryBasedInference)
    with pytest.raises(SystemExit) as exit_info:
        loaded.main(["--num_workers", "2"])
    assert exit_info.value.code == 5
    assert seen == [["infer", "--inference_class", f"{USER_CLASSES}:Sync", "--num_workers", "2"]]


def test_the_base_class_needs_no_torch() -> None:
    code = (
        "import sys, ragfleet.engines.query_engines, ragfleet.engines.make\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
