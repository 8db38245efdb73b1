"""The transformers engine, by either loop, against plain batch-size-1 `generate`.

Plain batches also when something fails; what only the other loop has is in test_shared_prefix.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driving import Make, ask, drive
from pretended_gpu import pretended_gpu

from models import Reference, changed_copy, example_records, make_model
from ragfleet.engines import batched, checkpoint
from ragfleet.engines.batched import PREFILL_OPERATIONS, BatchedLoop
from ragfleet.engines.decoding import Row, RowSampler, RowStopper
from ragfleet.engines.oom_ladder import OomLadder
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
from ragfleet.engines.transformers import TransformersEngine
from ragfleet.errors import EngineDead, ModelError
from ragfleet.tokens import load_tokenizer

NUM, NEW = 24, 12
"""Records, and tokens generated for each."""


def examples(first_seed: int | None = None) -> list[Request]:
    """`NUM` requests of very different lengths."""
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


# ---- equality ---------------------------------------------------------------------------------


BOTH_LOOPS = {"auto": "shared prefixes", "off": "plain batches"}


@pytest.fixture(params=BOTH_LOOPS, ids=BOTH_LOOPS.get)
def sharing(request: pytest.FixtureRequest) -> str:
    """Which loop."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def expected(small_model: Path, reference: Reference) -> list[list[int]]:
    """The reference's tokens for `examples()`, end marker included."""
    from ragfleet.engines.protocol import PromptSettings
    from ragfleet.tokens import prepare_prompt

    tokenizer = load_tokenizer(small_model)
    sampling = SamplingParams(max_new_tokens=NEW)
    tokens = []
    for request in examples():
        prepared = prepare_prompt(
            request, PromptSettings(system_prompt="Be brief."), tokenizer, sampling, None
        )
        assert isinstance(prepared, Prepared)
        tokens.append(reference.generate(prepared.token_ids, NEW, tokenizer.eos_ids))
    return tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_tokens_are_those_of_batch_size_1(
    start: Make, expected: list[list[int]], batch_size: int, sharing: str
) -> None:
    engine = start(batch_size=batch_size, max_new_tokens=NEW, prefix_sharing=sharing)
    requests = examples()
    random.Random(batch_size).shuffle(order := list(range(NUM)))
    answers = completions(engine, [requests[index] for index in order])
    for index, answer in zip(order, answers, strict=True):
        assert [t for t in expected[index] if t != 3] == list(answer.token_ids)
        assert answer.completion_tokens == len(expected[index])
        assert answer.finish_reason == ("stop" if 3 in expected[index] else "length")
        assert answer.prompt_tokens == len(prompt_ids(engine, requests[index]))
    assert engine.progress() > sum(map(len, expected)), "reading counts as well"


@pytest.mark.parametrize("sharing", BOTH_LOOPS, ids=BOTH_LOOPS.get)
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "mistral"])
def test_other_architectures(start: Make, tmp_path: Path, arch: str, sharing: str) -> None:
    tied = ["--tie_word_embeddings"] if arch.startswith("qwen") else []
    model = make_model(tmp_path / arch, "--arch", arch, "--no-chat_template", *tied)
    engine = start(model_dir=model, batch_size=4, prefix_sharing=sharing)
    requests = examples()[:4]
    answers = completions(engine, requests)
    reference = Reference(model)
    for request, answer in zip(requests, answers, strict=True):
        tokens = reference.generate(prompt_ids(engine, request), 8, [3])
        assert list(answer.token_ids) == tokens


def test_the_end_marker_ends_a_row_and_is_counted(
    start: Make, small_model: Path, tmp_path: Path, expected: list[list[int]], sharing: str
) -> None:
    marks = sorted({tokens[index] for index, tokens in enumerate(expected[:8])})
    model = changed_copy(
        small_model, tmp_path / "m", generation_config={"eos_token_id": marks, "temperature": 0.6}
    )
    engine = start(model_dir=model, batch_size=8, max_new_tokens=NEW, prefix_sharing=sharing)
    answers = completions(engine, examples()[:8])
    for tokens, answer in zip(expected, answers, strict=False):
        end = min(tokens.index(mark) for mark in marks if mark in tokens)
        assert list(answer.token_ids) == tokens[:end]
        assert answer.completion_tokens == end + 1
        assert answer.finish_reason == "stop"


