"""The engine against a server that answers, refuses and breaks."""

from __future__ import annotations

import asyncio

import pytest
from driving import ask, drive
from fake_server import FAULTS, KEY, Ask, Serve, answer_to, prompt_of

from ragfleet.engines.protocol import Completion, Failure
from ragfleet.errors import RemoteError

NUM = 60


def test_every_answer_goes_to_its_request(serve: Serve, connect: Ask) -> None:
    server = serve(latency_s=0.01)
    requests = [ask(number, f"Question {number}?") for number in range(NUM)]
    outcomes = drive(connect(server, max_concurrency=8), requests)
    for request, body in zip(requests, server.bodies, strict=True):
        outcome = outcomes[request.key]
        assert isinstance(outcome, Completion)
        prompts = [prompt_of(body) for body in server.bodies]
        mine = next(prompt for prompt in prompts if prompt.endswith(request.query))
        assert outcome.text == answer_to(mine)
        assert (outcome.finish_reason, outcome.completion_tokens) == ("stop", 2)
        assert body["max_tokens"] == 8
        assert body["temperature"] == 0.0
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert server.most_in_flight <= 8


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again(serve: Serve, connect: Ask, fault: str) -> None:
    server = serve(faults={fault: 0.3}, seed=3, stall_s=3.0)
    engine = connect(server, max_concurrency=16, request_timeout_s=0.5)
    outcomes = drive(engine, [ask(number, f"Q {number}") for number in range(20)])
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert len(server.arrivals) > 20


def test_plain_completion(serve: Serve, connect: Ask) -> None:
    server = serve()
    outcomes = drive(connect(server, api_format="completion", stop=("END",)), [ask(1, "Why?")])
    outcome = outcomes[ask(1).key]
    (body,) = server.bodies
    assert isinstance(outcome, Completion)
    assert body["prompt"].endswith("Question: Why?\nAnswer:")
    assert body["stop"] == ["END", "\nQuestion:"]
    assert outcome.text == answer_to(body["prompt"])


def test_failures_are_told_apart(serve: Serve, connect: Ask) -> None:
    server = serve(max_context=100)
    requests = [ask(0), ask(1, "FILTER"), ask(2, "BAD"), ask(3, context="long " * 200)]
    outcomes = drive(connect(server), requests)
    kinds = {
        request.key[-1]: getattr(outcomes[request.key], "error_type", "") for request in requests
    }
    assert kinds == {0: "", 1: "content_filter", 2: "invalid_request", 3: "too_long"}
    assert len(server.arrivals) == 4  # none of them was tried again


def test_retries_end(serve: Serve, connect: Ask) -> None:
    server = serve(faults={"429": 1.0})
    outcomes = drive(connect(server, max_retries=1), [ask(1)])
    failure = outcomes[ask(1).key]
    assert isinstance(failure, Failure)
    assert failure.error_type == "rate_limited"
    assert failure.error.endswith("(2 attempts)")
    assert KEY not in failure.error


@pytest.mark.parametrize(
    ("settings", "remote", "says"),
    [
        ({"key": "another"}, {}, "OPENAI_API_KEY or --api_key_file"),
        ({}, {"model": "no-such"}, "--api_model_name no-such"),
    ],
)
def test_what_no_request_can_mend_stops_the_run(
    serve: Serve, connect: Ask, settings: dict[str, str], remote: dict[str, str], says: str
) -> None:
    engine = connect(serve(**settings), **remote)
    with pytest.raises(RemoteError, match=says) as caught:
        drive(engine, [ask(number) for number in range(5)])
    assert KEY not in str(caught.value)


def test_models_that_want_another_length_field(serve: Serve, connect: Ask) -> None:
    server = serve(only_completion_tokens=True)
    outcomes = drive(connect(server, max_concurrency=1), [ask(1), ask(2)])
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert len(server.arrivals) == 3  # found out once


def test_sampling_has_a_seed_of_its_own(serve: Serve, connect: Ask) -> None:
    server = serve()
    drive(connect(server, temperature=0.5), [ask(1, seed=2**63 + 5)])
    assert (server.bodies[0]["seed"], server.bodies[0]["top_p"]) == (5, 1.0)


def test_a_dead_server_is_waited_for(serve: Serve, connect: Ask) -> None:
    server = serve(is_down=True)
    engine = connect(server, max_concurrency=20, max_retries=2)
    for number in range(20):
        prepared = engine.prepare(ask(number))
        assert not isinstance(prepared, Failure)
        engine.submit(prepared)
    assert engine.step(1.0) == []
    server.settings.is_down = False
    outcomes = []
    while len(outcomes) < 20:
        outcomes += engine.step(1.0)
    assert all(isinstance(outcome, Completion) for outcome in outcomes)


def test_it_works_below_a_running_loop(serve: Serve, connect: Ask) -> None:
    engine = connect(serve())

    async def inside() -> int:
        return len(drive(engine, [ask(1), ask(2)]))

    assert asyncio.run(inside()) == 2


def test_totals_are_not_passed(serve: Serve, connect: Ask) -> None:
    server = serve()
    engine = connect(server, max_tokens_total=200, max_concurrency=4)
    with pytest.raises(RemoteError, match="--max_tokens_total"):
        drive(engine, [ask(number) for number in range(50)])
    used = sum(len(prompt_of(body)) // 4 + 2 for body in server.bodies)
    assert 100 < used <= 200
