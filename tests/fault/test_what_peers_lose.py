"""What others of this kind lose, one test each.

The rows on rate limits are held where the server that limits is: fixed pauses that exhaust the
retries in `tests/remote/test_faults.py` (`test_2000_records_4_workers_and_a_limit`), equal waits
that come back together in `tests/remote/test_governor.py` (`test_retry_after_is_a_floor`, and
`test_nobody_comes_back_together` below).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest

from ragfleet.remote.pacing import backoff_s

CLASSES = (
    """
import os, pathlib, resource, time
from ragfleet import QueryBasedInference
from ragfleet.errors import EngineDead
"""
    + harness.ONCE
    + """
class Counting(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        with open(HERE / "calls", "a") as file:
            file.write(query + "\\\\n")
        time.sleep(0.004)
        return query[::-1]

class Gated(Counting):
    def generate_answer(self, query, context, retrieval_method):
        while (HERE / "calls").exists() and len((HERE / "calls").read_text().split()) >= 20:
            if (HERE / "gate").exists():
                break
            time.sleep(0.005)
        return super().generate_answer(query, context, retrieval_method)

class Dies(QueryBasedInference):
    def setup(self):
        os._exit(9)

class OutOfMemory(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query == "q7":
            raise MemoryError("no room for this one")
        return query[::-1]

class RaisingPrompt(QueryBasedInference):
    def create_prompt(self, query, context, retrieval_method):
        if query in ("q3", "q8"):
            raise KeyError(query)
        return query

    def generate_answer(self, query, context, retrieval_method):
        return self.create_prompt(query, context, retrieval_method)

class Measured(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query == "q399":
            self.early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if query == "q3999":
            late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            (HERE / "grown_kb").write_text(str(late - self.early))
        return query[::-1]
"""
)


class Run:
    """A folder with a contexts file and classes to answer it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mine.py").write_text(CLASSES.replace("\\\\n", "\\n"))

    def write(self, count: int, size: int = 1) -> None:
        records = [
            {"id": f"r{n}", "query": f"q{n}", "context": f"{n} " * size} for n in range(count)
        ]
        self.write_lines([json.dumps(record) for record in records])

    def write_lines(self, lines: list[str]) -> None:
        (self.folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))

    def popen(self, name: str, *flags: str, command: str = "infer") -> subprocess.Popen[str]:
        options = ["--output_file", "out.jsonl"]
        if command == "infer":
            options += ["--contexts_file", "in.jsonl", "--engine", "echo", "--temperature", "0"]
            options += ["--inference_class", f"mine.py:{name}"]
        return subprocess.Popen(
            [sys.executable, "-m", "ragfleet", command, *options, *flags],
            cwd=self.folder,
            env=harness.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def go(self, name: str, *flags: str, code: int = 0, command: str = "infer") -> str:
        process = self.popen(name, *flags, command=command)
        said, _ = process.communicate(timeout=90)
        assert process.returncode == code, said
        return said

    def rows(self, name: str = "out.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def calls(self) -> Counter[str]:
        path = self.folder / "calls"
        return Counter(path.read_text().split() if path.exists() else [])

    def shard_lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("out_rank*.jsonl"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def wait_for(condition: Any) -> None:
    deadline_s = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)  # files grow; there is no event for it


def test_results_are_on_disk_while_the_job_runs(run: Run) -> None:
    """vllm run-batch writes nothing until the end (vllm#52505)."""
    run.write(40)
    process = run.popen("Gated")
    try:
        wait_for(lambda: run.shard_lines() >= 20)
        assert process.poll() is None
        assert "20 of 40 selected lines" in run.go("", "--partial", command="merge")
        assert f"Running: pid {process.pid} on " in run.go("", command="status")
        partial = run.rows("out.partial.jsonl")
        assert all(row["answer"] == row["query"][::-1] for row in partial)
        assert not (run.folder / "out.jsonl").exists()
    finally:
        (run.folder / "gate").touch()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert len(run.rows()) == 40


@pytest.mark.slow
def test_memory_does_not_grow_with_the_batch(run: Run) -> None:
    """vllm run-batch holds all of it (vllm#30268): here ten times the records add little."""
    run.write(4000, size=800)
    assert (run.folder / "in.jsonl").stat().st_size > 12e6
    run.go("Measured", "--schedule", "static")
    assert int((run.folder / "grown_kb").read_text()) < 8_000


def test_a_resume_is_exactly_once(run: Run) -> None:
    """Ray Data resumes at least once (ray#61047): rows come twice."""
    run.write(60)
    process = run.popen("Counting")
    wait_for(lambda: run.shard_lines() >= 15)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=10)
    psutil.wait_procs(workers, timeout=10)
    finished = run.shard_lines()
    said = run.go("Counting")
    assert f"{finished} kept, {60 - finished} to do" in said
    assert [row["id"] for row in run.rows()] == [f"r{n}" for n in range(60)]
    assert run.calls().total() <= 61, "only what was in flight at the kill"


@pytest.mark.slow
def test_a_dead_engine_is_retried_so_often_and_no_more(run: Run) -> None:
    """Ray Data retries it forever, or kills the job with all its results (ray#60145, #59522)."""
    run.write(10)
    run.go("Counting", "--max_samples_per_worker", "4")
    said = run.go("Dies", "--max_restarts", "2", "--overwrite", code=1)
    assert said.count("died (exit code 9); restarting") == 2
    assert "No worker is left" in said
    assert "Go on with:" in said
    assert list(run.folder.glob("out.bak-*")), "what was there is kept"


def test_running_out_of_memory_fails_the_record_and_hangs_nobody(run: Run) -> None:
    """Ray Data hangs on it (ray#59986)."""
    run.write(20)
    run.go("OutOfMemory", "--max_retries", "0")
    failed = [row for row in run.rows() if not row["success"]]
    assert [row["id"] for row in failed] == ["r7"]
    assert "no room for this one" in failed[0]["error"]
    assert len(run.rows()) == 20


@pytest.mark.slow
def test_a_worker_killed_for_its_memory_is_replaced(run: Run) -> None:
    """As the kernel's killer does it: SIGKILL, no word."""
    run.write(60)
    process = run.popen("Counting")
    wait_for(lambda: run.shard_lines() >= 10)
    (worker,) = psutil.Process(process.pid).children()
    os.kill(worker.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert len(run.rows()) == 60


def test_a_torn_last_line_resumes(run: Run) -> None:
    """NeMo-Skills' resume breaks at it."""
    run.write(20)
    run.go("Counting")
    (shard,) = run.folder.glob("out_rank*.jsonl")
    shard.write_bytes(shard.read_bytes()[:-9])
    (run.folder / "out.jsonl").unlink()
    assert "19 kept, 1 to do" in run.go("Counting")
    assert [row["answer"] for row in run.rows()] == [f"q{n}"[::-1] for n in range(20)]


def test_an_edited_input_keeps_no_old_answer(run: Run) -> None:
    """NeMo-Skills keeps the answer of what stood at this position before."""
    run.write(20)
    run.go("Counting")
    lines = (run.folder / "in.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace("q5", "another")
    lines[2], lines[11] = lines[11], lines[2]
    run.write_lines(lines)
    assert "19 kept, 1 to do" in run.go("Counting")
    asked = [json.loads(line)["query"] for line in lines]
    assert [row["answer"] for row in run.rows()] == [query[::-1] for query in asked]


def test_a_missing_answer_neither_breaks_the_merge_nor_is_passed_over(run: Run) -> None:
    """NeMo-Skills' merge crashes at it."""
    run.write(20)
    run.go("Counting")
    (shard,) = run.folder.glob("out_rank*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(lines[:7] + lines[8:]))
    assert "1 requests are not finished" in run.go("", command="merge", code=1)
    assert "19 of 20 selected lines" in run.go("", "--partial", command="merge")
    assert "19 kept, 1 to do" in run.go("Counting")
    assert len(run.rows()) == 20


def test_a_duplicate_has_its_answer(run: Run) -> None:
    """NeMo-Skills writes null for it."""
    record = {"id": "r1", "query": "q1", "context": "c"}
    run.write_lines([json.dumps(record)] * 6)
    run.go("Counting")
    assert [row["answer"] for row in run.rows()] == ["1q"] * 6
    assert run.calls() == {"q1": 1}


def test_bad_rows_stand_in_the_output(run: Run) -> None:
    """datatrove drops them."""
    good = [json.dumps({"id": f"r{n}", "query": f"q{n}", "context": "c"}) for n in range(4)]
    run.write_lines([good[0], "{broken", good[1], '{"id": "blank", "query": " "}', *good[2:]])
    run.go("Counting")
    assert [row["id"] for row in run.rows()] == ["r0", "line:2", "r1", "blank", "r2", "r3"]
    assert [row["success"] for row in run.rows()] == [True, False, True, False, True, True]


def test_a_failed_save_fails_the_run_and_loses_nothing(run: Run) -> None:
    """datatrove only warns."""
    run.write(20)
    (run.folder / "sitecustomize.py").write_text(
        "import os, ragfleet.merge as merge\n"
        "class Full:\n"
        "    def __getattr__(self, name): return getattr(os, name)\n"
        "    def fsync(self, fd): raise OSError(28, 'No space left on device')\n"
        "merge.os = Full()\n"
    )
    environment = harness.environment()
    environment["PYTHONPATH"] = os.pathsep.join((str(run.folder), environment["PYTHONPATH"]))
    harness_environment = harness.environment
    try:
        harness.environment = lambda **more: environment
        said = run.go("Counting", code=1)
    finally:
        harness.environment = harness_environment
    assert "No space left on device" in said
    assert "Go on with:" in said
    assert not (run.folder / "out.jsonl").exists()
    assert "all 20 requests are finished" in run.go("Counting")
    assert len(run.rows()) == 20


def test_a_prompt_that_raises_fails_alone(run: Run) -> None:
    """Daft's job hangs at it."""
    run.write(20)
    run.go("RaisingPrompt")
    failed = [row["id"] for row in run.rows() if not row["success"]]
    assert failed == ["r3", "r8"]


def test_nobody_comes_back_together() -> None:
    """Equal Retry-After waits send everybody back at once: here they are spread."""
    waits = [backoff_s(1, 10.0, draw / 100) for draw in range(100)]
    assert len(set(waits)) == 100
    assert max(waits) - min(waits) > 1.0
    assert min(waits) >= 10.0
