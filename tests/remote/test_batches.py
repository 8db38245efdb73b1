"""Batches: split, followed, resumed after a kill at every step, never submitted twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import ask, drive
from fake_batches import FakeBatches
from fake_server import KEY, MODEL, FakeServer, Serve, answer_to
from test_faults import check_answers, config_for, texts_below

from ragfleet import batch_files
from ragfleet.batch_files import export_requests, import_replies
from ragfleet.config import RunConfig
from ragfleet.engines.openai_batch import OpenAIBatchEngine
from ragfleet.engines.protocol import (
    Completion,
    EngineSpec,
    Failure,
    PromptSettings,
    SamplingParams,
)
from ragfleet.errors import ConfigError, InputError, OutputError, RemoteError, StorageError
from ragfleet.identity import read_run_file
from ragfleet.launch import RunPaths
from ragfleet.remote.batch_journal import Journal
from ragfleet.remote.client import ApiClient
from ragfleet.remote.spec import PROVIDERS, RemoteSpec
from ragfleet.run_lock import RunLock
from ragfleet.runner import run
from ragfleet.shards import list_shards

Start = Callable[..., OpenAIBatchEngine]


class Killed(BaseException):
    """What a kill is to code: nothing catches it."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started: list[OpenAIBatchEngine] = []

    def make(
        server: FakeServer, batch_requests: int = 5, run_dir: Path = tmp_path, **remote: Any
    ) -> Any:
        engine = OpenAIBatchEngine(
            EngineSpec(
                model_dir=None,
                sampling=SamplingParams(max_new_tokens=8),
                prompts=PromptSettings(system_prompt=""),
                run_dir=run_dir,
                remote=RemoteSpec(
                    provider="openai",
                    base_url=server.base_url,
                    model=MODEL,
                    key_env="OPENAI_API_KEY",
                    api_mode="batch",
                    batch_requests=batch_requests,
                    batch_poll_s=0.01,
                    **remote,
                ),
            )
        )
        started.append(engine)
        engine.start()
        return engine

    yield make
    for engine in started:
        engine.close()


REQUESTS = [ask(number, f"Question {number}?") for number in range(12)]


@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_parts_keep_to_the_limit_and_answers_find_their_requests(
    serve: Serve, start: Start, begin: bytes
) -> None:
    server = serve()
    batches = FakeBatches(server, most_requests=5)
    batches.begin = begin
    outcomes = drive(start(server), REQUESTS)
    assert len(batches.batches) == 3
    assert set(batches.submitted.values()) == {1}
    for request in REQUESTS:
        outcome = outcomes[request.key]
        assert isinstance(outcome, Completion)
        prompt = (
            f"Documentation retrieved for the question:\n\nA text.\n\nQuestion: {request.query}"
        )
        assert outcome.text == answer_to(prompt)


def test_an_expired_batch_keeps_what_it_finished(serve: Serve, start: Start) -> None:
    server = serve()
    batches = FakeBatches(server)
    batches.share_done = 0.6
    outcomes = drive(start(server, 100), REQUESTS)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    # 12, of which 7 are done; the other 5, of which 3; 2; 1: no part has what was finished before.
    assert sorted(batches.submitted.values()) == [1] * 7 + [2] * 3 + [3, 4]


def test_failures_are_told_apart(serve: Serve, start: Start) -> None:
    server = serve(max_context=100)
    FakeBatches(server)
    requests = [ask(0), ask(1, "FILTER"), ask(2, "BAD"), ask(3, context="long " * 200)]
    outcomes = drive(start(server), requests)
    kinds = [getattr(outcomes[request.key], "error_type", "") for request in requests]
    assert kinds == ["", "content_filter", "invalid_request", "too_long"]


def test_a_refused_file_stops_the_run(serve: Serve, start: Start) -> None:
    server = serve()
    FakeBatches(server, most_requests=3)
    with pytest.raises(RemoteError, match="too_many_requests"):
        drive(start(server), REQUESTS)


