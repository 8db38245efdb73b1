"""Against servers that nobody here wrote: the answers of the local engine, over HTTP.

`transformers serve` comes with what the tests install. vLLM's server wants an environment of its
own (make servers): its interpreter is RAGFLEET_VLLM_PYTHON, or .venv-vllm/bin/python.
"""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from models import example_records
from ragfleet.config import RunConfig
from ragfleet.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
POCKET = ROOT / "src" / "ragfleet" / "pocket"
VLLM_PYTHON = Path(os.environ.get("RAGFLEET_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
NUM_RECORDS = 24


@contextmanager
def server(command: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """A server on a free port of loopback, from when it is ready; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            deadline_s = time.monotonic() + 300
            while not is_up(port):
                log_text = (folder / "server.log").read_text(errors="replace")[-2000:]
                assert process.poll() is None, f"the server ended: {log_text}"
                assert time.monotonic() < deadline_s, log_text
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


def answers(folder: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    contexts = folder / "contexts.jsonl"
    records = [record for record in example_records(NUM_RECORDS) if record.get("success", True)]
    contexts.write_text("\n".join(map(json.dumps, records)))
    summary = run(
        RunConfig(
            contexts_file=contexts,
            output_file=folder / f"{name}.jsonl",
            temperature=0,
            max_new_tokens=32,
            # The pocket model's template has no system message: the local engine puts it before
            # the question, a server drops it.
            system_prompt="",
            **settings,
        )
    )
    assert summary is not None
    return list(summary.results())


def check_equal(folder: Path, base_url: str, model: str) -> None:
    local = answers(
        folder, "local", model_path="pocket", device="cpu", precision="fp32", num_workers=1
    )
    remote = answers(
        folder,
        "remote",
        inference_type="openai",
        base_url=base_url,
        api_model_name=model,
        max_concurrency=4,
    )
    for field in ("answer", "finish_reason", "prompt_tokens", "completion_tokens", "success"):
        assert [row[field] for row in remote] == [row[field] for row in local], field
    print(f"\n{len(local)} answers equal the local engine's, e.g. {local[0]['answer']!r}")
    assert all(row["answer"] for row in local)


def test_transformers_serve_answers_as_the_local_engine(tmp_path: Path) -> None:
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"transformers serve needs {package}: pip install -e '.[test]'")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(POCKET)]
    with server([*command, "--device", "cpu", "--dtype", "float32"], tmp_path) as base_url:
        check_equal(tmp_path, base_url, str(POCKET))


def test_vllm_answers_as_the_local_engine(tmp_path: Path) -> None:
    if not VLLM_PYTHON.exists():
        pytest.skip(
            f"no vLLM: {VLLM_PYTHON} is not there; make servers, or name RAGFLEET_VLLM_PYTHON"
        )
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET)]
    command += ["--served-model-name", "pocket", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "4096"]
    with server(command, tmp_path, VLLM_CPU_KVCACHE_SPACE="1") as base_url:
        check_equal(tmp_path, base_url, "pocket")
