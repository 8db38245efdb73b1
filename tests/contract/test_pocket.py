"""The pocket model: right answers, and an engine whose tokens are those of plain `generate`.

Random weights answer noise, in which one lost token more is noise too. This model copies out of its
context, so the mutations at the end must show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Make, ask, drive

from models import ROOT, Reference
from ragfleet.config import RunConfig
from ragfleet.engines.protocol import Completion, PromptSettings, Request, SamplingParams
from ragfleet.engines.protocol import Prepared as PreparedRequest
from ragfleet.engines.shared_prefix import passes
from ragfleet.engines.shared_prefix.loop import SharedPrefixLoop
from ragfleet.engines.shared_prefix.passes import TensorPass, row_reads
from ragfleet.engines.shared_prefix.scheduler import Range, Row
from ragfleet.engines.transformers import TransformersEngine
from ragfleet.errors import ModelError
from ragfleet.preparation import find_model, pocket_folder
from ragfleet.tokens import load_tokenizer, prepare_prompt

NUM_RECORDS = 200
NUM_QUICK = 40
NUM_MUTATED = 16
NUM_PAIRED = 48  # enough for slots to be used again, so that free places hold old tokens
BATCH = 8
MAX_NEW_TOKENS = 24
MAX_CONTEXT_TOKENS = 400
BLOCK = slice(48, 64)
"""Places of a cached block, counted from a prompt's start. The first two of such blocks hold the
heading and an API's full name: without them this model answers these questions all the same.
"""
POCKET = pocket_folder()
QUESTIONS = (
    "What is the signature of {x}?",
    "What is the default of {p} in {x}?",
    "What does {x} do, in one sentence?",
    "{x} 的参数 {p} 的默认值是什么？",
    "What is the parameter {p} of {x}?",
    "What does {x} return?",
    "How to use {x}?",
)
SHELF = """\
### shelf.Box.stack (shelf==2.1)
stack(self, layers, gap=4, upside_down=False)

Put boxes on top of each other.

Parameters
----------
layers : int
    Number of boxes.
gap : int
    Millimetres between two boxes.

### shelf.Box.label (shelf==2.1)
label(self, text, colour='red')

Print a text on the front.

Returns
-------
bool
    Whether the label fits."""


def held_out(count: int) -> list[Request]:
    """Questions about packages the model was not trained on, lengths mixed, neighbours different.

    Each context is the documentation of an example, cut to at most MAX_CONTEXT_TOKENS.
    """
    tokenizer = load_tokenizer(POCKET)
    contexts: dict[str, str] = {}
    for line in (ROOT / "examples" / "contexts.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["success"]:
            contexts.setdefault(record["context"], record["retrieval_method"])
    found = []
    for number, (whole, method) in enumerate(islice(cycle(contexts.items()), count)):
        context = whole
        while len(tokenizer.encode(context, add_special_tokens=False)) > MAX_CONTEXT_TOKENS:
            context = context[: int(len(context) * 0.9)]
        names = re.findall(r"^### (\S+) \(", context, re.MULTILINE)
        parameters = re.findall(r"(\w+)=", context) or ["x"]
        turn = number // len(contexts)
        question = QUESTIONS[(number + turn) % len(QUESTIONS)]
        query = question.format(x=names[turn % len(names)], p=parameters[turn % len(parameters)])
        found.append(ask(number, query, context, retrieval_method=method))
    return found


class Equality:
    """Plain answers of batch size 1, kept, and what an engine answers differently."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(POCKET)
        self._reference = Reference(POCKET)
        self._plain: dict[bytes, list[int]] = {}

    def plain(self, request: Request) -> list[int]:
        if request.key not in self._plain:
            settings = PromptSettings(system_prompt="Be brief.")
            sampling = SamplingParams(
                max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, top_p=1.0, stop=()
            )
            prepared = prepare_prompt(request, settings, self._tokenizer, sampling, 4096)
            assert isinstance(prepared, PreparedRequest)
            self._plain[request.key] = self._reference.generate(
                prepared.token_ids, MAX_NEW_TOKENS, self._tokenizer.eos_ids
            )
        return self._plain[request.key]

    def differing(self, engine: TransformersEngine, requests: Sequence[Request]) -> list[str]:
        outcomes = drive(engine, requests)
        found = []
        for request in requests:
            outcome = outcomes[request.key]
            assert isinstance(outcome, Completion), outcome
            ended = self._tokenizer.eos_ids if outcome.finish_reason == "stop" else ()
            plain = self.plain(request)  # the end marker is not among an engine's tokens
            if [*(outcome.token_ids or ()), *ended] != plain:
                found.append(f"{request.query} -> {outcome.text}")
        return found

    def differs(self, engine: TransformersEngine, requests: Sequence[Request]) -> bool:
        """As much is asked as it takes: a mutation has shown itself at the first difference."""
        parts = (requests[at : at + BATCH] for at in range(0, len(requests), BATCH))
        return any(self.differing(engine, part) for part in parts)