def test_what_was_refused_is_submitted_anew_by_the_next_start(serve: Serve, start: Start) -> None:
    """No credit yesterday, some today."""
    server = serve()
    batches = FakeBatches(server)
    batches.refuses = "billing_hard_limit_reached"
    with pytest.raises(RemoteError, match="billing_hard_limit_reached"):
        drive(start(server, 100), REQUESTS)
    batches.refuses = ""
    outcomes = drive(start(server, 100), REQUESTS)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert set(batches.submitted.values()) == {1}


def test_parts_shrink_to_what_the_provider_queues(serve: Serve, start: Start) -> None:
    server = serve()
    batches = FakeBatches(server)
    batches.most_queued = 4
    outcomes = drive(start(server, 12), REQUESTS)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert set(batches.submitted.values()) == {1}


def test_a_part_has_no_more_bytes_than_the_provider_takes(serve: Serve, start: Start) -> None:
    server = serve()
    batches = FakeBatches(server)
    batches.share_done = 0.5  # what expired joins other parts, within the limit too
    engine = start(server, 100, batch_bytes=1500)
    outcomes = drive(engine, [*REQUESTS, ask(99, "long " * 400)])
    failure = outcomes.pop(ask(99).key)
    assert isinstance(failure, Failure)
    assert (failure.error_type, "1,500" in failure.error) == ("too_long", True)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert all(
        len(content) <= 1500
        for name, content in batches.files.values()
        if name.startswith("ragfleet")
    )


def test_a_model_that_wants_the_other_length_field(serve: Serve, start: Start) -> None:
    server = serve(only_completion_tokens=True)
    batches = FakeBatches(server)
    outcomes = drive(start(server, 100), REQUESTS)
    assert all(isinstance(outcome, Completion) for outcome in outcomes.values())
    assert set(batches.submitted.values()) == {2}


def test_requests_without_a_reply_fail_at_last(serve: Serve, start: Start) -> None:
    server = serve()
    batches = FakeBatches(server)
    batches.loses = "Question 3?"
    outcomes = drive(start(server, 100), REQUESTS[:5])
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    assert [failure.error_type for failure in failures] == ["no_reply"]
    assert sorted(batches.submitted.values()) == [1, 1, 1, 1, 3]


def test_a_server_without_batch_endpoints_says_what_to_do(serve: Serve, start: Start) -> None:
    with pytest.raises(RemoteError, match="--api_mode realtime"):
        drive(start(serve()), REQUESTS)


