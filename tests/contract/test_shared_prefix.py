"""The shared-prefix loop: token for token plain `generate`, within its budget, or not used.

By the CPU's way, and where a test is `by_any_way` by CUDA's with a plain kernel, on the CPU. What
only that one has is in test_cuda_way.py.
"""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from cuda_way import take_cudas_way
from driving import Make, ask, drive

from models import Reference, changed_copy, make_model
from ragfleet.engines import heap
from ragfleet.engines.protocol import Completion, Engine, Failure, Outcome, Prepared
from ragfleet.engines.shared_prefix import attention, packing, passes, ways
from ragfleet.engines.shared_prefix.cache import Shape, limits_within
from ragfleet.engines.shared_prefix.forward import Forward
from ragfleet.engines.shared_prefix.loop import SharedPrefixLoop
from ragfleet.engines.shared_prefix.scheduler import Limits, Scheduler
from ragfleet.engines.transformers import TransformersEngine
from ragfleet.errors import ModelError
from ragfleet.tokens import load_tokenizer

NEW = 10
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4
"""Of the small models: K and V, 2 layers, 2 heads of 16 in fp32."""


def answer(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """Drives an engine with prompts given as ids."""
    requests = [ask(number) for number in range(len(prompts))]
    prepare = engine.prepare

    def prepared(request: Any) -> Prepared | Failure:
        made = prepare(request)
        assert isinstance(made, Prepared)
        ids = tuple(prompts[int.from_bytes(request.key, "big")])
        return msgspec.structs.replace(made, token_ids=ids)

    engine.prepare = prepared  # type: ignore[method-assign]
    try:
        outcomes = drive(engine, requests)
    finally:
        engine.prepare = prepare  # type: ignore[method-assign]
    found = [outcomes[request.key] for request in requests]
    assert all(isinstance(one, Completion) for one in found), found
    return found  # type: ignore[return-value]


def loop_of(engine: Engine) -> SharedPrefixLoop:
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine._loop, SharedPrefixLoop), "plain batches"
    return engine._loop


def ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(4, 2000), k=count)


def prompt_sets() -> dict[str, list[list[int]]]:
    rng = random.Random(7)
    head, context, question = ids(rng, 30), ids(rng, 200), ids(rng, 30)
    contexts = [ids(rng, length) for length in (100, 60, 260)]
    return {
        "groups with a head": [head + c + ids(rng, 1 + n) for c in contexts for n in range(4)],
        "no head": [c + ids(rng, 1 + 9 * n) for c in contexts for n in range(3)],
        "groups of one": [ids(rng, length) for length in (1, 2, 64, 65, 66, 300)],
        "one group of all": [head + context + ids(rng, 1 + 3 * n) for n in range(9)],
        "equal to their prefix": [context, [*context, 5], context, [*context, 5, 6], context[:150]],
        "questions that begin alike": [
            head + context + question[:begin] + ids(rng, 1 + n)
            for n, begin in enumerate((30, 30, 12, 4, 3, 30, 0, 30))
        ],
        "long own parts": [head + context + ids(rng, 60 + 3 * n) for n in range(4)],
        "scattered": [(head + contexts[n % 3] + ids(rng, 12)) for n in range(12)],
    }


@pytest.fixture(params=["the CPU's way", "CUDA's way"])
def by_any_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "CUDA's way":
        take_cudas_way(monkeypatch)


@pytest.fixture(scope="module")
def wanted(small_model: Path, reference: Reference) -> dict[str, list[list[int]]]:
    return {
        name: [reference.generate(prompt, NEW, [3]) for prompt in prompts]
        for name, prompts in prompt_sets().items()
    }


@pytest.mark.usefixtures("by_any_way")
# Three: also in the small pool below.
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_tokens_are_those_of_plain_generation(
    start: Make, wanted: dict[str, list[list[int]]], batch_size: int
) -> None:
    engine = start(batch_size=batch_size, max_new_tokens=NEW)
    assert loop_of(engine).batch_size == batch_size
    for name, prompts in prompt_sets().items():
        for tokens, found in zip(wanted[name], answer(engine, prompts), strict=True):
            assert list(found.token_ids) == [token for token in tokens if token != 3], name
            assert found.completion_tokens == len(tokens)


