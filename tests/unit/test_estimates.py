"""Prompt tokens before anything is loaded: the estimate, its error bar, and the exact count."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ragfleet.beats import Beat
from ragfleet.config import RunConfig
from ragfleet.engines.protocol import Prepared, Request, SamplingParams
from ragfleet.errors import InputError
from ragfleet.estimates import (
    Estimate,
    Prefill,
    PrefillSample,
    can_tokenise,
    plan_requests,
    total_of,
)
from ragfleet.header import prefill_lines
from ragfleet.identity import RunFile
from ragfleet.model_files import context_limit
from ragfleet.plan import CostModel
from ragfleet.planning import Indexed, cost_model, index_contexts, selection_of
from ragfleet.preparation import Preparation, pocket_folder, prepare
from ragfleet.records import LazyRecord
from ragfleet.summary import Generation, generation_of
from ragfleet.tokens import PromptTokenizer, load_tokenizer, prepare_prompt

WORDS = Path(__file__).read_text(encoding="utf-8").split()


# ---- the estimator


def test_a_whole_population_is_a_count() -> None:
    y = np.array([3.0, 5.0, 9.0])
    assert total_of(np.array([1.0, 2.0, 3.0]), y, 3, 6.0) == Estimate(17.0, 0.0)


def test_what_depends_on_the_bytes_alone_has_no_error() -> None:
    x = np.arange(1.0, 51.0)
    found = total_of(x, 2 * x + 7, 1000, 40_000.0)
    assert found.total == pytest.approx(2 * 40_000 + 7 * 1000)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_the_error_bar_holds_about_95_times_of_100() -> None:
    draw = np.random.default_rng(1)
    x = draw.lognormal(6, 0.8, 20_000)
    y = x / 3.5 + draw.normal(0, 40, 20_000)
    within = 0
    for _ in range(400):
        sample = draw.choice(20_000, 256, replace=False)
        found = total_of(x[sample], y[sample], 20_000, float(x.sum()))
        within += abs(found.total - y.sum()) <= found.error
    assert 0.91 < within / 400 < 0.99


def test_bytes_that_are_all_alike_leave_the_mean() -> None:
    found = total_of(np.zeros(4), np.array([1.0, 0.0, 0.0, 1.0]), 100, 0.0)
    assert found.total == pytest.approx(50)
    assert found.error > 10


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(224_037, 0), "224,037"),
        (Estimate(224_037, 1234), "224,000 ± 1,200"),
        (Estimate(224_037, 7), "224,037 ± 7"),
    ],
)
def test_digits_follow_the_error(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


# ---- on records


def write_contexts(path: Path, num_records: int, num_contexts: int) -> None:
    draw = random.Random(0)
    contexts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 120))) for _ in range(num_contexts)]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_records):
            query = f"{' '.join(draw.choices(WORDS, k=draw.randint(2, 15)))} {number}?"
            method = draw.choice([None, "rag_fallback"])
            context = draw.choice(contexts)
            record = {"query": query, "context": context, "retrieval_method": method}
            file.write(json.dumps(record) + "\n")


def prepared_run(
    tmp_path: Path, num_records: int, num_contexts: int, **settings: Any
) -> tuple[Preparation, Indexed]:
    contexts = tmp_path / "contexts.jsonl"
    write_contexts(contexts, num_records, num_contexts)
    config = RunConfig(
        contexts_file=contexts,
        output_file=tmp_path / "out.jsonl",
        **{
            "model_path": "pocket",
            "temperature": 0,
            "max_new_tokens": 16,
            "device": "cpu",
            **settings,
        },
    )
    preparation = prepare(config, os.environ)
    selection = selection_of(config, preparation.num_workers, preparation.key_fields)
    return preparation, index_contexts(selection, preparation.identity.run_key)


def tokens_of(preparation: Preparation, indexed: Indexed) -> dict[int, tuple[int, ...]]:
    """Row → the ids that a worker would send, the plain way."""
    tokenizer = load_tokenizer(pocket_folder())
    lines = indexed.index.path.read_bytes().splitlines(keepends=True)
    found = {}
    for row in np.flatnonzero(indexed.requests).tolist():
        record = json.loads(lines[row])
        request = Request(
            key=b"",
            query=record["query"],
            context=record["context"],
            retrieval_method=record["retrieval_method"],
            record=LazyRecord(lines[row]),
        )
        prepared = prepare_prompt(
            request, preparation.prompts, tokenizer, SamplingParams(max_new_tokens=16), None
        )
        assert isinstance(prepared, Prepared)
        found[row] = tuple(prepared.token_ids)
    return found


def num_common(members: list[tuple[int, ...]]) -> int:
    """Tokens that all of them begin with."""
    first, last = min(members), max(members)
    pairs = zip(first, last, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))


def shared_of(indexed: Indexed, ids: dict[int, tuple[int, ...]], num_workers: int) -> int:
    """Distinct token prefixes by a trie over groups: each token of a group's common part once."""
    groups: dict[int, list[tuple[int, ...]]] = {}
    for row, tokens in ids.items():
        groups.setdefault(int(indexed.index.grouping["group"][row]), []).append(tokens)
    head = num_common(list(ids.values()))
    total = head * num_workers
    for members in groups.values():
        common = num_common(members) if len(members) > 1 else 0
        if common:
            total += common - head + sum(len(tokens) - common for tokens in members)
        else:
            total += len(members[0]) - head
    return total


