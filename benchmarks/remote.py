"""How fast one worker asks an API, beside a bare loop of asyncio and httpx in the same run.

    python benchmarks/remote.py [--requests 4000] [--in_flight 256] [--latency_s 0.1]

The server is `tests/remote/fake_server.py` in a process of its own on loopback. Both sides send the
same bodies and parse the replies. The two take turns, `--rounds` times, and the medians count. JSON
on stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "tests" / "remote" / "fake_server.py"
MODEL = "small-model"


def contexts(count: int) -> list[dict[str, str]]:
    return [
        {"query": f"Question {number}?", "context": f"Text {number}. " * 100}
        for number in range(count)
    ]


def ask_with_ragfleet(base_url: str, records: list[dict[str, str]], in_flight: int) -> float:
    """Requests a second of the engine as the worker drives it; the connections are warm."""
    from ragfleet.engines.openai_compatible import OpenAICompatibleEngine
    from ragfleet.engines.protocol import EngineSpec, PromptSettings, Request, SamplingParams
    from ragfleet.remote.spec import RemoteSpec

    engine = OpenAICompatibleEngine(
        EngineSpec(
            model_dir=None,
            sampling=SamplingParams(max_new_tokens=16),
            prompts=PromptSettings(system_prompt="Be brief."),
            max_retries=0,
            remote=RemoteSpec(
                provider="openai",
                base_url=base_url,
                model=MODEL,
                key_env="NO_KEY",
                key_needed=False,
                max_concurrency=in_flight,
            ),
        )
    )
    engine.start()

    def drive(numbered: list[tuple[int, dict[str, str]]]) -> None:
        waiting = iter(numbered)
        finished = 0
        following = next(waiting, None)
        while finished < len(numbered):
            while following is not None:
                number, record = following
                prepared = engine.prepare(
                    Request(
                        key=number.to_bytes(16, "big"),
                        query=record["query"],
                        context=record["context"],
                        retrieval_method=None,
                        record=record,
                    )
                )
                if not engine.has_room(prepared):  # type: ignore[arg-type]
                    break
                engine.submit(prepared)  # type: ignore[arg-type]
                following = next(waiting, None)
            outcomes = engine.step(1.0)
            assert all(hasattr(outcome, "text") for outcome in outcomes)
            finished += len(outcomes)

    numbered = list(enumerate(records))
    drive(numbered[:in_flight])
    started_s = time.perf_counter()
    drive(numbered)
    seconds = time.perf_counter() - started_s
    engine.close()
    return len(records) / seconds


async def ask_with_httpx(base_url: str, records: list[dict[str, str]], in_flight: int) -> float:
    """Requests a second of the shortest loop that does the same."""
    try:
        import httpx2 as httpx
    except ImportError:
        import httpx  # type: ignore[no-redef]
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, timeout=600) as client:

        async def work(waiting: Iterator[dict[str, str]]) -> None:
            for record in waiting:
                body: dict[str, Any] = {
                    "model": MODEL,
                    "max_tokens": 16,
                    "temperature": 0,
                    "messages": [
                        {"role": "system", "content": "Be brief."},
                        {
                            "role": "user",
                            "content": f"Documentation:\n\n{record['context']}\n\n"
                            f"Question: {record['query']}",
                        },
                    ],
                }
                response = await client.post(f"{base_url}/chat/completions", json=body)
                assert response.json()["choices"][0]["message"]["content"]

        async def drive(some: list[dict[str, str]]) -> None:
            waiting = iter(some)
            await asyncio.gather(*(work(waiting) for _ in range(in_flight)))

        await drive(records[:in_flight])
        started_s = time.perf_counter()
        await drive(records)
        return len(records) / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--in_flight", type=int, default=256)
    parser.add_argument("--latency_s", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    records = contexts(options.requests)
    command = [sys.executable, str(SERVER), "--latency_s", str(options.latency_s)]
    mine, bare = [], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        url = server.stdout.readline().decode().strip()
        for _ in range(options.rounds):
            mine.append(ask_with_ragfleet(url, records, options.in_flight))
            bare.append(asyncio.run(ask_with_httpx(url, records, options.in_flight)))
        assert server.stdin is not None
        server.stdin.close()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    result = {
        "requests": options.requests,
        "in_flight": options.in_flight,
        "latency_s": options.latency_s,
        "ragfleet_per_s": [round(rate, 1) for rate in mine],
        "bare_httpx_per_s": [round(rate, 1) for rate in bare],
        "ratio_of_medians": round(statistics.median(mine) / statistics.median(bare), 3),
        "limit_per_s": options.in_flight / options.latency_s,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "openai": version("openai"),
        "commit": commit,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
