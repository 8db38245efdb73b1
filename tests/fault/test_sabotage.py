"""Runs whose worker, machine or user does the worst: each ends, whole, and leaves nobody behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest

CLASSES = (
    """
import asyncio, ctypes, os, pathlib, signal, threading, time
from ragfleet import QueryBasedInference
from ragfleet.engines.query_engines import QueryBasedEngine, SyncEngine
from ragfleet.errors import EngineDead
"""
    + harness.ONCE
    + '''
class PoisonedPrompt(QueryBasedInference):
    def setup(self):
        plain = QueryBasedEngine.prepare

        def prepare(self, request):
            if request.query == "q37":
                os.abort()
            return plain(self, request)

        QueryBasedEngine.prepare = prepare

    async def generate_answer(self, query, context, retrieval_method):
        await asyncio.sleep(0.002)
        return query[::-1]

def forget_the_environment():
    """As setproctitle does: what /proc shows is this memory."""
    stat = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[47]), int(stat[48])
    ctypes.memset(start, 0, end - start)

class Escapes(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query == "q5" and once("escaped"):
            if os.fork() == 0:
                os.setsid()
                forget_the_environment()
                (HERE / "escapee").write_text(str(os.getpid()))
                time.sleep(300)
            while not (HERE / "escapee").exists():
                time.sleep(0.01)
            os._exit(3)
        return query[::-1]

class Freezes(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        time.sleep(0.02)
        if query == "q5" and once("frozen"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return query[::-1]

class Slow(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        time.sleep(0.02)
        return query[::-1]

class Waits(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        (HERE / "waiting").touch()
        while not (HERE / "gate").exists():
            time.sleep(0.02)
        return query[::-1]

class Lingers(QueryBasedInference):
    def setup(self):
        threading.Thread(target=time.sleep, args=(300,)).start()
        plain = SyncEngine.step

        def step(self, timeout_s):
            if self._waiting is not None and self._waiting.request.query == "q5" and once("died"):
                raise EngineDead("gone")
            return plain(self, timeout_s)

        SyncEngine.step = step

    def generate_answer(self, query, context, retrieval_method):
        return query[::-1]

class Reluctant(QueryBasedInference):
    def setup(self):
        self.refusals = 3
        plain = SyncEngine.has_room

        def has_room(engine, prepared):
            self.refusals -= 1
            return self.refusals < 0 and plain(engine, prepared)

        SyncEngine.has_room = has_room

    def generate_answer(self, query, context, retrieval_method):
        return query[::-1]

class LoadsForever(QueryBasedInference):
    def setup(self):
        (HERE / "loading").touch()
        time.sleep(300)
'''
)

# As sitecustomize.py: a worker that hangs in a driver does not even die by SIGKILL.
UNKILLABLE = """
import ragfleet.launchers.process as process
import ragfleet.launchers.supervisor as supervisor
process.kill_group = lambda pid: None
supervisor.DRAIN_S = supervisor.DEATH_S = process.DEATH_S = 1.0
"""


def until(condition: Callable[[], Any], limit_s: float = 40.0) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return found


class Run:
    """A folder, and runs over `count` records in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[psutil.Process] = []
        (folder / "mine.py").write_text(CLASSES)

    def start(self, count: int, name: str, *flags: str, **how: Any) -> subprocess.Popen[str]:
        self.count = count
        with (self.folder / "in.jsonl").open("w") as file:
            for number in range(count):
                record = {"id": f"r{number}", "query": f"q{number}", "context": f"c{number // 4}"}
                file.write(json.dumps(record) + "\n")
        beat_timeout_s = str(how.pop("beat_timeout_s", 10.0))
        command = [sys.executable, "-c", harness.LAUNCHER, beat_timeout_s, "infer"]
        command += ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl", "--engine", "echo"]
        command += ["--temperature", "0", "--inference_class", f"mine.py:{name}", *flags]
        with (self.folder / "said").open("w") as said:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=harness.environment(**how.pop("environ", {})),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                text=True,
                start_new_session=True,
                **how,
            )
        self.started.append(psutil.Process(process.pid))
        return process

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def finish(self, process: subprocess.Popen[str], code: int = 0, limit_s: float = 40.0) -> None:
        assert process.wait(timeout=limit_s) == code, self.said
        assert "Traceback" not in self.said

    def worker(self, process: subprocess.Popen[str]) -> psutil.Process:
        def find() -> psutil.Process | None:
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ragfleet.worker_main" in child.cmdline():
                        return child
            return None

        worker: psutil.Process = until(find)
        self.started.append(worker)
        return worker

    def broken(self, text: str) -> dict[str, str]:
        """Environment in which every process of a run starts with this text."""
        (self.folder / "site").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(text)
        source = harness.environment()["PYTHONPATH"]
        return {"PYTHONPATH": os.pathsep.join((str(self.folder / "site"), source))}

    def num_finished(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("out_rank*"))

    def rows(self) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "out.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"r{number}" for number in range(self.count)]
        return rows

    def check(self) -> None:
        assert [row["answer"] for row in self.rows()] == [f"q{n}"[::-1] for n in range(self.count)]

    def end(self) -> None:
        """Whatever a failed test left; only what was started here."""
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.end()


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


