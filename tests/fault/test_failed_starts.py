"""Workers that can't start: one ends nobody else's work, and what all meet ends the run at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

CLASSES = '''
import os, pathlib, signal
from ragfleet import QueryBasedInference

HERE = pathlib.Path(__file__).parent

def once(name):
    """True for the first process that asks."""
    try:
        os.close(os.open(HERE / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

class Reverses(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        return query[::-1]

class FirstFails(Reverses):
    def setup(self):
        if once("failed"):
            raise RuntimeError("CUDA-capable device(s) busy")

class AllFail(Reverses):
    def setup(self):
        raise RuntimeError("no such model")

class DiesAndFails(Reverses):
    def setup(self):
        if not once("started") and once("failed"):
            raise RuntimeError("out of memory")

    def generate_answer(self, query, context, retrieval_method):
        if query == "q5" and once("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate_answer(query, context, retrieval_method)

class DiesForGood(DiesAndFails):
    def setup(self):
        if not once("started"):
            raise RuntimeError("the GPU has fallen off the bus")
'''
SITE = "import ragfleet.launchers.supervisor as supervisor\nsupervisor.START_AGAIN_S = 0.1\n"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


def run(
    folder: Path, class_name: str, *flags: str, launcher: list[str] | None = None
) -> tuple[int, str]:
    """Exit code and what was said; rows are checked where there are any."""
    (folder / "mine.py").write_text(CLASSES)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    source = harness.environment()["PYTHONPATH"]
    with (folder / "in.jsonl").open("w") as file:
        for number in range(40):
            record = {"id": f"r{number}", "query": f"q{number}", "context": f"c{number // 4}"}
            file.write(json.dumps(record) + "\n")
    command = [sys.executable, *(launcher or ["-m"]), "ragfleet", "infer", "--engine", "echo"]
    command += ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl", "--temperature", "0"]
    command += ["--inference_class", f"mine.py:{class_name}", *flags]
    done = subprocess.run(
        command,
        cwd=folder,
        env=harness.environment(PYTHONPATH=os.pathsep.join((str(folder / "site"), source))),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    if done.returncode == 0:
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"r{number}" for number in range(40)]
        assert all(row["success"] for row in rows)
    return done.returncode, done.stderr


def test_one_that_cannot_start_is_started_again(tmp_path: Path) -> None:
    code, said = run(tmp_path, "FirstFails", "--num_workers", "2")
    assert code == 0, said
    assert said.count("died (it could not start") == 1
    assert "device(s) busy" in said
    assert "restarting, 1 of 3. Its log:" in said


@pytest.mark.parametrize("workers", ["1", "3"])
def test_what_all_meet_ends_the_run_at_once(tmp_path: Path, workers: str) -> None:
    code, said = run(tmp_path, "AllFail", "--num_workers", workers)
    assert code == 2, said
    assert "no such model" in said
    assert "The log of worker 0: " in said
    assert "restarting" not in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_dead_worker_that_cannot_load_again_has_more_tries(tmp_path: Path) -> None:
    code, said = run(tmp_path, "DiesAndFails")
    assert code == 0, said
    assert "died (signal SIGKILL); restarting, 1 of 3" in said
    assert "died (it could not start" in said
    assert "out of memory" in said
    assert "restarting, 2 of 3" in said


def test_when_none_is_left_it_says_what_is_kept_and_why(tmp_path: Path) -> None:
    code, said = run(tmp_path, "DiesForGood", "--max_restarts", "2")
    assert code == 1, said
    assert "No worker is left" in said
    assert "The last one said: " in said
    assert "fallen off the bus" in said.rpartition("The last one said: ")[2]
    assert "are finished and on disk" in said
    (tmp_path / "started").unlink()
    code, said = run(tmp_path, "DiesForGood")
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("FirstFails", 0), ("AllFail", 2)])
def test_under_torchrun(tmp_path: Path, name: str, code: int) -> None:
    found, said = run(tmp_path, name, launcher=TORCHRUN)
    assert ("could not start" in said) == (code == 0), said
    assert (found == 0) == (code == 0), said
    if code:
        assert "no such model" in said
        assert "restarting" not in said
