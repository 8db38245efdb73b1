"""vLLM behind the seam: the reference's tokens, its own limits, and how it fails."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from driving import Make, ask, drive

from models import NEEDS_VLLM, Reference, changed_copy, example_records, make_model
from ragfleet.engines.protocol import (
    Completion,
    Engine,
    EngineSpec,
    Failure,
    Prepared,
    PromptSettings,
    Request,
    SamplingParams,
)
from ragfleet.engines.vllm_options import find_vllm, option_names
from ragfleet.errors import ConfigError, DeviceError, EngineDead, ModelError

pytestmark = NEEDS_VLLM
OWN_PROCESS = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1"
"""vLLM's engine is another process, as on a GPU. `make test-vllm` has those so marked run again."""
NUM, NEW = 24, 12
DRAWN: dict[str, Any] = {"temperature": 0.3, "top_p": 0.9}
"""Some ten tokens to draw from. At 0.9 they are 400, and rounding moves some out of the nucleus."""


def examples(first_seed: int | None = None) -> list[Request]:
    return [
        ask(
            number,
            record["query"],
            record["context"],
            None if first_seed is None else first_seed + number,
            record["retrieval_method"],
        )
        for number, record in enumerate(example_records(NUM))
    ]


def completions(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    outcomes = drive(engine, requests)
    found = [outcomes[request.key] for request in requests]
    assert all(isinstance(outcome, Completion) for outcome in found), found
    return found  # type: ignore[return-value]


def prompt_ids(engine: Engine, request: Request) -> Sequence[int]:
    prepared = engine.prepare(request)
    assert isinstance(prepared, Prepared)
    return prepared.token_ids


@pytest.fixture(scope="module")
def expected(vllm_model: Path) -> list[list[int]]:
    """The reference's tokens for `examples()`, end marker included."""
    from ragfleet.tokens import load_tokenizer, prepare_prompt

    tokenizer, reference = load_tokenizer(vllm_model), Reference(vllm_model)
    settings, sampling = PromptSettings(system_prompt="Be brief."), SamplingParams(max_new_tokens=1)
    tokens = []
    for request in examples():
        prepared = prepare_prompt(request, settings, tokenizer, sampling, None)
        assert isinstance(prepared, Prepared)
        tokens.append(reference.generate(prepared.token_ids, NEW, tokenizer.eos_ids))
    return tokens


# ---- tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.own_process),
        {"max_num_batched_tokens": 256, "max_num_seqs": 4},
    ],
)
def test_greedy_tokens_are_those_of_batch_size_1(
    start: Make, expected: list[list[int]], options: dict[str, Any]
) -> None:
    engine = start("vllm", max_new_tokens=NEW, engine_options=options)
    requests = examples()
    random.Random(1).shuffle(order := list(range(NUM)))
    answers = completions(engine, [requests[index] for index in order])
    for index, answer in zip(order, answers, strict=True):
        assert [t for t in expected[index] if t != 3] == list(answer.token_ids)
        assert answer.completion_tokens == len(expected[index])
        assert answer.finish_reason == ("stop" if 3 in expected[index] else "length")
        assert answer.prompt_tokens == len(prompt_ids(engine, requests[index]))
    assert engine.progress() >= sum(map(len, expected))


