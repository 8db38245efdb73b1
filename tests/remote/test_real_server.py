"""Against a server that nobody here wrote: the answers of the local engine, over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import KEY

from models import example_records
from ragfleet.config import RunConfig
from ragfleet.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def transformers_serve(small_model: Path) -> Iterator[str]:
    """`transformers serve` on a free port of loopback; its base URL."""
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("fastapi") is None:
        pytest.skip("transformers serve needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(small_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline_s = time.monotonic() + 120
            while not is_up(port):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline_s
                time.sleep(0.5)  # a foreign server says in no other way that it is ready
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def answers(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    contexts = folder / "contexts.jsonl"
    records = [record for record in example_records(16) if record.get("success", True)]
    contexts.write_text("\n".join(map(json.dumps, records)))
    output = folder / f"{settings['inference_type']}.jsonl"
    summary = run(
        RunConfig(
            contexts_file=contexts,
            output_file=output,
            temperature=0,
            max_new_tokens=12,
            **settings,
        )
    )
    assert summary is not None
    return list(summary.results())


def test_transformers_serve_answers_as_the_local_engine(
    transformers_serve: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    local = answers(tmp_path, inference_type="local", model_path=str(small_model), device="cpu")
    remote = answers(
        tmp_path,
        inference_type="openai",
        base_url=transformers_serve,
        api_model_name=str(small_model),
        max_concurrency=2,
    )
    for field in ("answer", "finish_reason", "prompt_tokens", "completion_tokens", "success"):
        assert [row[field] for row in remote] == [row[field] for row in local], field
    assert any(row["answer"] for row in remote)
