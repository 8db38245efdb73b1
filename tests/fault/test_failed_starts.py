"""Workers that can't start: one ends nobody else's work, and what all meet ends the run at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest

CLASSES = (
    """
import os, pathlib, signal, threading, time
from ragfleet import QueryBasedInference
"""
    + harness.ONCE
    + '''
def until(path):
    while not path.exists():
        time.sleep(0.02)

class Reverses(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        return query[::-1]

class FirstFails(Reverses):
    """The others answer when it is there again, and don't end the run without it."""

    def setup(self):
        if once("failed"):
            raise RuntimeError("CUDA-capable device(s) busy")
        if not once("second"):
            (HERE / "again").touch()

    def generate_answer(self, query, context, retrieval_method):
        until(HERE / "again")
        return super().generate_answer(query, context, retrieval_method)

class AllFail(Reverses):
    def setup(self):
        raise RuntimeError("no such model")

class FailsAndHangs(Reverses):
    def setup(self):
        if once("failed"):
            (HERE / "hangs").write_text(str(os.getpid()))
            threading.Thread(target=time.sleep, args=(600,)).start()
            stay = lambda *_: time.sleep(600)
            os._exit = stay  # as a driver can
            raise RuntimeError("no such device")

class FailsWhileOthersLoad(FirstFails):
    def setup(self):
        if (HERE / "begun").exists() or not once("begun"):
            until(HERE / "go")
        super().setup()

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
)
SITE = """
import ragfleet.launchers.supervisor as supervisor
supervisor.START_AGAIN_S, supervisor._LEAVE_S = 0.1, 1.0
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


def start(
    folder: Path, class_name: str, *flags: str, launcher: list[str] | None = None
) -> subprocess.Popen[bytes]:
    """What is said goes to the file `said`."""
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
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=harness.environment(PYTHONPATH=os.pathsep.join((str(folder / "site"), source))),
            stderr=said,
        )


def finish(folder: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and what was said; rows are checked where there are any."""
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if code == 0:
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"r{number}" for number in range(40)]
        assert all(row["success"] for row in rows)
    return code, (folder / "said").read_text()


def run(folder: Path, class_name: str, *flags: str, **how: Any) -> tuple[int, str]:
    return finish(folder, start(folder, class_name, *flags, **how))


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


def test_one_that_hangs_when_it_could_not_start_is_ended(tmp_path: Path) -> None:
    code, said = run(tmp_path, "FailsAndHangs")
    assert code == 2, said
    assert "no such device" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs").read_text()), 0)


def test_it_is_said_while_others_load(tmp_path: Path) -> None:
    process = start(tmp_path, "FailsWhileOthersLoad", "--num_workers", "2")
    try:
        until_s = time.monotonic() + 30
        while "device(s) busy" not in (tmp_path / "said").read_text():
            assert time.monotonic() < until_s
            time.sleep(0.05)
        said = (tmp_path / "said").read_text()
        assert "). Others still load." in said
        assert "restarting" not in said
    finally:
        (tmp_path / "go").touch()
        code, said = finish(tmp_path, process)
    assert code == 0, said
    assert "restarting, 1 of 3" in said


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
    assert ("died (it could not start" in said) == (code == 0), said
    assert (found == 0) == (code == 0), said
    if code:
        assert "no such model" in said
        assert "restarting" not in said