@pytest.mark.parametrize(
    "every", [9, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_killed_at_every_step_and_run_again(
    serve: Serve, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Before and after every call to the server and every line of the journal."""
    countdown = [0]

    def step() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    def wrapped(method: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            step()
            result = await method(*args, **kwargs)
            step()
            return result

        return call

    def noted(method: Any) -> Any:
        def write(*args: Any) -> None:
            step()
            method(*args)
            step()

        return write

    monkeypatch.setattr(ApiClient, "call", wrapped(ApiClient.call))
    monkeypatch.setattr(ApiClient, "upload", wrapped(ApiClient.upload))
    monkeypatch.setattr(Journal, "write", noted(Journal.write))
    monkeypatch.setattr(Journal, "save_replies", noted(Journal.save_replies))
    num_kills = 0
    for kill_at in range(1, 1000, every):
        server = serve()
        batches = FakeBatches(server)
        batches.share_done = 0.5  # so that there are several generations of parts
        run_dir = tmp_path / str(kill_at)
        finished: dict[bytes, Any] = {}
        requests = REQUESTS[:6]
        countdown[0] = kill_at
        try:
            finished = drive(start(server, 4, run_dir), requests)
        except Killed:
            num_kills += 1
        countdown[0] = -1
        killed = not finished
        if killed:
            finished = drive(start(server, 4, run_dir), requests)
        assert all(isinstance(outcome, Completion) for outcome in finished.values())
        seen: set[str] = set()
        for batch in batches.batches.values():  # nothing finished was ever submitted again
            lines = batches.files[batch["input_file_id"]][1].splitlines()
            asked = {json.loads(line)["custom_id"] for line in lines}
            assert not asked & seen, f"killed at step {kill_at}"
            output = batches.files.get(batch.get("output_file_id", ""), ("", b""))[1]
            seen |= {json.loads(line)["custom_id"] for line in output.splitlines()}
        files = [batch["input_file_id"] for batch in batches.batches.values()]
        assert len(files) == len(set(files)), f"a file was submitted twice, killed at {kill_at}"
        server.__exit__()
        if not killed:
            break
    assert num_kills > 40 / every


def test_a_run_survives_sigkill_and_resumes_its_batch(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    batches = FakeBatches(server)
    batches.looks = 10**9
    config = config_for(server, tmp_path, 40, api_mode="batch", batch_poll_s=0.05)
    command = [sys.executable, "-m", "ragfleet", "infer", "--api_mode=batch"]
    for name in ("contexts_file", "output_file", "base_url", "api_model_name", "batch_poll_s"):
        command.append(f"--{name}={getattr(config, name)}")
    command += ["--inference_type=openai", "--temperature=0", "--max_new_tokens=8"]
    looked: list[str] = []
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def kill(method: str, path: str) -> None:
        if is_look(method, path) and not looked:
            looked.append(path)
            os.killpg(process.pid, signal.SIGKILL)

    server.before_reply = kill
    process.wait(60)
    assert looked
    batches.looks = 0
    summary = run(config)
    assert summary is not None
    assert len(batches.batches) == 1
    ((_, content),) = [file for file in batches.files.values() if file[0].startswith("ragfleet")]
    server.bodies += [json.loads(line)["body"] for line in content.splitlines()]
    check_answers(server, tmp_path / "out.jsonl", 40)
    for text in texts_below(tmp_path):
        assert KEY not in text


def is_look(method: str, path: str) -> bool:
    return method == "GET" and path.startswith("/v1/batches/")


def test_exported_requests_and_imported_replies_make_the_same_rows(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else answers the file; what is missing is exported again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    config = config_for(server, tmp_path, 30)
    requests = tmp_path / "requests.jsonl"
    first, second, then = export_requests_in_two(config, requests, monkeypatch)
    assert first.startswith("20 requests")
    assert second.startswith("10 requests")
    assert str(config.output_file) in then
    replies = tmp_path / "replies.jsonl"
    lines = requests.read_bytes().splitlines()
    replies.write_bytes(b"\xef\xbb\xbf" + answer_lines(server, lines[:15]) + b'{"torn')
    said = import_replies(config.output_file, replies)
    assert said[0] == "15 replies taken (0 of them failures)"
    assert "15 requests remain" in said[-1]
    again = tmp_path / "again.jsonl"
    assert export_requests(config, again)[0].startswith("15 requests")
    replies.write_bytes(answer_lines(server, again.read_bytes().splitlines()))
    assert import_replies(config.output_file, replies)[-1].startswith("30 rows")
    for path in (requests, tmp_path / "requests-0002.jsonl", again):
        server.bodies += [json.loads(line)["body"] for line in path.read_text().splitlines()]
    check_answers(server, config.output_file, 30)
    summary = run(config)  # it is the same run: nothing is left
    assert summary is not None
    assert summary.answered_now == 0


def test_files_that_are_no_requests_and_no_replies(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    config = config_for(server, tmp_path, 3)
    output, requests = config.output_file, tmp_path / "requests.jsonl"
    for target in (output, output.with_name(f"{output.stem}_rank0.jsonl")):
        with pytest.raises(ConfigError, match="need a file of their own"):
            export_requests(config, target)
    (tmp_path / "requests-0002.jsonl").touch()
    with pytest.raises(ConfigError, match=r"requests-0002.jsonl exists already"):
        export_requests(config, requests)
    (tmp_path / "requests-0002.jsonl").unlink()
    assert not output.exists()
    assert not RunPaths(output).directory.exists()
    export_requests(config, requests)
    for wrong in (config.contexts_file, requests, requests.with_name("empty.jsonl")):
        wrong.touch()
        with pytest.raises(InputError, match=r"None of the [30] lines .*; 3 requests remain"):
            import_replies(output, wrong)
    assert not list_shards(output)
    replies = tmp_path / "replies.jsonl"
    replies.write_bytes(answer_lines(server, requests.read_bytes().splitlines()))
    assert import_replies(output, replies)[-1].startswith("3 rows")
    assert import_replies(output, replies)[0].startswith("0 replies taken"), "nothing is missing"
    assert run(config.replace(remove_shards=True)) is not None
    assert import_replies(output, replies)[0].startswith("0 replies taken"), "nor without shards"
    assert not list_shards(output)


def test_an_export_heeds_what_is_there_as_a_start_does(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would take somebody's file for its own and write over it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = config_for(serve(), tmp_path, 3)
    output, directory = config.output_file, RunPaths(config.output_file).directory
    output.write_text("mine\n")
    with pytest.raises(OutputError, match="no run of ragfleet made it"):
        export_requests(config, tmp_path / "requests.jsonl")
    assert not directory.exists()
    export_requests(config.replace(overwrite=True), tmp_path / "new" / "requests.jsonl")
    (backup,) = tmp_path.glob("*.bak-*")
    assert (backup / output.name).read_text() == "mine\n"
    assert run(config) is not None
    other = config.replace(max_new_tokens=7)
    with pytest.raises(OutputError, match="it moves 3 finished answers"):
        export_requests(other, tmp_path / "other.jsonl")
    said = ["Nothing to export: all 3 requests are finished."]
    assert export_requests(config, tmp_path / "again.jsonl") == said
    assert run(config.replace(remove_shards=True)) is not None
    assert export_requests(config, tmp_path / "again.jsonl") == said
    with pytest.raises(OutputError, match="it moves 3 finished answers"):
        export_requests(other, tmp_path / "other.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Can't write .*requests\.jsonl"):
        export_requests(config.replace(overwrite=True), tmp_path / "file" / "requests.jsonl")


def test_an_export_reads_what_a_start_that_just_ends_leaves(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would ask for all of it again, and forget that it is merged."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = config_for(serve(), tmp_path, 3)
    export_requests(config, tmp_path / "all.jsonl")  # writes the run down

    class LateLock(RunLock):
        def __enter__(self) -> RunLock:
            assert run(config.replace(remove_shards=True)) is not None
            return super().__enter__()

    monkeypatch.setattr(batch_files, "RunLock", LateLock)
    said = export_requests(config, tmp_path / "requests.jsonl")
    assert said == ["Nothing to export: all 3 requests are finished."]
    assert not (tmp_path / "requests.jsonl").exists()
    run_file = read_run_file(RunPaths(config.output_file))
    assert run_file is not None
    assert run_file.merged is not None
    assert run_file.merged["shards_removed"]


def export_requests_in_two(
    config: RunConfig, target: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    small = dataclasses.replace(PROVIDERS["openai"], batch_requests=20)
    with monkeypatch.context() as patch:
        patch.setitem(PROVIDERS, "openai", small)  # type: ignore[arg-type]
        return export_requests(config, target)


def answer_lines(server: FakeServer, lines: list[bytes]) -> bytes:
    """As `vllm run-batch` answers."""
    found = []
    for line in lines:
        request = json.loads(line)
        reply = server.answer(request["body"], "key")
        response = {"status_code": reply.status, "request_id": "x", "body": reply.body}
        result = {"id": "x", "custom_id": request["custom_id"], "response": response, "error": None}
        found.append(json.dumps(result))
    return "\n".join(found).encode() + b"\n"