@pytest.mark.usefixtures("by_any_way")
def test_a_small_pool_evicts_and_answers_the_same(
    start: Make, wanted: dict[str, list[list[int]]]
) -> None:
    budget = BYTES_PER_TOKEN * (3 * (64 + NEW) + 420)
    engine = start(batch_size=3, max_new_tokens=NEW, kv_cache_bytes=budget)
    cache = loop_of(engine)._cache
    assert cache is not None
    assert cache.num_bytes <= budget
    for name, prompts in prompt_sets().items():
        for tokens, found in zip(wanted[name], answer(engine, prompts), strict=True):
            assert list(found.token_ids) == [token for token in tokens if token != 3], name


@pytest.mark.usefixtures("by_any_way")
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "mistral"])
def test_other_architectures(start: Make, tmp_path: Path, arch: str) -> None:
    tied = ["--tie_word_embeddings"] if arch.startswith("qwen") else []
    model = make_model(tmp_path / arch, "--arch", arch, *tied)
    engine = start(model_dir=model, batch_size=5, max_new_tokens=NEW)
    loop_of(engine)
    reference = Reference(model)
    sets = prompt_sets()
    for prompts in (sets["groups with a head"], sets["long own parts"]):
        for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
            tokens = reference.generate(prompt, NEW, [3])
            assert list(found.token_ids) == [token for token in tokens if token != 3]


@pytest.mark.usefixtures("by_any_way")
def test_rows_that_end_at_different_times(
    start: Make, small_model: Path, tmp_path: Path, reference: Reference
) -> None:
    rng = random.Random(3)
    contexts = [ids(rng, 80) for _ in range(6)]
    prompts = [context + ids(rng, 1 + number) for context in contexts for number in range(6)]
    tokens = [reference.generate(prompt, 24, [3]) for prompt in prompts]
    common = sorted(set().union(*tokens), key=lambda t: -sum(t in row for row in tokens))
    marks = [3, *common[:12]]
    model = changed_copy(small_model, tmp_path / "m", generation_config={"eos_token_id": marks})
    engine = start(model_dir=model, batch_size=5, max_new_tokens=24)
    ends = set()
    for row, found in zip(tokens, answer(engine, prompts), strict=True):
        end = next((index for index, token in enumerate(row) if token in marks), len(row))
        assert list(found.token_ids) == row[:end]
        assert found.finish_reason == ("stop" if end < len(row) else "length")
        ends.add(end)
    assert len(ends) > 5, "they end together"


@pytest.mark.usefixtures("by_any_way")
def test_a_stop_string_frees_its_slot(
    start: Make, small_model: Path, wanted: dict[str, list[list[int]]]
) -> None:
    tokenizer = load_tokenizer(small_model)
    texts = [tokenizer.decode(tokens) for tokens in wanted["groups with a head"]]
    stop = next(text[5:8] for text in texts if "�" not in text[:9] and len(text) > 20)
    engine = start(stop=(stop,), batch_size=2, max_new_tokens=NEW)
    for text, found in zip(texts, answer(engine, prompt_sets()["groups with a head"]), strict=True):
        assert found.text == text.split(stop)[0]
        assert found.finish_reason == ("stop" if stop in text else "length")
    assert loop_of(engine)._scheduler.num_admitted == 0


@pytest.mark.usefixtures("by_any_way")
def test_what_is_shared_is_read_once(start: Make) -> None:
    engine = start(batch_size=4, max_new_tokens=2)
    prompts = prompt_sets()["groups with a head"]
    answers = answer(engine, prompts)
    scheduler = loop_of(engine)._scheduler
    cached = sum(found.cached_tokens or 0 for found in answers)
    assert cached == scheduler.prompt_tokens - scheduler.read_tokens
    assert scheduler.prompt_tokens == sum(map(len, prompts))
    own = 3 * (1 + 2 + 3 + 4)
    assert scheduler.read_tokens == 30 + (100 + 60 + 260) + own
    assert f"read {scheduler.read_tokens:,} of {scheduler.prompt_tokens:,}" in (
        loop_of(engine).summary()
    )