@pytest.mark.parametrize("arch", ["qwen2", "mistral"])
def test_other_architectures(start: Make, tmp_path: Path, arch: str) -> None:
    flags = ("--arch", arch, "--no-chat_template", "--head_dim", "32")
    model = make_model(tmp_path / arch, *flags)
    engine = start("vllm", model_dir=model, engine_options={})
    requests = examples()[:4]
    answers = completions(engine, requests)
    reference = Reference(model)
    for request, answer in zip(requests, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(prompt_ids(engine, request), 8, [3])


def test_the_end_marker_ends_an_answer_and_is_counted(
    start: Make, vllm_model: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    marks = sorted({tokens[index] for index, tokens in enumerate(expected[:8])})
    changes = {"eos_token_id": marks, "temperature": 0.6, "repetition_penalty": 1.5}
    model = changed_copy(vllm_model, tmp_path / "m", generation_config=changes)
    engine = start("vllm", model_dir=model, max_new_tokens=NEW, engine_options={})
    for tokens, answer in zip(expected, completions(engine, examples()[:8]), strict=False):
        end = min(tokens.index(mark) for mark in marks if mark in tokens)
        assert list(answer.token_ids) == tokens[:end]
        assert answer.completion_tokens == end + 1
        assert answer.finish_reason == "stop"


def test_stop_strings_end_an_answer_and_are_not_part_of_it(start: Make) -> None:
    whole = completions(start("vllm", max_new_tokens=NEW, engine_options={}), examples()[:6])
    texts = [answer.text for answer in whole]
    stop = tuple({text[len(text) // 2 :][:3] for text in texts if len(text) > 6})
    engine = start("vllm", max_new_tokens=NEW, stop=stop, engine_options={})
    for text, answer in zip(texts, completions(engine, examples()[:6]), strict=True):
        ends = [text.find(one) for one in stop if one in text]
        assert answer.text == text[: min(ends, default=len(text))]
        assert answer.finish_reason == ("stop" if ends else "length")


def test_seeded_draws_do_not_depend_on_batches_or_order(start: Make) -> None:
    settings = {**DRAWN, "max_new_tokens": NEW, "engine_options": {}}
    alone = completions(start("vllm", batch_size=1, **settings), examples(1000)[:8])
    together = completions(start("vllm", batch_size=4, **settings), examples(1000)[7::-1])[::-1]
    assert [a.token_ids for a in alone] == [b.token_ids for b in together]
    large = [ask(1, seed=2**64 - 1)]
    assert completions(start("vllm", **settings), large)


def test_seeded_draws_of_prompts_read_in_pieces(start: Make, vllm_model: Path) -> None:
    """On the CPU vLLM's own generators cannot go back after a piece; see `vllm_draws`."""
    pieces = {"engine_options": {"max_num_batched_tokens": 256, "max_num_seqs": 4}}
    requests = examples(1000)

    def drawn(engine: str, **more: Any) -> list[Sequence[int]]:
        started = start(engine, model_dir=vllm_model, max_new_tokens=NEW, **DRAWN, **more)
        assert max(len(prompt_ids(started, request)) for request in requests) > 4 * 256
        answers = [answer.token_ids for answer in completions(started, requests)]
        started.close()
        return answers

    once = drawn("vllm", **pieces)
    assert drawn("vllm", **pieces) == once
    assert drawn("transformers") == once


def test_unseeded_draws_differ_between_processes_and_within_one(start: Make) -> None:
    draws = []
    for _ in range(2):  # vLLM would seed each start with 0
        engine = start("vllm", temperature=1.5, max_new_tokens=NEW, engine_options={})
        draws += [completions(engine, [ask(1)])[0].token_ids for _ in range(2)]
        engine.close()
    assert len(set(draws)) == 4


def test_a_shared_prefix_is_computed_once(start: Make) -> None:
    engine: Any = start("vllm", batch_size=2, engine_options={"block_size": 32})
    context = "word " * 400
    requests = [ask(number, f"Question {number}?", context) for number in range(8)]
    found = completions(engine, requests)
    assert engine.num_cached_tokens > 0.7 * engine.num_prompt_tokens
    assert sum(each.cached_tokens or 0 for each in found) == engine.num_cached_tokens


# ---- refusals


def test_what_does_not_fit_is_refused_before_it_reaches_the_engine(start: Make) -> None:
    engine = start("vllm", max_new_tokens=1, max_model_len=64, engine_options={})
    words = next(n for n in range(200) if len(prompt_ids_of(engine, n)) == 63)
    answer = completions(engine, [ask(1, context="x " * words)])[0]
    assert (answer.prompt_tokens, answer.completion_tokens) == (63, 1)
    failure = engine.prepare(ask(2, context="x " * (words + 1)))
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"


def prompt_ids_of(engine: Engine, words: int) -> Sequence[int]:
    prepared = engine.prepare(ask(1, context="x " * words))
    return prepared.token_ids if isinstance(prepared, Prepared) else ()


def test_tokens_without_an_embedding_are_refused(
    start: Make, vllm_model: Path, tmp_path: Path
) -> None:
    extra = {"2048": {"content": "<extra>", "special": True}}
    model = changed_copy(
        vllm_model, tmp_path / "m", tokenizer_config={"added_tokens_decoder": extra}
    )
    engine = start("vllm", model_dir=model, engine_options={})
    outcomes = drive(engine, [ask(0), ask(1, "What is <extra>?"), ask(2)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert "token 2048" in failure.error
    assert isinstance(outcomes[ask(2).key], Completion)


@pytest.mark.own_process
def test_one_refused_request_leaves_its_neighbours_alone(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = start("vllm", engine_options={})
    add_request = engine._llm.add_request

    def refuse(name: str, prompt: Any, params: Any) -> Any:
        if name == "2":
            prompt = {"prompt_token_ids": []}
        return add_request(name, prompt, params)

    monkeypatch.setattr(engine._llm, "add_request", refuse)
    outcomes = drive(engine, [ask(0), ask(1), ask(2)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert "cannot be empty" in failure.error
    assert sum(isinstance(outcome, Completion) for outcome in outcomes.values()) == 2


def test_a_request_may_take_only_so_long(start: Make) -> None:
    engine = start("vllm", max_new_tokens=4000, request_timeout_s=0.05, engine_options={})
    failure = drive(engine, [ask(0)])[ask(0).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "timeout"


def test_an_error_in_a_step_ends_the_engine(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = start("vllm", engine_options={})
    prepared = engine.prepare(ask(1))
    engine.submit(prepared)

    def fail() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(engine._llm, "step", fail)
    with pytest.raises(EngineDead, match="illegal memory access"):
        engine.step(1.0)


@pytest.mark.skipif(not OWN_PROCESS, reason="VLLM_ENABLE_V1_MULTIPROCESSING is not 1 here")
@pytest.mark.own_process
def test_the_death_of_its_process_ends_the_engine(start: Make) -> None:
    engine = start("vllm", max_new_tokens=4000, engine_options={})
    for number in range(4):
        prepared = engine.prepare(ask(number))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    assert engine.step(0.2) == []
    (process,) = multiprocessing.active_children()
    process.kill()
    killed_s = time.monotonic()
    with pytest.raises(EngineDead, match=r"EngineCore \(pid \d+\) was killed by SIGKILL"):
        step_without_answers(engine)
    assert time.monotonic() - killed_s < 10
    with pytest.raises(EngineDead):
        engine.submit(prepared)


def step_without_answers(engine: Engine) -> None:
    while True:
        assert engine.step(1.0) == []


@pytest.mark.own_process
def test_what_vllm_cannot_load_is_one_line(start: Make, vllm_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot start with it: .*cache blocks"):
        start("vllm", engine_options={"kv_cache_memory_bytes": 1}, max_model_len=8192)
    model = changed_copy(
        vllm_model,
        tmp_path / "m",
        config={"architectures": ["NobodyKnows"], "model_type": "nobody"},
    )
    with pytest.raises(ModelError, match=r"vLLM [0-9.+a-z]+ cannot start with it"):
        start("vllm", model_dir=model, engine_options={})


def test_a_smaller_cache_makes_the_limit_smaller_and_says_so(start: Make) -> None:
    engine = start("vllm", engine_options={"kv_cache_memory_bytes": 2 << 20})
    engine.close()
    notes = " ".join(engine.start().notes)
    assert "that is what the KV cache holds; the model would take 8192" in notes


def test_where_freed_memory_cannot_be_kept_it_says_so(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragfleet.engines.vllm.keep_freed_memory", lambda: "no mallopt")
    engine = start("vllm")
    engine.close()
    assert "memory is mapped anew in every pass: no mallopt" in engine.start().notes


def test_names_of_options_are_those_of_engine_args(start: Make) -> None:
    import dataclasses

    import vllm

    installed = find_vllm()
    assert installed is not None
    assert installed.version == vllm.__version__
    fields = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
    assert option_names(installed.folder) == fields
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        start("vllm", engine_options={"max_num_seq": 3})


def test_a_model_folder_is_needed() -> None:
    from ragfleet.engines.vllm import VllmEngine

    settings = PromptSettings(system_prompt="")
    engine = VllmEngine(
        EngineSpec(model_dir=None, sampling=SamplingParams(max_new_tokens=1), prompts=settings)
    )
    with pytest.raises(ModelError, match="--model_path is missing"):
        engine.start()