@pytest.fixture(scope="module")
def equality() -> Equality:
    return Equality()


@pytest.fixture
def engine(start: Make) -> TransformersEngine:
    made = start(
        model_dir=POCKET, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, precision="fp32"
    )
    assert isinstance(made, TransformersEngine)
    return made


# ---- what it answers ----------------------------------------------------------------------------


def test_answers_with_the_span_of_the_api_asked_about(engine: TransformersEngine) -> None:
    """Of the kinds it is good at; the model card has the scores of all."""
    wanted = {
        "What is the signature of shelf.Box.label?": "label(self, text, colour='red')",
        "What is the default of gap in shelf.Box.stack?": "gap=4",
        "shelf.Box.label 的参数 colour 的默认值是什么？": "colour='red'",
    }
    requests = [
        ask(number, query, SHELF, retrieval_method="rag_string_match")
        for number, query in enumerate(wanted)
    ]
    outcomes = drive(engine, requests)
    answers = {request.query: getattr(outcomes[request.key], "text", "") for request in requests}
    assert answers == wanted


def test_answers_of_the_demo(engine: TransformersEngine) -> None:
    lines = (ROOT / "examples" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if '"id": "item_demo_' in line]
    requests = [
        ask(number, record["query"], record["context"], retrieval_method=record["retrieval_method"])
        for number, record in enumerate(records)
    ]
    outcomes = drive(engine, requests)
    assert [getattr(outcomes[request.key], "text", "") for request in requests] == [
        "toarray(self, order=None, out=None)",
        "points : int\n    Number of points in `vector`.",
        "mode='reflect'",
    ]


# ---- what it is and how it is named -------------------------------------------------------------


def test_the_files_are_small_and_the_weights_are_what_fp32_computes_on() -> None:
    import torch
    from safetensors.torch import load_file

    assert sum(file.stat().st_size for file in POCKET.iterdir()) <= 16_000_000
    weights = load_file(POCKET / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def named(model_path: str) -> Path | None:
        return find_model(
            RunConfig(contexts_file="i.jsonl", output_file="o.jsonl", model_path=model_path)  # type: ignore[arg-type]
        )

    assert named("pocket") == POCKET
    for other in ("./pocket", "Pocket", "pocket/"):
        with pytest.raises(ModelError, match="There is no model folder"):
            named(other)
    (tmp_path / "pocket").mkdir()
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "pocket"))):
        named("pocket")  # the user's own folder, empty though it is


# ---- equality, and that it is sharp -------------------------------------------------------------