def test_what_generation_config_sets_is_named_and_not_applied(
    small_model: Path, tmp_path: Path, start: Make, expected: list[list[int]]
) -> None:
    model = changed_copy(
        small_model,
        tmp_path / "m",
        generation_config={
            "temperature": 0.6,
            "do_sample": True,
            "repetition_penalty": 1.5,
            "min_new_tokens": 30,
            "max_length": 5,
            "suppress_tokens": [expected[0][0]],
        },
    )
    engine = start(model_dir=model, max_new_tokens=NEW)
    notes = " ".join(engine.start().notes)
    assert "temperature 0.6" in notes
    assert "repetition_penalty 1.5" in notes
    assert list(completions(engine, examples()[:1])[0].token_ids) == expected[0]


# ---- sampling ---------------------------------------------------------------------------------


# Not higher: where 2,000 tokens are about as likely, one draw in some 20,000 is so near the bound
# between two of them that rounding decides, which differs from processor to processor.
@pytest.mark.parametrize("temperature", [0.1, 0.4])
def test_draws_do_not_depend_on_loop_batches_or_order(start: Make, temperature: float) -> None:
    settings = {"temperature": temperature, "top_p": 0.9, "max_new_tokens": NEW}
    alone = completions(start(batch_size=1, prefix_sharing="off", **settings), examples(1000)[:12])
    for sharing in BOTH_LOOPS:
        engine = start(batch_size=4, prefix_sharing=sharing, **settings)
        together = completions(engine, examples(1000)[11::-1])[::-1]
        assert [a.token_ids for a in alone] == [b.token_ids for b in together]
    if temperature < 0.2:  # hardly any draw differs from another
        return
    other_seeds = examples(2000)[:12]
    assert [a.token_ids for a in completions(start(**settings), other_seeds)] != [
        a.token_ids for a in alone
    ]


def test_unseeded_draws_differ(start: Make) -> None:
    engine = start(temperature=1.5, max_new_tokens=NEW)
    first, second = (completions(engine, [ask(1)])[0] for _ in range(2))
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.6)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -20.0])
    count = 4000
    rows = [Row(Prepared(request=ask(i, seed=i), prompt="", token_ids=(1,))) for i in range(count)]
    sampler = RowSampler(
        SamplingParams(max_new_tokens=1, temperature=temperature, top_p=top_p), rows
    )
    drawn = sampler(torch.zeros(count, 1), logits.repeat(count, 1)).argmax(dim=-1)
    assert torch.isfinite(sampler(torch.zeros(count, 1), logits.repeat(count, 1))).sum() == count
    probs = torch.softmax(logits / temperature, dim=-1)
    kept = 0.0
    for index in range(5):  # the logits are in order: the nucleus is a prefix
        probs[index] = probs[index] if kept < top_p else 0.0
        kept += float(torch.softmax(logits / temperature, dim=-1)[index])
    probs /= probs.sum()
    for index, prob in enumerate(probs.tolist()):
        share = float((drawn == index).double().mean())
        assert abs(share - prob) <= 4 * (prob * (1 - prob) / count) ** 0.5
        assert prob > 0 or share == 0


def test_a_tiny_temperature_is_greedy(start: Make, expected: list[list[int]]) -> None:
    answers = completions(start(temperature=1e-30, max_new_tokens=NEW), examples(1000)[:4])
    assert [list(answer.token_ids) for answer in answers] == expected[:4]


# ---- stop strings -----------------------------------------------------------------------------