@pytest.mark.parametrize("schedule", ["dynamic", "static"])
def test_the_count_is_what_workers_send(tmp_path: Path, schedule: str) -> None:
    preparation, indexed = prepared_run(tmp_path, 300, 40, num_workers=2, schedule=schedule)
    _, prefill = plan_requests(preparation, indexed, indexed.requests, exact=True)
    assert prefill is not None
    assert prefill.is_exact
    ids = tokens_of(preparation, indexed)
    assert prefill.prompts == Estimate(sum(map(len, ids.values())), 0)
    # A question's first word may happen to be the same in all of a group.
    assert prefill.shared.total == pytest.approx(shared_of(indexed, ids, 2), rel=0.01)
    assert prefill.planned.total >= prefill.shared.total
    if schedule == "static":
        assert prefill.planned.total > 1.5 * prefill.shared.total, "contexts are anywhere"


def test_a_long_count_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragfleet.estimates._PROGRESS_EVERY", 20)
    told: list[int] = []
    for exact in (False, True):
        plan_requests(*prepared_run(tmp_path, 50, 5), np.ones(50, bool), exact, told.append)
    assert told == [20, 40]


def test_the_estimate_holds_the_count(tmp_path: Path) -> None:
    preparation, indexed = prepared_run(tmp_path, 3000, 500)
    sample = PrefillSample(preparation, indexed, indexed.requests)
    plan = indexed.plan(indexed.requests, "dynamic", CostModel(answer_tokens=4))
    estimate, counted = sample.estimate(plan), sample.count(plan)
    assert not estimate.is_exact
    for name in ("prompts", "shared", "planned"):
        mine, truth = getattr(estimate, name), getattr(counted, name)
        assert 0 < mine.error < 0.05 * mine.total
        assert abs(mine.total - truth.total) < 1.6 * mine.error, name
    assert 1 < sample.bytes_per_token < 6


def test_a_few_records_are_counted_by_the_sample_too(tmp_path: Path) -> None:
    preparation, indexed = prepared_run(tmp_path, 60, 10)
    sampled = plan_requests(preparation, indexed, indexed.requests)[1]
    counted = plan_requests(preparation, indexed, indexed.requests, exact=True)[1]
    assert sampled is not None
    assert counted is not None
    assert sampled.is_exact
    assert sampled.prompts == counted.prompts
    assert sampled.shared.total == pytest.approx(counted.shared.total)


