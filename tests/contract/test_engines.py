"""The contract of `ragfleet.engines.protocol`, held against every engine."""

from __future__ import annotations

import pytest
from driving import Make, ask, drive

from ragfleet.engines.protocol import Completion, Engine, Failure, Prepared
from ragfleet.errors import ConfigError


def test_exactly_one_outcome_for_each_request(contract_engine: Engine) -> None:
    requests = [ask(number, f"Question {number}?", "word " * number) for number in range(14)]
    outcomes = drive(contract_engine, requests)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert contract_engine.progress() >= len(requests)


def test_answers_belong_to_their_requests(start: Make) -> None:
    requests = [ask(number, f"Question {number}?") for number in range(10)]
    for kind, prefix in (("Sync", "sync"), ("Async", "async")):
        outcomes = drive(start("echo", kind), requests)
        for number, request in enumerate(requests):
            outcome = outcomes[request.key]
            assert isinstance(outcome, Completion)
            assert outcome.text == f"{prefix} r-{number} Question {number}?"


@pytest.mark.parametrize(
    ("user_class", "bad"),
    [
        *(("Sync", bad) for bad in ("RAISE", "NUMBER", "EXIT")),
        *(("Async", bad) for bad in ("RAISE", "NUMBER", "EXIT", "CANCEL")),
        *(("Prompt", bad) for bad in ("RAISE", "NUMBER")),
    ],
)
def test_a_failure_leaves_its_neighbours_alone(start: Make, user_class: str, bad: str) -> None:
    engine = start("transformers" if user_class == "Prompt" else "echo", user_class)
    outcomes = drive(engine, [ask(0), ask(1, bad), ask(2)])
    assert isinstance(outcomes[ask(0).key], Completion)
    assert isinstance(outcomes[ask(2).key], Completion)
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "generation_error"
    if bad == "RAISE":
        assert "LookupError: no such page" in failure.error
        assert "user_classes.py:" in failure.error
    if bad == "NUMBER":
        assert "returned int, not a string" in failure.error


def test_an_aborted_request_has_no_outcome(contract_engine: Engine) -> None:
    prepared = [contract_engine.prepare(ask(number)) for number in range(3)]
    submitted = []
    for one in prepared:
        assert isinstance(one, Prepared)
        if contract_engine.has_room(one):
            contract_engine.submit(one)
            submitted.append(one.key)
    contract_engine.abort(submitted[0])
    contract_engine.abort(b"never submitted")
    outcomes = []
    for _ in range(100):
        outcomes += contract_engine.step(0.05)
        if len(outcomes) == len(submitted) - 1:
            break
    outcomes += contract_engine.step(0.05)
    assert sorted(outcome.key for outcome in outcomes) == sorted(submitted[1:])
    assert len(drive(contract_engine, [ask(7), ask(8)])) == 2  # and it goes on working


def test_there_is_an_end_to_room(contract_engine: Engine) -> None:
    for number in range(5000):
        prepared = contract_engine.prepare(ask(number))
        assert isinstance(prepared, Prepared)
        if not contract_engine.has_room(prepared):
            return
        contract_engine.submit(prepared)
    pytest.fail("5000 requests were taken without a step")


def test_close_drops_what_is_left_and_may_come_twice(contract_engine: Engine) -> None:
    prepared = contract_engine.prepare(ask(1))
    assert isinstance(prepared, Prepared)
    contract_engine.submit(prepared)
    contract_engine.close()
    contract_engine.close()


def test_an_engine_that_failed_to_start_can_be_closed(start: Make) -> None:
    with pytest.raises(ConfigError, match=r"BadConstructor cannot be set up: OSError: no licence"):
        start("echo", "BadConstructor")  # the fixture closes it


def test_unknown_engines_are_refused(start: Make) -> None:
    with pytest.raises(ConfigError, match="--engine nothing is unknown"):
        start("nothing")