# ---- workers


def test_a_record_that_kills_while_it_is_prepared_is_found(run: Run) -> None:
    """A tokenizer or a user's create_prompt can crash as well as the model can."""
    run.finish(run.start(60, "PoisonedPrompt", "--batch_size", "8", "--max_restarts", "2"))
    failures = [row for row in run.rows() if not row["success"]]
    assert [(row["id"], row["error_type"]) for row in failures] == [("r37", "poison")]


def test_an_escaped_child_neither_holds_up_the_run_nor_outlives_it(run: Run) -> None:
    """It left group and session, forgot its environment and kept every open file of its parent."""
    process = run.start(20, "Escapes")
    try:
        run.finish(process)
    finally:
        escapee = int((run.folder / "escapee").read_text())
        escaped = not is_gone(escapee)
        if escaped:
            os.kill(escapee, signal.SIGKILL)
    assert not escaped
    run.check()


def test_a_worker_that_no_signal_ends_is_left_behind(run: Run) -> None:
    """It hangs in the kernel, as with a broken GPU: others finish its work, and the run ends."""
    environ = run.broken(UNKILLABLE)
    process = run.start(60, "Freezes", "--num_workers", "2", environ=environ, beat_timeout_s=2.0)
    run.worker(process)
    run.finish(process)
    run.check()
    assert "can't be ended" in run.said


def test_a_mark_of_what_is_finished_that_was_deleted_comes_back(run: Run) -> None:
    """Only its worker knows; without it nobody would say that all is finished."""
    process = run.start(60, "Slow")
    marks = run.folder.glob
    until(lambda: list(marks("out.run/launches/*/claims/*.done")))
    next(marks("out.run/launches/*/claims/*.done")).unlink()
    run.finish(process)
    run.check()
    assert "died" not in run.said


def test_a_dead_engine_is_replaced_though_a_thread_lingers(run: Run) -> None:
    """Python waits for threads before it exits; nobody else should have to."""
    run.finish(run.start(20, "Lingers", "--stall_timeout_s", "3"))
    run.check()
    assert "died (exit code 1); restarting" in run.said
    assert "makes no progress" not in run.said


def test_an_engine_without_room_for_the_first_request_is_asked_again(run: Run) -> None:
    """It may be busy with what an earlier start sent; nobody else's claim changes that."""
    run.finish(run.start(1, "Reluctant"))
    run.check()


# ---- the machine


def test_a_suspended_job_goes_on_where_it_stood(run: Run) -> None:
    """`scontrol suspend` and `docker pause` stop everything; silence means nothing then."""
    environ = run.broken("import ragfleet.launchers.liveness as it\nit.GRACE_S = 0.5\n")
    limits = ("--stall_timeout_s", "3", "--request_timeout_s", "3")
    process = run.start(4, "Waits", *limits, environ=environ)
    until((run.folder / "waiting").exists)
    worker = run.worker(process)
    supervisor = psutil.Process(process.pid)
    worker.suspend()
    supervisor.suspend()
    time.sleep(5.5)  # longer than both limits and their grace
    supervisor.resume()
    time.sleep(0.7)  # it looks around before the worker can say a word
    worker.resume()
    (run.folder / "gate").touch()
    run.finish(process)
    run.check()
    assert "restarted" not in run.said


def test_a_run_folder_removed_under_a_run_stops_it(run: Run) -> None:
    process = run.start(300, "Slow")
    until(lambda: run.num_finished() >= 5)
    shutil.rmtree(run.folder / "out.run")
    run.finish(process, code=1)
    assert "Go on with:" in run.said
    run.finish(run.start(60, "Slow"))
    run.check()


def test_a_parent_that_ignores_its_children_passes_that_on(run: Run) -> None:
    """SIGCHLD ignored, as some daemons leave it: the kernel then reaps for us."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    process = run.start(60, "Slow", preexec_fn=ignore)
    until(lambda: run.num_finished() >= 5)
    run.worker(process).kill()
    run.finish(process)
    run.check()
    assert "died (signal SIGKILL); restarting" in run.said


# ---- the user


def test_an_interrupt_does_not_wait_for_a_model_to_load(run: Run) -> None:
    process = run.start(5, "LoadsForever")
    until((run.folder / "loading").exists)
    process.send_signal(signal.SIGINT)
    run.finish(process, code=130, limit_s=12.0)
    assert "0 of 5 requests are finished" in run.said
