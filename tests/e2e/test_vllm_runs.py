"""Whole runs on vLLM: the command line, torchrun, and what is left when everything is killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import NEEDS_VLLM, ROOT, example_records, make_model

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(300)]
CACHE = '{"kv_cache_memory_bytes": 67108864}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "vllm", "--head_dim", "32")


def infer(model: Path, folder: Path, num_records: int, *more: str) -> list[str]:
    """The command, without its interpreter."""
    contexts = folder / "contexts.jsonl"
    lines = (json.dumps(record) for record in example_records(num_records))
    contexts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["infer", "--contexts_file", str(contexts), "--output_file", str(folder / "out.jsonl")]
    words += ["--model_path", str(model), "--temperature", "0", "--device", "cpu"]
    return [*words, "--max_new_tokens", "8", "--engine", "vllm", "--engine_options", CACHE, *more]


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def answers(folder: Path) -> list[object]:
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def test_two_workers_answer_as_transformers_does(model: Path, tmp_path: Path) -> None:
    words = infer(model, tmp_path, 12, "--num_workers", "2")
    done = run([sys.executable, "-m", "ragfleet", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Engine: vLLM" in done.stdout + done.stderr
    on_vllm = answers(tmp_path)
    words[words.index("vllm")] = "transformers"
    at = words.index("--engine_options")
    words = [*words[:at], *words[at + 2 :], "--overwrite"]
    assert run([sys.executable, "-m", "ragfleet", *words]).returncode == 0
    assert on_vllm == answers(tmp_path)
    assert len(on_vllm) == 12


def test_under_torchrun_nothing_of_it_reaches_the_engine(model: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ROOT / "utils" / "RAGutils" / "queryResultByInfer" / "multi_worker_inference.py"
    words = infer(model, tmp_path, 6)[1:]
    done = run([*torchrun, "--nproc_per_node=2", str(script), *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(answers(tmp_path)) == 6


def test_a_wrong_option_costs_nothing(model: Path, tmp_path: Path) -> None:
    words = infer(model, tmp_path, 1, "--engine_options", '{"max_num_seq": 4}')
    done = run([sys.executable, "-m", "ragfleet", *words])
    assert done.returncode == 2
    assert "did you mean max_num_seqs" in done.stdout + done.stderr
    assert not (tmp_path / "out.run").exists()


def test_a_value_that_vllm_refuses_stops_the_run(model: Path, tmp_path: Path) -> None:
    words = infer(model, tmp_path, 4, "--engine_options", '{"max_num_seqs": "many"}')
    done = run([sys.executable, "-m", "ragfleet", *words])
    assert done.returncode == 2
    assert "cannot start with it" in done.stdout + done.stderr


def children(pid: int) -> Iterator[int]:
    """All descendants."""
    with contextlib.suppress(FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from children(int(child))


def test_no_process_outlives_a_killed_launcher(model: Path, tmp_path: Path) -> None:
    words = infer(model, tmp_path, 4, "--max_new_tokens", "6000", "--verbose")
    # As on a GPU: the engine is a process of its own, and another one computes.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "ragfleet", *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        said = []
        for line in launcher.stdout:
            said.append(line)
            if "LlamaForCausalLM" in line:  # it has loaded
                break
        pidfds = []
        for pid in children(launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
        try:
            assert len(pidfds) >= 3, "".join(said)
            launcher.send_signal(signal.SIGKILL)
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], 20)[0], "a process lives on"
        finally:
            for pidfd in pidfds:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