def test_prompts_that_are_too_long_are_counted_apart(tmp_path: Path) -> None:
    for policy in ("error", "tail"):
        preparation, indexed = prepared_run(
            tmp_path, 200, 30, max_model_len=120, truncate_context=policy
        )
        ids = tokens_of(preparation, indexed)
        fitting = [len(tokens) for tokens in ids.values() if len(tokens) <= 104]
        found = plan_requests(preparation, indexed, indexed.requests, exact=True)[1]
        assert found is not None
        assert found.num_too_long == Estimate(len(ids) - len(fitting), 0)
        cut = 104 * (len(ids) - len(fitting)) if policy == "tail" else 0
        assert found.prompts.total == sum(fitting) + cut
        assert f"{len(ids) - len(fitting)} prompts are too long" in "\n".join(prefill_lines(found))


@pytest.mark.parametrize("policy", ["error", "tail"])
def test_a_line_of_megabytes_costs_no_more_than_the_model_takes(
    tmp_path: Path, policy: str
) -> None:
    settings: dict[str, Any] = {"truncate_context": policy, "num_workers": 2}
    preparation, indexed = prepared_run(tmp_path, 100, 20, **settings)
    before = plan_requests(preparation, indexed, indexed.requests)[0]
    with preparation.config.contexts_file.open("a") as file:
        record = {"query": "much?", "context": "a large moon " * 100_000}
        file.write(json.dumps(record) + "\n")
    selection = selection_of(preparation.config, 2, [])
    indexed = index_contexts(selection, preparation.identity.run_key)
    plan = plan_requests(preparation, indexed, indexed.requests)[0]
    limit = context_limit(pocket_folder())
    assert limit is not None
    assert plan.least_cost == pytest.approx(before.least_cost + limit - 16 + 4, rel=0.02)
    assert len(plan.chunks) > 15, "costs of the others are as before, and so are their chunks"


def test_where_prompts_are_not_known_nothing_is_claimed(tmp_path: Path) -> None:
    preparation, indexed = prepared_run(tmp_path, 5, 2, model_path=None, engine="echo")
    assert not can_tokenise(preparation)
    assert plan_requests(preparation, indexed, indexed.requests)[1] is None


def test_a_template_with_the_question_first_shares_nothing_but_the_head(tmp_path: Path) -> None:
    template = tmp_path / "prompt.jinja"
    template.write_text("Question: {{ query }}\n\n{{ context }}", encoding="utf-8")
    preparation, indexed = prepared_run(tmp_path, 100, 5, prompt_template=template)
    found = plan_requests(preparation, indexed, indexed.requests, exact=True)[1]
    assert isinstance(found, Prefill)
    ids = tokens_of(preparation, indexed)
    head = num_common(list(ids.values()))
    least = sum(map(len, ids.values())) - head * (len(ids) - 1)
    assert found.shared.total == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("exact", [False, True])
def test_a_line_of_megabytes_is_not_tokenised_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    preparation, _ = prepared_run(tmp_path, 20, 4)
    contexts = preparation.config.contexts_file
    with open(contexts, "a", encoding="utf-8") as file:
        file.write(json.dumps({"query": "q", "context": "word " * 500_000}) + "\n")
    selection = selection_of(preparation.config, 1, preparation.key_fields)
    indexed = index_contexts(selection, preparation.identity.run_key)
    longest = 0
    offsets, encode = PromptTokenizer.offsets, PromptTokenizer.encode

    def counted(method: Any) -> Any:
        def call(self: PromptTokenizer, text: str, *more: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(text))
            return method(self, text, *more)

        return call

    monkeypatch.setattr(PromptTokenizer, "offsets", counted(offsets))
    monkeypatch.setattr(PromptTokenizer, "encode", counted(encode))
    found = plan_requests(preparation, indexed, indexed.requests, exact)[1]
    assert found is not None
    assert found.num_too_long == Estimate(1, 0)
    assert longest < 100_000


