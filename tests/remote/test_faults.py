"""Whole runs, with real workers, against a server that limits and breaks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_server import KEY, MODEL, FakeServer, Serve, answer_to

from ragfleet.config import RunConfig
from ragfleet.errors import RemoteError
from ragfleet.events import Event
from ragfleet.remote.pacing import JITTER, WINDOW_S
from ragfleet.runner import run

RPM = 1800
FAULTS = {
    "429": 0.03,
    "429+": 0.03,
    "500": 0.03,
    "503": 0.03,
    "reset": 0.02,
    "torn": 0.02,
    "empty": 0.02,
    "unended": 0.01,
    "stall": 0.01,
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write_contexts(folder: Path, count: int) -> Path:
    path = folder / "contexts.jsonl"
    with path.open("w") as file:
        for number in range(count):
            record = {
                "id": f"r-{number}",
                "query": f"Q {number}?",
                "context": f"C {number // 4} " * 9,
            }
            file.write(json.dumps(record) + "\n")
    return path


def config_for(server: FakeServer, folder: Path, count: int, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "contexts_file": write_contexts(folder, count),
        "output_file": folder / "out.jsonl",
        "inference_type": "openai",
        "base_url": server.base_url,
        "api_model_name": MODEL,
        "temperature": 0,
        "max_new_tokens": 8,
        "request_timeout_s": 3.0,
        "max_retries": 12,
    }
    return RunConfig(**{**settings, **changes})


def check_answers(server: FakeServer, output: Path, count: int) -> None:
    """Each record once, in order, with its own answer."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r-{number}" for number in range(count)]
    assert all(row["success"] for row in rows), Counter(row.get("error") for row in rows)
    own = {}
    for body in server.bodies:
        prompt = "".join(message["content"] for message in body["messages"])
        own[prompt.rpartition("Question: ")[2]] = answer_to(prompt)
    assert [row["answer"] for row in rows] == [own[row["query"]] for row in rows]


def most_arriving(window_s: float, per_minute: int = RPM) -> float:
    """Evenly paced, and pulled apart on the way by up to the jitter that the pacing allows for."""
    return per_minute * (window_s + JITTER * WINDOW_S) / WINDOW_S


def used_of_the_rate(server: FakeServer, warm_up_s: float, weigh: Any, limit: int) -> float:
    """Share of the permitted rate that arrived after warm-up and before the last tenth."""
    arrivals = server.arrivals
    first_s = arrivals[0].at_s + warm_up_s
    last_s = arrivals[int(len(arrivals) * 0.9)].at_s
    total = sum(weigh(arrival) for arrival in arrivals if first_s < arrival.at_s <= last_s)
    return float(total / ((last_s - first_s) * limit / server.settings.window_s))


def test_nothing_is_lost_or_doubled_and_the_key_is_nowhere(serve: Serve, tmp_path: Path) -> None:
    count = 200
    server = serve(faults=FAULTS, seed=1, stall_s=4.0, latency_s=0.02, requests=RPM)
    commands: set[str] = set()
    said: list[str] = []

    def watch(event: Event) -> None:
        said.append(repr(event))
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.add(path.read_text(errors="replace"))
            except OSError:
                continue

    config = config_for(
        server, tmp_path, count, num_workers=2, verbose=True, max_requests_per_minute=RPM
    )
    summary = run(config, watch)
    assert summary is not None
    check_answers(server, tmp_path / "out.jsonl", count)
    assert {arrival.status for arrival in server.arrivals} >= {200, 429, 500, 503, "reset", "torn"}
    assert server.most_in_a_window(window_s=5.0) <= most_arriving(5.0)
    assert server.keys == {KEY}
    assert any("ragfleet.worker_main" in command for command in commands)
    for text in (*commands, *said, repr(summary), *texts_below(tmp_path)):
        assert KEY not in text


def test_the_run_stops_at_the_first_refusal(serve: Serve, tmp_path: Path) -> None:
    server = serve(key="another")
    with pytest.raises(RemoteError, match="OPENAI_API_KEY or --api_key_file") as caught:
        run(config_for(server, tmp_path, 500, max_concurrency=4))
    assert len(server.arrivals) <= 8
    for text in (str(caught.value), *texts_below(tmp_path)):
        assert KEY not in text


def test_a_resumed_run_goes_on_counting_its_cost(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    prices = {"price_in": 1e6, "price_out": 0.0}  # a token of a prompt costs one
    config = config_for(server, tmp_path, 60, max_cost=3000.0, max_concurrency=4, **prices)
    with pytest.raises(RemoteError, match="--max_cost"):
        run(config)
    assert 2000 < charged_tokens(server) <= 3000
    summary = run(config.replace(max_cost=1e6))
    assert summary is not None
    assert summary.cost == charged_tokens(server)
    check_answers(server, tmp_path / "out.jsonl", 60)


def charged_tokens(server: FakeServer) -> int:
    return sum(arrival.tokens - 8 for arrival in server.arrivals)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limited", ["requests", "tokens", "learned"])
def test_2000_records_4_workers_and_a_limit(serve: Serve, tmp_path: Path, limited: str) -> None:
    """0 lost, 0 doubled, 95 % of the rate used after warm-up, never above it in any window."""
    count, rpm = 2000, RPM
    server = serve(faults=FAULTS, seed=2, stall_s=5.0, latency_s=0.05, headers=limited == "learned")
    flags: dict[str, Any] = {}
    weigh: Any = lambda arrival: 1  # noqa: E731
    limit = rpm
    if limited == "tokens":
        weigh = lambda arrival: arrival.tokens  # noqa: E731
        limit = server.settings.tokens = rpm * 80
        flags["max_tokens_per_minute"] = limit
    else:
        server.settings.requests = limit
        if limited == "requests":
            flags["max_requests_per_minute"] = limit
    summary = run(config_for(server, tmp_path, count, num_workers=4, **flags))
    assert summary is not None
    check_answers(server, tmp_path / "out.jsonl", count)
    most = server.most_in_a_window(weigh)
    used = used_of_the_rate(server, 10.0, weigh, limit)
    refused = sum(arrival.status == 429 for arrival in server.arrivals)
    print(f"\n{limited}: most in a window {most:,} of {limit:,}; {used:.1%} of the rate used;")
    print(f"{len(server.arrivals):,} requests, {refused} of them 429, {summary.wall_s:.0f} s")
    assert used >= 0.95
    if limited != "learned":  # the first requests go before the first header comes
        assert most <= limit


def texts_below(folder: Path) -> list[str]:
    return [
        path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()
    ]


@pytest.mark.slow
def test_torchrun_keeps_the_limit_of_all_ranks_together(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    server = serve(latency_s=0.02)
    config = config_for(server, tmp_path, 200)
    script = Path(__file__).parents[2] / "utils/RAGutils/queryResultByInfer"
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node=8",
    ]
    command += [str(script / "multi_worker_inference.py"), "--inference_type=openai"]
    for name in ("contexts_file", "output_file", "base_url", "api_model_name", "temperature"):
        command.append(f"--{name}={getattr(config, name)}")
    command += ["--max_new_tokens=8", "--max_requests_per_minute=1200"]
    subprocess.run(command, check=True, timeout=110)
    check_answers(server, tmp_path / "out.jsonl", 200)
    assert server.most_in_a_window(window_s=5.0) <= most_arriving(5.0, 1200)