def test_stop_strings_within_and_across_tokens(
    start: Make, small_model: Path, expected: list[list[int]], sharing: str
) -> None:
    tokenizer = load_tokenizer(small_model)
    texts = [tokenizer.decode(tokens) for tokens in expected[:8]]

    def stop_at(row: int, count: int) -> str | None:
        """From the middle of one token into the next, where the text is whole."""
        edge = len(tokenizer.decode(expected[row][:count]))
        stop = texts[row][edge - 2 : edge + 2]
        ends_in_next = len(tokenizer.decode(expected[row][: count + 1])) >= edge + 2
        fits = "�" not in texts[row] and texts[row].find(stop) == edge - 2
        return stop if ends_in_next and fits else None

    row, count, stop = next(
        (row, count, stop)
        for row in range(8)
        for count in range(3, len(expected[row]) - 1)
        if (stop := stop_at(row, count)) is not None
    )
    answers = completions(
        start(stop=("never there", stop), max_new_tokens=NEW, batch_size=8, prefix_sharing=sharing),
        examples()[:8],
    )
    assert answers[row].text == texts[row][: texts[row].index(stop)]
    assert answers[row].finish_reason == "stop"
    assert answers[row].completion_tokens == count + 1
    for index in range(4):
        if stop not in texts[index]:
            assert list(answers[index].token_ids) == expected[index]


def step_through(
    small_model: Path, text: str, stops: tuple[str, ...], **options: Any
) -> tuple[Row, int]:
    """Feeds `text` token by token to one row until it is done; the row and the steps taken."""
    tokenizer = load_tokenizer(small_model)
    row = Row(Prepared(request=ask(1), prompt="", token_ids=(1,)))
    sampler = RowSampler(SamplingParams(max_new_tokens=99), [row])
    stopper = RowStopper(
        [row],
        sampler=sampler,
        tokenizer=tokenizer,
        stops=stops,
        aborted=lambda key: False,
        on_tokens=lambda count: None,
    )
    for step, token in enumerate(tokenizer.encode(text, add_special_tokens=False), start=1):
        sampler(torch.zeros(1, 1), torch.zeros(1, 4))
        if stopper(torch.tensor([[token]]), None).all():
            return row, step
    return row, -1


@pytest.mark.parametrize("stop", ["。", "结束", "🙂", "Ω≈", "的答案。结"])
def test_stop_strings_of_characters_spread_over_tokens(small_model: Path, stop: str) -> None:
    text = "这是一个很长的答案。结束🙂Ω≈ç and so on"
    row, steps = step_through(small_model, text, (stop,))
    assert row.stopped
    seen = load_tokenizer(small_model).decode(row.token_ids)
    assert seen.startswith(text[: text.index(stop)] + stop)
    assert len(seen) <= text.index(stop) + len(stop) + 8, "it stopped late"
    assert steps == row.num_tokens


def test_plain_prompts_stop_at_the_next_question(small_model: Path) -> None:
    from ragfleet.prompts import PLAIN_STOP

    row, _ = step_through(small_model, " Yes.\n\nQuestion: What else?", PLAIN_STOP)
    assert load_tokenizer(small_model).decode(row.token_ids) == " Yes.\n\nQuestion:"
    assert step_through(small_model, " Yes, a Question: indeed", PLAIN_STOP)[1] == -1


def test_an_engine_for_a_model_without_chat_template(start: Make, tmp_path: Path) -> None:
    engine = start(model_dir=make_model(tmp_path / "plain", "--no-chat_template"))
    assert any("no chat template" in note for note in engine.start().notes)
    prepared = engine.prepare(ask(1))
    assert isinstance(prepared, Prepared)
    assert prepared.prompt.endswith("Question: What is it?\nAnswer:")
    assert prepared.token_ids[0] == 1


# ---- limits -----------------------------------------------------------------------------------