@pytest.mark.parametrize("exact", [False, True])
def test_prompts_that_cannot_be_made_are_told_and_none_at_all_is_refused(
    tmp_path: Path, exact: bool
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% if '3' in query %}{{ nope }}{% endif %}{{ query }} {{ context }}")
    preparation, indexed = prepared_run(tmp_path, 60, 5, prompt_template=template)
    _, prefill = plan_requests(preparation, indexed, indexed.requests, exact)
    assert prefill is not None
    records = map(json.loads, indexed.index.path.read_text().splitlines())
    failing = sum("3" in record["query"] for record in records)
    assert 0 < prefill.num_failing.total == failing < 60
    line = prefill_lines(prefill)[-1]
    assert line.startswith(f"{failing} prompts can't be made and get failure rows; the first: ")
    assert "nope" in line
    template.write_text("{{ nope }}")
    preparation, indexed = prepared_run(tmp_path, 60, 5, prompt_template=template)
    with pytest.raises(
        InputError,
        match=r"Not one of the 60 prompts can be made; the first: .*nope.*[^.]\. See --prompt",
    ):
        plan_requests(preparation, indexed, indexed.requests, exact)
    # What an earlier start left to fail gets its rows.
    rest = indexed.requests.copy()
    rest[: len(rest) // 2] = False
    assert plan_requests(preparation, indexed, rest, exact)[1] is not None


def test_a_sample_of_nothing_but_failures_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% if ' 59?' not in query %}{{ nope }}{% endif %}{{ query }} {{ context }}"
    )
    preparation, indexed = prepared_run(tmp_path, 60, 5, prompt_template=template)
    monkeypatch.setattr("ragfleet.estimates.SAMPLED", 3)
    found = plan_requests(preparation, indexed, indexed.requests)[1]
    assert found is not None
    assert found.num_failing.total == 60, "as far as the sample knows"


def test_workers_without_work_do_not_count(tmp_path: Path) -> None:
    preparation, indexed = prepared_run(tmp_path, 12, 3, num_workers=1000)
    for exact in (False, True):
        found = plan_requests(preparation, indexed, indexed.requests, exact)[1]
        assert found is not None
        assert found.shared.total <= found.prompts.total
        assert "% less" in prefill_lines(found)[0]
    # As with questions that alone are too long; an answer that is gets no further than `prepare`.
    preparation = dataclasses.replace(
        preparation, config=preparation.config.replace(max_new_tokens=10**6)
    )
    nothing = plan_requests(preparation, indexed, indexed.requests)[1]
    assert nothing is not None
    assert nothing.shared.total == nothing.prompts.total == 0
    assert "less" not in prefill_lines(nothing)[0]


def test_a_later_start_plans_with_the_answers_of_the_earlier_one(tmp_path: Path) -> None:
    preparation, _ = prepared_run(tmp_path, 5, 2)
    assert cost_model(preparation).answer_tokens == 4, "a quarter of max_new_tokens"
    assert cost_model(preparation).bytes_per_token == 3.5
    before = RunFile(run_key="", parts={}, clock="", answer_tokens=11.5)
    later = dataclasses.replace(preparation, run_file=before)
    assert cost_model(later, 2.5) == CostModel(answer_tokens=11.5, bytes_per_token=2.5)


def test_the_figures_of_all_workers_are_put_together() -> None:
    beats = [
        Beat(owner="0.0", sequence=9, busy_s=3.0, span_s=4.0, prompt_tokens=10, cached_tokens=6),
        Beat(owner="1.0", sequence=9, busy_s=1.0, span_s=2.0, prompt_tokens=1, uncounted=1),
        Beat(owner="1.1", sequence=9, busy_s=2.0, span_s=2.5, prompt_tokens=5, cached_tokens=1),
    ]
    beats = [msgspec.structs.replace(beat, degraded="slow") for beat in beats]
    found = generation_of(beats)
    assert found == Generation(
        num_workers=2,
        makespan_s=4.0,
        busy_s=6.0,
        prompt_tokens=16,
        cached_tokens=7,
        uncounted=1,
        degraded=["slow"],
    )
    assert found.lower_bound_s == 3.0, "a worker's two processes are one worker"
    assert generation_of([]).lower_bound_s == 0.0