def test_bf16(start: Make, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "--initializer_range", "0.02")
    engine = start(model_dir=model, precision="bf16", batch_size=4, max_new_tokens=NEW)
    cache = loop_of(engine)._cache
    assert cache.pool.dtype == cache.slots.dtype == torch.bfloat16
    for found in answer(engine, prompt_sets()["groups with a head"]):
        assert found.completion_tokens


# ---- the budget


def test_a_budget_too_small_for_one_answer(start: Make) -> None:
    with pytest.raises(
        ModelError, match=r"--kv_cache_bytes is too small: 1,000 bytes hold 1 token"
    ):
        start(kv_cache_bytes=1000)


def test_a_prompt_beyond_the_budget_is_refused_before_anything_is_spent(start: Make) -> None:
    engine = start(kv_cache_bytes=BYTES_PER_TOKEN * 800, batch_size=1)
    outcomes = drive(engine, [ask(0), ask(1, context="word " * 2000), ask(2)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"
    assert "--kv_cache_bytes" in failure.error
    assert isinstance(outcomes[ask(2).key], Completion)


def test_a_prompt_beyond_the_default_budget_is_answered_plainly(
    start: Make, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    monkeypatch.setattr(ways, "default_budget_bytes", lambda *_, **__: BYTES_PER_TOKEN * 800)
    engine = start(batch_size=2, max_new_tokens=NEW)
    rng = random.Random(1)
    prompts = [ids(rng, 20), ids(rng, 900), ids(rng, 30)]
    for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, NEW, [3])
        assert list(found.token_ids) == [token for token in tokens if token != 3]


def test_a_budget_beyond_the_memory_takes_plain_batches(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(shape: Shape, limits: Limits) -> Any:
        if limits.num_slots == 8:  # those of the loop, not of its self-check
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nat alloc_cpu")
        return ways.KeyValueCache(shape, limits)

    monkeypatch.setattr(ways, "CPU", dataclasses.replace(ways.CPU, make_cache=refused))
    engine = start(batch_size=8, kv_cache_bytes=BYTES_PER_TOKEN * 9000)
    assert str(engine.start().degraded).endswith(
        "no room for keys and values: RuntimeError: DefaultCPUAllocator: can't allocate memory"
    )
    assert isinstance(drive(engine, [ask(1)])[ask(1).key], Completion)


@pytest.mark.parametrize("budget", [3e5, 1e6, 5e7, 4e9])
def test_what_is_allocated_stays_within_the_budget(budget: float) -> None:
    shape = Shape(2, 2, 16, torch.float32, torch.device("cpu"))
    limits = limits_within(
        int(budget), shape, num_slots=64, max_new_tokens=32, max_model_len=8192, pass_tokens=512
    )
    tokens = limits.pool_tokens + limits.num_slots * limits.slot_tokens
    assert tokens * shape.bytes_per_token <= budget
    assert limits.num_slots >= 1
    assert limits.pool_tokens >= 256


# ---- when it is not for a model, or fails


SLIDING = {
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 64,
}


@pytest.mark.parametrize(
    ("arch", "config", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "sliding window of 64"),
        ("qwen2", SLIDING, "sliding_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic positions",
        ),
    ],
)
def test_models_that_are_left_to_plain_batches(
    start: Make, tmp_path: Path, arch: str, config: dict[str, Any], reason: str
) -> None:
    made = make_model(tmp_path / "made", "--arch", arch)
    model = changed_copy(made, tmp_path / "m", config=config)
    engine = start(model_dir=model, max_new_tokens=NEW)
    assert isinstance(engine, TransformersEngine)
    assert not isinstance(engine._loop, SharedPrefixLoop)
    info = engine.start()
    assert info.degraded is not None
    assert info.degraded.startswith("plain batches, in which prompts share nothing: ")
    assert reason in info.degraded
    assert info.degraded in info.notes
    prompts = prompt_sets()["groups with a head"][:3]
    reference = Reference(model)
    for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, NEW, [3])
        assert list(found.token_ids) == [token for token in tokens if token != 3]


def test_a_window_that_no_prompt_reaches_does_not_matter(start: Make, tmp_path: Path) -> None:
    made = make_model(tmp_path / "made", "--arch", "mistral", "--sliding_window", "4096")
    loop_of(start(model_dir=made, max_model_len=4096))


def test_the_self_check_bites(
    start: Make, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, list[list[int]]]
) -> None:
    def careless(out: Any, lse: Any, other: Any, other_lse: Any) -> Any:
        return (out + other) / 2, lse

    monkeypatch.setattr("ragfleet.engines.shared_prefix.passes.merge", careless)
    engine = start(max_new_tokens=NEW)
    assert isinstance(engine, TransformersEngine)
    assert not isinstance(engine._loop, SharedPrefixLoop)
    assert any("differ from the model's plain forward" in note for note in engine.start().notes)
    (found,) = answer(engine, prompt_sets()["groups with a head"][:1])
    assert list(found.token_ids) == [t for t in wanted["groups with a head"][0] if t != 3]