def test_tokens_equal_plain_generation(engine: TransformersEngine, equality: Equality) -> None:
    assert equality.differing(engine, held_out(NUM_QUICK)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_tokens_equal_plain_generation(engine: TransformersEngine, equality: Equality) -> None:
    assert equality.differing(engine, held_out(NUM_RECORDS)) == []


def shift_positions(inputs: dict[str, Any]) -> None:
    """Generated tokens stand one place too far from the prompt."""
    inputs["position_ids"] = inputs["position_ids"] + 1


def drop_a_block(inputs: dict[str, Any]) -> None:
    """A block of each row's prompt is no longer seen."""
    mask = inputs["attention_mask"].clone()
    for row in mask:
        first = int(row.argmax())
        row[first + BLOCK.start : first + BLOCK.stop] = 0
    inputs["attention_mask"] = mask


def leak_a_neighbour(inputs: dict[str, Any]) -> None:
    """A block of each row's prompt is its neighbour's."""
    starts = inputs["attention_mask"].argmax(dim=1).tolist()
    for layer in inputs["past_key_values"].layers:
        for states in (layer.keys, layer.values):
            before = states.clone()
            for row, start in enumerate(starts):
                other = (row + 1) % len(starts)
                theirs = before[other, :, starts[other] + BLOCK.start : starts[other] + BLOCK.stop]
                states[row, :, start + BLOCK.start : start + BLOCK.stop] = theirs


def show_padding(inputs: dict[str, Any]) -> None:
    inputs["attention_mask"] = inputs["attention_mask"].new_ones(inputs["attention_mask"].shape)


@pytest.mark.parametrize(
    "mutation", [shift_positions, drop_a_block, leak_a_neighbour, show_padding]
)
def test_mutated_batches_are_found_out(
    start: Make, equality: Equality, mutation: Callable[[dict[str, Any]], None]
) -> None:
    """Each mutation touches only what follows the first token: the prompt itself is read right."""
    engine = start(
        model_dir=POCKET, max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH, prefix_sharing="off"
    )
    assert isinstance(engine, TransformersEngine)
    calls = 0

    def before_forward(
        module: Any, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal calls
        if inputs["input_ids"].shape[1] == 1:
            calls += 1
            mutation(inputs)
        return args, inputs

    engine._model.register_forward_pre_hook(before_forward, with_kwargs=True)
    assert equality.differs(engine, held_out(NUM_MUTATED))
    assert calls > 0


# ---- the same for shared prefixes ----------------------------------------------------------------


def in_pairs(count: int) -> list[Request]:
    """Two questions about each context."""
    asked = []
    for number, request in enumerate(held_out(count // 2)):
        other = QUESTIONS[(number + 3) % len(QUESTIONS)].format(x="it", p="x")
        asked += [request, ask(1000 + number, other, request.context)]
    return asked


def without_a_block(rows: Sequence[Row]) -> list[Row]:
    return [row._replace(reads=(*cut(row, 0, 48), *cut(row, 64, 10**6))) for row in rows]


def with_a_neighbours_block(rows: Sequence[Row]) -> list[Row]:
    return [
        row._replace(reads=(*cut(row, 0, 48), *cut(other, 48, 64), *cut(row, 64, 10**6)))
        for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True)
    ]


def cut(row: Row, start: int, stop: int) -> list[Range]:
    """What a row reads of its prompt's places from `start` to `stop`."""
    found, at = [], 0
    for part in row.reads:
        first, last = max(start, at), min(stop, at + part.length)
        if first < last:
            found.append(Range(part.offset + first - at, last - first))
        at += part.length
    return found


def shift_rows(tensors: TensorPass) -> None:
    tensors.position_ids[:, : tensors._num_rows] += 1


def show_free_places(tensors: TensorPass) -> None:
    tensors._mask = torch.zeros_like(tensors._mask)


@pytest.mark.parametrize("mutation", [without_a_block, with_a_neighbours_block])
def test_mutated_reads_are_found_out(
    engine: TransformersEngine,
    equality: Equality,
    mutation: Callable[[Sequence[Row]], list[Row]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(engine._loop, SharedPrefixLoop)
    monkeypatch.setattr(passes, "row_reads", lambda rows: row_reads(mutation(rows)))
    assert equality.differs(engine, in_pairs(NUM_MUTATED))


@pytest.mark.parametrize("mutation", [shift_rows, show_free_places])
def test_mutated_passes_are_found_out(
    engine: TransformersEngine, equality: Equality, mutation: Callable[[TensorPass], None]
) -> None:
    assert isinstance(engine._loop, SharedPrefixLoop)

    def before_forward(module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if inputs["shared_prefix"]._num_rows:
            mutation(inputs["shared_prefix"])

    engine._model.register_forward_pre_hook(before_forward, with_kwargs=True)
    assert equality.differs(engine, in_pairs(NUM_PAIRED))


def test_pairs_are_answered_as_alone(engine: TransformersEngine, equality: Equality) -> None:
    """What the mutations above differ from."""
    assert equality.differing(engine, in_pairs(NUM_MUTATED)) == []