def test_too_long_is_told_before_anything_is_spent(start: Make) -> None:
    engine = start(max_model_len=300)
    outcomes = drive(engine, [ask(0), ask(1, context="word " * 2000), ask(2)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "too_long"
    assert isinstance(outcomes[ask(0).key], Completion)


@pytest.mark.parametrize("side", ["head", "tail"])
def test_truncated_prompts_are_answered(start: Make, side: str) -> None:
    engine = start(max_model_len=300, truncate_context=side, max_new_tokens=20)
    prepared = engine.prepare(ask(1, context="word " * 2000))
    assert isinstance(prepared, Prepared)
    assert prepared.truncated_tokens > 1000
    engine.submit(prepared)
    (outcome,) = engine.step(1.0)
    assert isinstance(outcome, Completion)
    assert outcome.completion_tokens == 20
    assert outcome.prompt_tokens == len(prepared.token_ids) <= 280


def test_a_token_the_model_has_no_row_for(start: Make, small_model: Path) -> None:
    engine = start()
    assert isinstance(engine, TransformersEngine)
    engine._vocab_size = 100
    failure = engine.prepare(ask(1))
    assert isinstance(failure, Failure)
    assert "100 embeddings" in failure.error


def test_the_oldest_request_is_not_starved(start: Make) -> None:
    engine = start(batch_size=2, max_new_tokens=1, prefix_sharing="off")
    short = engine.prepare(ask(0, context=""))
    assert isinstance(short, Prepared)
    engine.submit(short)
    for step in range(20):
        number = 1
        while True:
            prepared = engine.prepare(ask(1000 * step + number, context="long " * 20))
            assert isinstance(prepared, Prepared)
            if not engine.has_room(prepared):
                break
            engine.submit(prepared)
            number += 1
        if short.key in [outcome.key for outcome in engine.step(1.0)]:
            return
    pytest.fail("20 batches passed by the oldest request")


def test_the_oldest_is_reached_by_batches_that_memory_made_small(start: Make) -> None:
    engine = start(batch_size=4, max_new_tokens=1, prefix_sharing="off")
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine._loop, BatchedLoop)
    engine._loop._ladder = OomLadder(budget_tokens=1, _failed_tokens=10**9)
    for number in range(16):  # the oldest is the shortest
        prepared = engine.prepare(ask(number, context="long " * 2 * number))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    answered = [outcome.key for _ in range(4) for outcome in engine.step(1.0)]
    assert len(answered) == 4
    assert ask(0).key in answered


def test_a_batch_around_the_oldest_is_a_full_one(start: Make) -> None:
    engine = start(batch_size=4, max_new_tokens=1, prefix_sharing="off")
    for number in range(16):
        prepared = engine.prepare(ask(number, context="long " * 2 * number))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    answered = [sorted(outcome.key for outcome in engine.step(1.0)) for _ in range(3)]
    assert answered[0] == [ask(number).key for number in range(12, 16)]
    last = sorted(outcome.key for outcome in engine.step(1.0))
    assert last == [ask(number).key for number in range(4)]


# ---- what can go wrong --------------------------------------------------------------------------


def failing(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: Any, error: Exception) -> None:
    """Makes `generate` raise for the batches (tensors of ids) for which `fails` is true."""
    assert isinstance(engine, TransformersEngine)
    generate = engine._model.generate

    def wrapped(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if fails(input_ids):
            raise error
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(engine._model, "generate", wrapped)


def test_out_of_memory_halves_the_batch(
    start: Make, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    engine = start(batch_size=8, max_new_tokens=NEW, prefix_sharing="off")
    sizes: list[int] = []

    def fails(ids: torch.Tensor) -> bool:
        sizes.append(len(ids))
        return len(ids) > 2

    failing(engine, monkeypatch, fails, torch.OutOfMemoryError("CUDA out of memory."))
    requests = examples()
    answers = completions(engine, requests)
    assert [list(answer.token_ids) for answer in answers] == expected
    assert sum(size > 2 for size in sizes) <= 8, "it does not learn from running out"


def test_batches_grow_back_when_memory_does(
    start: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else held the GPU's memory for a while."""
    caplog.set_level("INFO")
    engine = start(batch_size=4, max_new_tokens=1, prefix_sharing="off")
    sizes: list[int] = []

    def fails(ids: torch.Tensor) -> bool:
        sizes.append(len(ids))
        return len(sizes) < 3 and len(ids) > 1

    failing(engine, monkeypatch, fails, torch.OutOfMemoryError("CUDA out of memory."))
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine._loop, BatchedLoop)
    engine._loop._ladder = OomLadder(_patience=1)
    assert len(completions(engine, [ask(number) for number in range(60)])) == 60
    assert sizes[:2] == [4, 2]
    assert sizes[2] == 1
    assert 4 in sizes[-2:]
    assert "without a limit again" in caplog.text


def test_one_record_that_does_not_fit(
    start: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A smaller budget, alone, and only then the failure row; each step in the log."""
    caplog.set_level("INFO")
    engine = start(batch_size=4, prefix_sharing="off")
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    failing(engine, monkeypatch, lambda ids: ids.shape[1] > 500, error)
    outcomes = drive(engine, [ask(0), ask(1, context="word " * 800), ask(2)])
    steps = [record.message for record in caplog.records if "memory" in record.message]
    said = ("batches now have up to", "once more alone", "alone: it fails")
    assert [text in step for text, step in zip(said, steps, strict=True)] == [True] * 3
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "oom"
    assert isinstance(outcomes[ask(0).key], Completion)
    assert isinstance(outcomes[ask(2).key], Completion)


def test_one_bad_row_fails_alone(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(batch_size=4, prefix_sharing="off")
    bad = max(set(prompt_ids(engine, ask(1, "Zebra?"))) - set(prompt_ids(engine, ask(0))))
    failing(engine, monkeypatch, lambda ids: bool((ids == bad).any()), ValueError("odd shape"))
    outcomes = drive(engine, [ask(0), ask(1, "Zebra?"), ask(2), ask(3)])
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert [failure.key for failure in failed] == [ask(1).key]
    assert failed[0].error_type == "generation_error"
    assert "odd shape" in failed[0].error


def test_a_lost_gpu_ends_the_engine(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(prefix_sharing="off")
    error = RuntimeError("CUDA error: device-side assert triggered")
    failing(engine, monkeypatch, lambda ids: True, error)
    prepared = engine.prepare(ask(1))
    assert isinstance(prepared, Prepared)
    engine.submit(prepared)
    with pytest.raises(EngineDead, match="device-side assert"):
        engine.step(1.0)


def test_an_interrupt_passes_through(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(prefix_sharing="off")
    failing(engine, monkeypatch, lambda ids: True, KeyboardInterrupt())  # type: ignore[arg-type]
    prepared = engine.prepare(ask(1))
    assert isinstance(prepared, Prepared)
    engine.submit(prepared)
    with pytest.raises(KeyboardInterrupt):
        engine.step(1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(start: Make, temperature: float, sharing: str) -> None:
    engine = start(temperature=temperature, prefix_sharing=sharing)
    assert isinstance(engine, TransformersEngine)
    engine._model.model.norm.weight.fill_(float("nan"))
    failure = drive(engine, [ask(1)])[ask(1).key]
    assert isinstance(failure, Failure)
    assert "not finite" in failure.error


def test_abort_while_running(start: Make) -> None:
    engine = start(batch_size=4, max_new_tokens=NEW, prefix_sharing="off")
    assert isinstance(engine, TransformersEngine)
    count = engine._count
    steps: list[int] = []

    def abort_soon(num_tokens: int) -> None:
        count(num_tokens)
        if num_tokens <= 4:  # not the prompts
            steps.append(num_tokens)
        if len(steps) == 2:
            engine.abort(ask(2).key)

    engine._count = abort_soon  # type: ignore[method-assign]
    for number in range(4):
        prepared = engine.prepare(ask(number))
        assert isinstance(prepared, Prepared)
        engine.submit(prepared)
    keys = [outcome.key for outcome in engine.step(1.0)]
    assert sorted(keys) == [ask(0).key, ask(1).key, ask(3).key]
    assert sum(steps) == 3 * NEW + 3


def test_reading_prompts_is_progress(start: Make) -> None:
    """Layer by layer: on a CPU all of them may take longer than a worker may stand still."""
    engine = start(batch_size=4, max_new_tokens=NEW, prefix_sharing="off")
    assert isinstance(engine, TransformersEngine)
    seen: list[int] = []
    count = engine._count

    def counted(num_tokens: int) -> None:
        count(num_tokens)
        seen.append(num_tokens)

    engine._count = counted  # type: ignore[method-assign]
    found = completions(engine, [ask(number) for number in range(4)])
    width = found[0].prompt_tokens
    layers = len(engine._model.get_decoder().layers)
    assert seen[: layers + 1] == [4 * width // layers] * layers + [4]


def test_workers_that_share_a_gpu_keep_to_their_parts(
    monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    parts: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: parts.update({device: fraction}),
    )
    spec = EngineSpec(
        model_dir=small_model,
        sampling=SamplingParams(max_new_tokens=8),
        prompts=PromptSettings(system_prompt=""),
        num_gpus=1,
    )
    assert checkpoint._devices(spec) == ({"": 0}, [])
    _, (note,) = checkpoint._devices(dataclasses.replace(spec, gpu_memory_bytes=512 << 20))
    assert "does not hold the model" in note
    assert not parts, "alone on it, or with no room anyway"
    assert checkpoint._devices(dataclasses.replace(spec, gpu_memory_bytes=20 << 30))[1] == []
    assert parts == {0: (20 * 1024 - 512) / (80 * 1024)}


def test_the_layers_that_read_text() -> None:
    """And not those that would read images, which come first."""
    text = SimpleNamespace(num_hidden_layers=3)
    model = torch.nn.ModuleList()
    model.append(torch.nn.ModuleList([torch.nn.Identity()] * 2))
    model.append(torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(3)]))
    model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[assignment]
    assert batched._decoder_layers(model) == list(model[1])
    text.num_hidden_layers = 7
    assert batched._decoder_layers(model) == []


def test_a_batch_of_prompts_a_gpu_reads_in_a_minute(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu(monkeypatch):
        engine = start(num_gpus=1, prefix_sharing="off", max_new_tokens=NEW)
        assert isinstance(engine, TransformersEngine)
        loop = engine._loop
        assert isinstance(loop, BatchedLoop)
        requests = [ask(number) for number in range(9)]
        width = len(prompt_ids(engine, requests[0])) + NEW
        config = engine._model.config
        weights = 12 * config.num_hidden_layers * config.hidden_size**2
        monkeypatch.setattr(loop, "_most_tokens", 4 * width)
        sizes: list[int] = []
        generate = loop._generate

        def noted(batch: Sequence[Prepared]) -> Any:
            sizes.append(len(batch))
            return generate(batch)

        monkeypatch.setattr(loop, "_generate", noted)
        completions(engine, requests)
        assert max(sizes) == 4
        fresh = BatchedLoop(loop._spec, engine._model, loop._tokenizer, (), print)
        assert fresh._most_tokens == PREFILL_OPERATIONS / (2 * weights)


# ---- loading ----------------------------------------------------------------------------------


def drop_weight(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def half_file(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": ({"config": None}, "config.json is missing"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no .*safetensors file"),
    "pickled": (pickle_weights, r"only pickled weights.*\n.*save_pretrained"),
    "pointer": (lfs_pointer, "git lfs pull"),
    "half": (half_file, "is cut short"),
    "a weight is missing": (drop_weight, "lacks 1 weights.*up_proj"),
    "unknown": ({"config": {"model_type": "hyperion9"}}, "architecture 'hyperion9'"),
    "remote code": (
        {"config": {"model_type": "hyperion9", "auto_map": {"AutoConfig": "x.Y"}}},
        "--trust_remote_code",
    ),
    "encoder-decoder": ({"config": {"model_type": "t5"}}, "encoder-decoder"),
    "quantiser": (
        {"config": {"quantization_config": {"quant_method": "cubes"}}},
        "quantisation 'cubes'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_models_that_cannot_be_loaded(
    start: Make, small_model: Path, tmp_path: Path, name: str
) -> None:
    change, message = BROKEN[name]
    files = change if isinstance(change, dict) else {}
    model = changed_copy(small_model, tmp_path / "m", **files)
    if callable(change):
        change(model)
    with pytest.raises(ModelError, match=message):
        start(model_dir=model)


def test_a_limit_above_the_models(start: Make) -> None:
    with pytest.raises(ModelError, match="9000 is above the 8192"):
        start(max_model_len=9000)


def test_a_model_that_loads_but_cannot_generate(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def generate(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    with pytest.raises(ModelError, match="cannot generate: RuntimeError: no kernel image"):
        start()