def test_the_self_check_looks_at_what_is_copied(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Scheduler._most_common

    def wrong(self: Scheduler, entry: Any) -> tuple[int, int]:
        copied, source = find(self, entry)
        return copied, source + 1 if copied else source

    monkeypatch.setattr(Scheduler, "_most_common", wrong)
    engine = start(max_new_tokens=NEW)
    assert not isinstance(engine._loop, SharedPrefixLoop)  # type: ignore[attr-defined]


def test_the_self_check_looks_at_blocks(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(query: torch.Tensor, key: torch.Tensor, *others: Any) -> torch.Tensor:
        return attention.causal_blocks(query, key.flip(1), *others)

    monkeypatch.setattr(passes, "causal_blocks", mistaken)
    engine = start(max_new_tokens=NEW)
    assert not isinstance(engine._loop, SharedPrefixLoop)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("by_any_way")
@pytest.mark.parametrize("failures", [1, 3])
def test_a_pass_that_fails_is_answered_plainly(
    start: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: dict[str, list[list[int]]],
    failures: int,
) -> None:
    engine = start(batch_size=3, max_new_tokens=NEW)
    forward = Forward.__call__
    calls = 0

    def failing(self: Forward, tensors: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 7 == 0 and calls <= 7 * failures:
            raise RuntimeError("no such kernel")
        return forward(self, tensors)

    loop_of(engine)
    monkeypatch.setattr(Forward, "__call__", failing)
    prompts = prompt_sets()["groups with a head"]
    for tokens, found in zip(wanted["groups with a head"], answer(engine, prompts), strict=True):
        assert list(found.token_ids) == [token for token in tokens if token != 3]
    assert "a shared-prefix pass failed" in caplog.text
    assert "no such kernel" in caplog.text
    assert ("and so are all that follow" in caplog.text) == (failures == 3)


def out_of_memory_beside_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`generate` finds no memory while the loop holds its own; the lengths that it then took."""
    loop = loop_of(engine)
    generate = engine._model.generate  # type: ignore[attr-defined]
    taken: list[int] = []

    def wrapped(input_ids: torch.Tensor, **others: Any) -> Any:
        if loop._cache is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        taken.append(input_ids.shape[1])
        return generate(input_ids=input_ids, **others)

    monkeypatch.setattr(engine._model, "generate", wrapped)  # type: ignore[attr-defined]
    return taken


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New caches hold nothing finite: what is read without having been written shows."""
    make = SharedPrefixLoop._make_cache

    def make_poisoned(self: SharedPrefixLoop) -> Any:
        cache = make(self)
        cache.poison()
        return cache

    monkeypatch.setattr(SharedPrefixLoop, "_make_cache", make_poisoned)


def taken_back(loop: SharedPrefixLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests begin anew, each time that room is made."""
    take_back, found = loop._scheduler.take_back, []

    def counted() -> list[bytes]:
        keys = take_back()
        found.append(len(keys))
        return keys

    monkeypatch.setattr(loop._scheduler, "take_back", counted)
    return found


def submit(engine: Engine, number: int, prompt: Sequence[int], seed: int | None = None) -> None:
    prepared = engine.prepare(ask(number, seed=seed))
    assert isinstance(prepared, Prepared)
    engine.submit(msgspec.structs.replace(prepared, token_ids=tuple(prompt)))


@pytest.mark.usefixtures("by_any_way")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_prompt_that_only_fits_without_the_cache(
    start: Make, monkeypatch: pytest.MonkeyPatch, temperature: float, passes: int
) -> None:
    """Those in slots begin anew after it, with the same tokens."""
    sampling = {"temperature": temperature, "max_new_tokens": NEW}
    rng = random.Random(1)
    prompts = [ids(rng, 20), ids(rng, 30), ids(rng, 900)]

    def answers(engine: Engine) -> dict[bytes, Any]:
        outcomes = [outcome for _ in range(40) for outcome in engine.step(1.0)]
        assert len(outcomes) == 3, outcomes
        assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
        return {outcome.key: outcome.token_ids for outcome in outcomes}  # type: ignore[union-attr]

    plain = start(prefix_sharing="off", **sampling)
    for number, prompt in enumerate(prompts):
        submit(plain, number, prompt, seed=number)
    expected = answers(plain)
    monkeypatch.setattr(ways, "default_budget_bytes", lambda *_, **__: BYTES_PER_TOKEN * 800)
    engine = start(batch_size=2, **sampling)
    loop = loop_of(engine)
    poisoned(monkeypatch)
    taken = out_of_memory_beside_the_cache(engine, monkeypatch)
    begun_anew = taken_back(loop, monkeypatch)
    for number in range(2):
        submit(engine, number, prompts[number], seed=number)
    for _ in range(passes):
        loop._pass()
    assert loop._scheduler.num_admitted == 2
    submit(engine, 2, prompts[2], seed=2)
    assert answers(engine) == expected
    assert begun_anew == [2]
    assert taken == [900]
    assert loop._cache is not None, "the loop goes on"
    assert loop._scheduler.num_admitted == 0
    assert loop._scheduler.prompt_tokens == 50


@pytest.mark.usefixtures("by_any_way")
def test_slots_begin_anew_once_and_then_such_prompts_are_held(
    start: Make, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    monkeypatch.setattr(ways, "default_budget_bytes", lambda *_, **__: BYTES_PER_TOKEN * 800)
    monkeypatch.setattr("ragfleet.engines.shared_prefix.loop.MOST_HELD", 2)
    engine = start(batch_size=2, max_new_tokens=NEW)
    out_of_memory_beside_the_cache(engine, monkeypatch)
    begun_anew = taken_back(loop_of(engine), monkeypatch)
    rng = random.Random(1)
    prompts = [ids(rng, 900 if n % 5 == 4 else 20 + n) for n in range(40)]
    for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, NEW, [3])
        assert list(found.token_ids) == [token for token in tokens if token != 3]
    assert sum(count > 0 for count in begun_anew) <= 1
    assert len(begun_anew) >= 3


@pytest.mark.usefixtures("by_any_way")
def test_aborted_while_it_makes_room(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "default_budget_bytes", lambda *_, **__: BYTES_PER_TOKEN * 800)
    engine = start(batch_size=2, max_new_tokens=NEW)
    out_of_memory_beside_the_cache(engine, monkeypatch)
    loop, rng = loop_of(engine), random.Random(1)
    for number in range(2):
        submit(engine, number, ids(rng, 20))
    loop._pass()
    engine.abort(ask(0).key)
    assert loop._aborted
    submit(engine, 2, ids(rng, 900))
    loop._plain_step(0)
    assert not loop._aborted
    assert loop._rows.keys() == {ask(1).key}
    outcomes = [outcome for _ in range(30) for outcome in engine.step(1.0)]
    assert [outcome.key for outcome in outcomes] == [ask(1).key]
    assert isinstance(outcomes[0], Completion)


@pytest.mark.usefixtures("by_any_way")
def test_memory_that_is_gone_when_the_cache_is_made_again(
    start: Make, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, list[list[int]]]
) -> None:
    """Somebody else took it: plain batches for what waits, and the next ones share again."""
    told: list[str] = []
    engine = start(batch_size=3, max_new_tokens=NEW, degrade=told.append)
    loop = loop_of(engine)
    make, tries = loop._make_cache, 0

    def gone() -> Any:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {tries} bytes")
        return make()

    monkeypatch.setattr(loop, "_make_cache", gone)
    loop._drop_cache()
    prompts = prompt_sets()["groups with a head"]
    for _ in range(3):
        found = answer(engine, prompts)
        for tokens, one in zip(wanted["groups with a head"], found, strict=True):
            assert list(one.token_ids) == [token for token in tokens if token != 3]
    assert told == ["plain batches at times, for want of memory for keys and values"]
    assert tries == 3
    assert loop._cache is not None
    assert not loop._num_failures


@pytest.mark.usefixtures("by_any_way")
def test_a_pass_out_of_memory_leaves_all_of_it_to_plain_batches(
    start: Make, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, list[list[int]]]
) -> None:
    engine = start(batch_size=3, max_new_tokens=NEW)
    forward, calls = Forward.__call__, 0

    def failing(self: Forward, tensors: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, tensors)

    monkeypatch.setattr(Forward, "__call__", failing)
    taken = out_of_memory_beside_the_cache(engine, monkeypatch)
    prompts = prompt_sets()["groups with a head"]
    for tokens, found in zip(wanted["groups with a head"], answer(engine, prompts), strict=True):
        assert list(found.token_ids) == [token for token in tokens if token != 3]
    assert len(taken) == 1
    assert calls > 4


def test_what_a_failed_pass_held_is_given_back(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was not captured holds its decoder, and that one the step."""
    take_cudas_way(monkeypatch)
    told: list[str] = []
    engine = start(batch_size=3, max_new_tokens=NEW, degrade=told.append)
    loop = loop_of(engine)
    forward, is_broken = Forward.__call__, False

    def failing(self: Forward, tensors: Any) -> torch.Tensor:
        if is_broken:
            raise RuntimeError("no such kernel")
        return forward(self, tensors)

    monkeypatch.setattr(Forward, "__call__", failing)
    for _ in range(3):
        assert told == []
        is_broken = False
        answer(engine, prompt_sets()["groups of one"])
        cache = weakref.ref(loop._cache)
        is_broken = True
        answer(engine, [[5, 6, 7]])
        assert cache() is None
    assert told == ["plain batches after 3 failed passes: RuntimeError: no such kernel"]


@pytest.mark.usefixtures("by_any_way")
def test_a_prompt_of_plain_batches_times_out_nobody_else(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "default_budget_bytes", lambda *_, **__: BYTES_PER_TOKEN * 800)
    engine = start(batch_size=2, max_new_tokens=NEW, request_timeout_s=1000)
    loop, rng = loop_of(engine), random.Random(1)
    clock, step = Clock(), loop._plain.step

    def slow(timeout_s: float) -> list[Outcome]:
        clock.now_s += 2000
        return step(timeout_s)

    monkeypatch.setattr("ragfleet.engines.shared_prefix.loop.time.monotonic", clock)
    monkeypatch.setattr(loop._plain, "step", slow)
    for number, length in enumerate((20, 900)):
        prepared = engine.prepare(ask(number))
        assert isinstance(prepared, Prepared)
        engine.submit(msgspec.structs.replace(prepared, token_ids=ids(rng, length)))
        if not number:
            loop._pass()  # its first token: from here on it counts
    outcomes = {outcome.key: outcome for _ in range(30) for outcome in engine.step(0.1)}
    assert isinstance(outcomes[ask(0).key], Completion)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.usefixtures("by_any_way")
def test_abort_while_running(start: Make, wanted: dict[str, list[list[int]]]) -> None:
    engine = start(batch_size=4, max_new_tokens=NEW)
    assert isinstance(engine, TransformersEngine)
    count = engine._count

    def abort_soon(num_tokens: int) -> None:
        count(num_tokens)
        engine.abort(ask(2).key)

    engine._count = abort_soon  # type: ignore[method-assign]
    for number in range(7):
        prepared = engine.prepare(ask(number))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    keys = [outcome.key for _ in range(30) for outcome in engine.step(1.0)]
    assert sorted(keys) == [ask(number).key for number in range(7) if number != 2]
    assert loop_of(engine)._scheduler.num_admitted == 0


@pytest.mark.usefixtures("by_any_way")
def test_a_row_that_takes_too_long(start: Make) -> None:
    engine = start(max_new_tokens=400, request_timeout_s=0.01)
    failure = drive(engine, [ask(1)])[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "timeout"
    assert "--request_timeout_s" in failure.error


@pytest.mark.usefixtures("by_any_way")
def test_a_broken_row_leaves_nothing_in_its_slot(
    start: Make, wanted: dict[str, list[list[int]]]
) -> None:
    """Places beyond a slot's end are masked, but 0 × NaN is NaN."""
    engine = start(batch_size=1, max_new_tokens=NEW)
    weights = engine._model.model.embed_tokens.weight  # type: ignore[attr-defined]
    kept = weights[1990].clone()
    weights[1990] = float("nan")
    prompts = prompt_sets()["groups of one"]
    requests = [ask(number) for number in range(2)]
    for request, tokens in zip(requests, ([5] * 40 + [1990] * 20, prompts[1]), strict=True):
        prepared = engine.prepare(request)
        assert isinstance(prepared, Prepared)
        engine.submit(msgspec.structs.replace(prepared, token_ids=tokens))
    outcomes = {outcome.key: outcome for _ in range(20) for outcome in engine.step(1.0)}
    weights[1990] = kept
    failure = outcomes[requests[0].key]
    assert isinstance(failure, Failure)
    assert "not finite" in failure.error
    found = outcomes[requests[1].key]
    assert isinstance(found, Completion)
    assert list(found.token_ids) == [t for t in wanted["groups of one"][1] if t != 3]


@pytest.mark.usefixtures("by_any_way")
def test_a_broken_row_spoils_nobody_who_copies_from_it(start: Make, reference: Reference) -> None:
    """Kernels count what comes later as 0 × NaN, so that what it has before its broken token is
    broken too."""
    engine = start(batch_size=4, max_new_tokens=NEW)
    weights = engine._model.model.embed_tokens.weight  # type: ignore[attr-defined]
    weights[1990] = float("nan")
    rng = random.Random(6)
    head = ids(rng, 30)
    prompts = [[*head, 1990, 8], [*head, 9], [*head, 1990, 9], ids(rng, 40)]
    for number, prompt in enumerate(prompts):
        submit(engine, number, prompt)
    outcomes = {outcome.key: outcome for _ in range(30) for outcome in engine.step(1.0)}
    assert len(outcomes) == len(prompts)
    for number, prompt in enumerate(prompts):
        found = outcomes[ask(number).key]
        if 1990 in prompt:
            assert isinstance(found, Failure)
            assert "not finite" in found.error
        else:
            tokens = reference.generate(prompt, NEW, [3])
            assert 1990 not in tokens
            assert isinstance(found, Completion)
            assert list(found.token_ids) == [token for token in tokens if token != 3]
    assert loop_of(engine)._scheduler.num_admitted == 0


# ---- parts


@pytest.mark.parametrize("before", [0, 37])
@pytest.mark.parametrize("num_tokens", [1, attention.BLOCK_TOKENS, 2 * attention.BLOCK_TOKENS + 9])
def test_blocks_give_what_the_whole_gives(num_tokens: int, before: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(num_tokens, 6, 16)
    key, value = torch.randn(2, 3, before + num_tokens, 16)
    found = attention.causal_blocks(query, key, value, 0.25)
    repeated = [states.repeat_interleave(2, 0)[None] for states in (key, value)]
    padded = torch.cat([torch.zeros(before, 6, 16), query]).transpose(0, 1)[None]
    plain, _ = attention.plain_part(padded, *repeated, 0.25, causal=True)
    torch.testing.assert_close(found, plain[0].transpose(0, 1)[before:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_long_runs_go_in_blocks_where_that_is_exact(
    start: Make, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    engine = start(max_new_tokens=2, precision=precision)
    lengths = []

    def counted(query: torch.Tensor, *others: Any) -> torch.Tensor:
        lengths.append(len(query))
        return attention.causal_blocks(query, *others)

    monkeypatch.setattr(passes, "causal_blocks", counted)
    rng = random.Random(3)
    heads = ids(rng, 200), ids(rng, 90), ids(rng, 63)
    answer(engine, [head + ids(rng, 5) for head in heads for _ in range(4)])
    # In the first of two layers; nobody sees what the last one makes of them.
    assert lengths == ([200, 90] if precision == "fp32" else [])


@pytest.mark.parametrize("num_queries", [1, 24, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_give_what_many_give(num_queries: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 3, num_queries, 16).to(dtype)
    key, value = torch.randn(2, 29, 3, 16).to(dtype).transpose(1, 2)[:, None]
    found = attention.attend_part(query, key, value, 0.25, causal=False)
    plain = attention.plain_part(query, key, value, 0.25, causal=False)
    assert found[1].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_operations_give_what_the_fused_one_gives(causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 3, 11, 16).to(dtype)
    keys = 11 if causal else 29
    key, value = torch.randn(2, 2, 1, keys, 16).to(dtype).expand(2, 2, 3, keys, 16)
    fused = attention.attend_part(query, key, value, 0.25, causal)
    plain = attention.plain_part(query, key, value, 0.25, causal)
    assert fused[1].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_parts_merge_to_the_whole() -> None:
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    whole, lse = attention.plain_part(query, key, value, 0.3, False)
    parts = [
        attention.plain_part(query, key[:, :, part], value[:, :, part], 0.3, False)
        for part in (slice(0, 7), slice(7, 20))
    ]
    merged, merged_lse = attention.merge(*parts[0], *parts[1])
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, lse)
    nothing = (torch.zeros_like(whole), torch.full_like(lse, attention.MASKED))
    torch.testing.assert_close(attention.merge(whole, lse, *nothing), (whole, lse))


def test_without_the_fused_operation(
    start: Make, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, list[list[int]]]
) -> None:
    monkeypatch.setattr(attention, "_FLASH", None)
    engine = start(batch_size=4, max_new_tokens=NEW)
    prompts = prompt_sets()["groups with a head"]
    for tokens, found in zip(wanted["groups with a head"], answer(engine, prompts), strict=True):
        assert list(found.token_ids) == [token for token in tokens if token != 3]


def test_without_packing_it_says_so(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    engine = start()
    assert any("weights are not packed" in note for note in engine.start().notes)
    assert len(answer(engine, prompt_sets()["no head"])) == 9


def test_without_glibc_it_says_so(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    info = start().start()
    assert any("mapped anew in every pass" in note for note in info.notes)
    assert "mapped anew" in str(info.degraded)


def test_weights_come_back_bit_by_bit(small_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(small_model), dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert packing.pack_weights(model) is None
    assert any(isinstance(part, packing.PackedLinear) for part in model.modules())
    packing.trim_last_layer(model)
    packing.restore_last_layer(model)
    packing.unpack_weights(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
