"""The engine against a server that answers, refuses and breaks."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from driving import ask, drive
from fake_server import FAULTS, KEY, Ask, Reply, Serve, answer_to, prompt_of

from ragfleet.engines.protocol import Completion, Failure
from ragfleet.errors import ConfigError, RemoteError

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


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_prompts_follow_no_redirect(serve: Serve, connect: Ask, status: int) -> None:
    server, other = serve(), serve()
    to = f"{other.base_url}/chat/completions".replace("//", "//somebody:word@")
    headers = {"location": f"{to}?{KEY}"}
    server.routes["POST", "/v1/chat/completions"] = lambda *_: Reply(status, {}, headers)
    with pytest.raises(
        RemoteError, match=rf"redirects to {other.base_url}/chat[^?]+--base_url"
    ) as said:
        drive(connect(server), [ask(1)])
    assert KEY not in str(said.value)
    assert not other.keys


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


def test_what_is_paid_for_still_comes_after_a_refusal(serve: Serve, connect: Ask) -> None:
    """The key is withdrawn while answers are on their way."""
    server = serve(key=KEY, latency_s=0.3)
    engine = connect(server, max_concurrency=8)
    outcomes = []
    for number in range(8):
        prepared = engine.prepare(ask(number))
        assert not isinstance(prepared, Failure)
        engine.submit(prepared)
    while len(server.arrivals) < 4:
        outcomes += engine.step(0.02)
    server.settings.key = "another"
    error = None
    while error is None:
        try:
            outcomes += engine.step(1.0)
        except RemoteError as raised:
            error = raised
    assert "OPENAI_API_KEY" in str(error)
    answered = sum(arrival.status == 200 for arrival in server.arrivals)
    assert len(outcomes) == answered >= 4


def test_a_wait_longer_than_allowed_ends_the_run(serve: Serve, connect: Ask) -> None:
    server = serve(faults={"429+": 1.0}, retry_after_s=86_400)
    with pytest.raises(RemoteError, match="come back in 86,400 s"):
        drive(connect(server), [ask(number) for number in range(9)])


def test_a_low_limit_that_nobody_tells_is_found(serve: Serve, connect: Ask) -> None:
    """No header, no Retry-After: refusals alone say how slow to be, and none becomes a row."""
    server = serve(requests=6, window_s=1.0, tells_when=False)
    outcomes = drive(connect(server), [ask(number) for number in range(14)])
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())


def test_a_bug_in_a_request_is_raised_and_not_waited_for(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    engine = connect(serve())
    monkeypatch.setattr(engine, "_completion", broken)
    with pytest.raises(ZeroDivisionError):
        drive(engine, [ask(1)])


def test_the_person_who_waits_is_told_once(
    serve: Serve, connect: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(is_down=True)
    engine = connect(server, max_concurrency=20)
    for number in range(20):
        prepared = engine.prepare(ask(number))
        assert not isinstance(prepared, Failure)
        engine.submit(prepared)
    while "does not answer (HTTP 503: down)" not in caplog.text:
        engine.step(0.1)
    server.settings.is_down = False
    while "answers again" not in caplog.text:
        engine.step(0.1)
    assert caplog.text.count("does not answer") == 1


def test_answers_in_other_scripts_come_as_they_are(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "回答 👍 \u202e ñ"
    monkeypatch.setattr("fake_server.answer_to", lambda prompt: text)
    outcome = drive(connect(serve()), [ask(1, "为什么？")])[ask(1).key]
    assert isinstance(outcome, Completion)
    assert outcome.text == text


def test_an_address_where_nobody_listens(connect: Ask) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    class Nobody:
        base_url = f"http://127.0.0.1:{port}/v1"

    outcome = drive(connect(Nobody(), max_retries=0), [ask(1)])[ask(1).key]
    assert isinstance(outcome, Failure)
    assert (outcome.error_type, outcome.error) == (
        "connection",
        "the connection failed: Connection refused",
    )


@pytest.mark.parametrize("proxy", ["garbage:::x", "ftp://h:1", "http://user:secret/word@h:1"])
def test_a_proxy_that_is_no_address_is_no_death_of_a_worker(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(ConfigError, match="see HTTP_PROXY") as caught:
        connect(serve())
    assert "secret" not in str(caught.value)


def test_certificates_that_are_not_there_are_named(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(
        ConfigError, match=r"SSL_CERT_FILE or SSL_CERT_DIR can't be read: .*No such"
    ):
        connect(serve())
    (tmp_path / "none.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE or SSL_CERT_DIR can't be read"):
        connect(serve())


def test_a_certificate_that_is_not_trusted_stops_the_run(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    aiohttp = pytest.importorskip("aiohttp")
    untrusted = ssl.SSLCertVerificationError(1, "certificate verify failed")
    untrusted.verify_message = "self-signed certificate"

    def refuse(*_: object) -> NoReturn:
        key = SimpleNamespace(host="127.0.0.1", port=443, is_ssl=True, ssl=True)
        raise aiohttp.ClientConnectorCertificateError(key, untrusted) from untrusted

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", refuse)
    with pytest.raises(RemoteError, match=r"is not trusted \(self-signed certificate\)"):
        drive(connect(serve()), [ask(1)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # how the SDK tells aiohttp of it
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used_and_its_password_not_shown(
    serve: Serve, connect: Ask, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://user:secret-word@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server = serve()
    outcome = drive(connect(server, max_retries=0), [ask(1)])[ask(1).key]
    assert isinstance(outcome, Failure)
    assert outcome.error_type == "connection"
    assert "secret-word" not in outcome.error
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert isinstance(drive(connect(server), [ask(2)])[ask(2).key], Completion)
