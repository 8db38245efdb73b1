"""Processes that die, freeze or are told to stop: no row lost, none doubled, none done again.

The engine is a user's class that takes a few milliseconds for each record, writes down that it was
asked, and answers with a function of the query. So every moment is the middle of something, and it
shows whether anything was asked twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

CLASSES = """
import asyncio, os, pathlib, subprocess, time
from ragfleet import QueryBasedInference

HERE = pathlib.Path(__file__).parent

def write_down(query):
    fd = os.open(HERE / "calls", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(fd, (query + "\\\\n").encode())
    os.close(fd)

class Slow(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        write_down(query)
        time.sleep(0.012)
        return query[::-1]

class SlowAsync(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        write_down(query)
        await asyncio.sleep(0.03)
        return query[::-1]

class Gated(Slow):
    def generate_answer(self, query, context, retrieval_method):
        if query != "q0":
            (HERE / "waiting").touch()
        while query != "q0" and not (HERE / "gate").exists():
            time.sleep(0.01)
        return super().generate_answer(query, context, retrieval_method)

class Parent(Slow):
    def setup(self):
        child = subprocess.Popen(["sleep", "300"])
        (HERE / f"child.{child.pid}").touch()

class Forks(Slow):
    def setup(self):
        if os.fork() == 0:  # holds whatever the worker holds: the lock, a GPU
            os.setsid()
            time.sleep(300)
            os._exit(0)

class NeverStarts(QueryBasedInference):
    def setup(self):
        os.abort()

class LeavesOnce(Slow):
    def generate_answer(self, query, context, retrieval_method):
        if query == "q7" and not (HERE / "left").exists():
            (HERE / "left").touch()
            os._exit(0)
        return super().generate_answer(query, context, retrieval_method)

class Broken(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if not (HERE / "mended").exists():
            raise ConnectionRefusedError("the service is down")
        return query[::-1]
"""


def until(condition: Callable[[], Any], what: str, limit_s: float = 40.0) -> Any:
    """Wait for a condition; what it returned."""
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"waited {limit_s} s for {what}"
        time.sleep(0.005)
    return found


class Fleet:
    """A contexts file of `num_records`, a class, and whatever is started over them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_records = 0
        self.class_name = "Slow"
        self.started: list[psutil.Process] = []
        self.commands: list[subprocess.Popen[str]] = []
        (directory / "mine.py").write_text(CLASSES.replace("\\\\n", "\\n"))

    def records(self, count: int, class_name: str) -> None:
        self.num_records, self.class_name = count, class_name
        with (self.directory / "in.jsonl").open("w") as file:
            for number in range(count):
                record = {"id": f"r{number}", "query": f"q{number}", "context": f"c{number // 4}"}
                file.write(json.dumps(record) + "\n")

    # ---- processes

    def arguments(self, *flags: str) -> list[str]:
        files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
        engine = ["--engine", "echo", "--temperature", "0"]
        return [*files, *engine, "--inference_class", f"mine.py:{self.class_name}", *flags]

    def start(self, *flags: str, **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ragfleet", "infer", *self.arguments(*flags)]
        return self.start_command(command, **how)

    def start_command(self, command: list[str], **how: Any) -> subprocess.Popen[str]:
        """Output goes to files, so that nobody has to read it for the run to go on."""
        with (self.directory / "output").open("w") as out, (self.directory / "said").open("w") as e:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=e,
                text=True,
                start_new_session=True,
                **how,
            )
        self.started.append(psutil.Process(process.pid))
        self.commands.append(process)
        return process

    @property
    def said(self) -> str:
        return (self.directory / "said").read_text()

    def finish(self, process: subprocess.Popen[str], exit_code: int = 0) -> None:
        assert process.wait(timeout=60) == exit_code, self.said
        assert "Traceback" not in self.said

    def workers(self, process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
        """Worker processes by rank, directly or below torchrun's ranks."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                    command = child.cmdline()
                    place = command.index("ragfleet.worker_main")
                    found[int(command[place + 2])] = child
                    self.started.append(child)
        return found

    def end(self) -> None:
        """Whatever a failed test left; only what was started here."""
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()
        for command in self.commands:
            command.wait(timeout=10)

    def patched(self, module: str, **values: float) -> dict[str, str]:
        """Environment of a run that waits less, where nothing but the waiting depends on it."""
        (self.directory / "site").mkdir()
        lines = [f"import ragfleet.{module} as module"]
        lines += [f"module.{name} = {value}" for name, value in values.items()]
        (self.directory / "site" / "sitecustomize.py").write_text("\n".join(lines))
        source = str(Path(__file__).resolve().parents[2] / "src")
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(self.directory / "site"), source)),
        }

    # ---- files

    def shard_lines(self) -> list[dict[str, Any]]:
        """Whole lines of all shards; one that was being written by a killed worker is not one."""
        lines = []
        for path in self.directory.glob("out_rank*.jsonl"):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return lines

    def num_finished(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.directory.glob("out_rank*"))

    def wait_for(self, num_finished: int) -> None:
        until(lambda: self.num_finished() >= num_finished, f"{num_finished} finished: {self.said}")

    def calls(self) -> Counter[str]:
        path = self.directory / "calls"
        return Counter(path.read_text().splitlines() if path.exists() else [])

    def check(self, dropped: int) -> None:
        """All rows, once, in order; at most `dropped` requests were asked a second time."""
        text = (self.directory / "out.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["id"] for row in rows] == [f"r{n}" for n in range(self.num_records)]
        assert [row["answer"] for row in rows] == [f"q{n}"[::-1] for n in range(self.num_records)]
        keys = Counter(line["request_key"] for line in self.shard_lines())
        assert len(keys) == self.num_records
        assert set(keys.values()) == {1}, "something finished was generated again"
        calls = self.calls()
        assert len(calls) == self.num_records
        assert calls.total() <= self.num_records + dropped


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.end()


def all_gone(processes: list[psutil.Process], limit_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=limit_s)
    zombie = psutil.STATUS_ZOMBIE  # its parent is gone; somebody else has yet to reap it
    assert [p for p in alive if p.is_running() and p.status() != zombie] == []


# ------------------------------------------------------------------ one worker


def test_one_worker_killed_again_and_again(fleet: Fleet) -> None:
    """The survivor keeps its process, and only what was in flight is asked again."""
    fleet.records(200, "Slow")
    chance = random.Random(1)
    process = fleet.start("--num_workers", "2", "--max_restarts", "9")
    for number in range(3):
        fleet.wait_for(40 * number + chance.randrange(10, 40))
        workers = until(lambda: found if len(found := fleet.workers(process)) == 2 else None, "two")
        victim = chance.randrange(2)
        workers[victim].send_signal(signal.SIGKILL)
        all_gone([workers[victim]], 5.0)
        after = until(lambda: found if len(found := fleet.workers(process)) == 2 else None, "two")
        assert after[1 - victim].pid == workers[1 - victim].pid
        assert after[victim].pid != workers[victim].pid
    fleet.finish(process)
    fleet.check(dropped=3)
    assert fleet.said.count("died (signal SIGKILL); restarting") == 3


def test_a_worker_of_many_requests_at_once_killed(fleet: Fleet) -> None:
    fleet.records(150, "SlowAsync")
    process = fleet.start("--num_workers", "2", "--batch_size", "4")
    fleet.wait_for(30)
    fleet.workers(process)[1].send_signal(signal.SIGKILL)
    fleet.finish(process)
    fleet.check(dropped=4)


def test_a_worker_that_leaves_early_is_started_again(fleet: Fleet) -> None:
    """Also one that says all is well: exit code 0, with work left."""
    fleet.records(20, "LeavesOnce")
    fleet.finish(fleet.start())
    fleet.check(dropped=0)
    assert "worker 0 died (exit code 0); restarting" in fleet.said


def test_children_of_a_worker_end_with_it(fleet: Fleet) -> None:
    fleet.records(100, "Parent")
    process = fleet.start()
    fleet.wait_for(3)
    (first,) = (int(path.suffix[1:]) for path in fleet.directory.glob("child.*"))
    child = psutil.Process(first)
    fleet.started.append(child)
    fleet.workers(process)[0].send_signal(signal.SIGKILL)
    all_gone([child], 5.0)
    fleet.finish(process)
    fleet.check(dropped=1)
    children = [int(path.suffix[1:]) for path in fleet.directory.glob("child.*")]
    assert len(children) == 2
    until(lambda: not any(map(psutil.pid_exists, children)), "the second child to end", 5.0)


def test_a_worker_that_dies_at_every_start_is_given_up(fleet: Fleet) -> None:
    fleet.records(5, "NeverStarts")
    fleet.finish(fleet.start("--max_restarts", "1"), exit_code=1)
    assert "worker 0 died (signal SIGABRT); restarting, 1 of 1" in fleet.said
    found = re.search(r"is given up\. Its log: (.*)", fleet.said)
    assert found
    assert "Fatal Python error: Aborted" in Path(found[1]).read_text()
    assert "No worker is left" in fleet.said
    assert "0 of 5 requests are finished and on disk, 5 remain" in fleet.said


def test_the_first_requests_all_failing_stop_the_run(fleet: Fleet) -> None:
    """A mistake in the set-up is not a thousand failure rows; mended, nothing of it remains."""
    fleet.records(100, "Broken")
    fleet.finish(fleet.start("--max_retries", "0"), exit_code=1)
    assert "The first 32 requests all failed and none succeeded" in fleet.said
    assert "the service is down" in fleet.said
    assert fleet.shard_lines() == []
    assert not (fleet.directory / "out.jsonl").exists()
    (fleet.directory / "mended").touch()
    fleet.finish(fleet.start("--max_retries", "0"))
    assert len(fleet.shard_lines()) == 100


# ------------------------------------------------------------------ everything


@pytest.mark.parametrize("how", ["supervisor", "all at once"])
def test_everything_killed_and_started_again(fleet: Fleet, how: str) -> None:
    """At moments drawn by lot; then the same command, and one with other workers."""
    fleet.records(120, "Slow")
    chance = random.Random(how)
    dropped = 0
    for number, num_workers in enumerate((2, 3)):
        process = fleet.start("--num_workers", str(num_workers))
        fleet.wait_for(45 * number + chance.randrange(5, 45))
        workers = fleet.workers(process)
        if how == "all at once":
            for worker in workers.values():
                worker.send_signal(signal.SIGKILL)
        process.kill()
        process.wait(timeout=10)
        all_gone(list(workers.values()), 5.0)
        dropped += num_workers
        assert not (fleet.directory / "out.jsonl").exists()
    fleet.finish(fleet.start("--num_workers", "1"))
    fleet.check(dropped)


def test_what_a_killed_supervisor_left_behind_is_ended_by_the_next(fleet: Fleet) -> None:
    """A fork in a session of its own: nobody kills it with its group, and it holds the lock."""
    fleet.records(80, "Forks")
    process = fleet.start()
    fleet.wait_for(10)
    (worker,) = psutil.Process(process.pid).children()  # a fork has its command line, too
    (orphan,) = (child for child in worker.children() if child.cmdline() == worker.cmdline())
    fleet.started.append(orphan)
    process.kill()
    process.wait(timeout=10)
    all_gone([worker], 5.0)
    assert orphan.is_running()
    fleet.finish(fleet.start())
    all_gone([orphan], 1.0)
    assert f"was killed: process {orphan.pid}." in fleet.said
    fleet.check(dropped=1)


def test_torchrun_killed(fleet: Fleet) -> None:
    """Nobody tells its ranks; they notice, end their workers, and another start completes."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here")
    fleet.records(150, "Slow")
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--standalone", "--nproc_per_node=2", "-m", "ragfleet", "infer"]
    process = fleet.start_command([*command, *fleet.arguments()])
    fleet.wait_for(20)
    family = psutil.Process(process.pid).children(recursive=True)
    fleet.started += family
    assert len(fleet.workers(process)) == 2
    process.kill()
    process.wait(timeout=10)
    all_gone(family, 15.0)
    fleet.finish(fleet.start())
    fleet.check(dropped=2)


def test_a_second_run_on_the_same_output_is_refused(fleet: Fleet) -> None:
    fleet.records(20, "Gated")
    first = fleet.start("--schedule", "static")
    fleet.wait_for(1)
    second = fleet.start("--num_workers", "2", env=fleet.patched("run_lock", _WAIT_S=0.5))
    fleet.finish(second, exit_code=2)
    assert re.search(rf"out\.jsonl is being written by pid {first.pid} on", fleet.said)
    assert "ragfleet status --output_file" in fleet.said
    (fleet.directory / "gate").touch()
    assert first.wait(timeout=30) == 0
    fleet.check(dropped=0)


# ------------------------------------------------------------------ signals


def test_each_signal_drains_and_the_printed_command_completes(fleet: Fleet) -> None:
    """One run, stopped by each of them in turn and gone on with by what it printed."""
    fleet.records(160, "Slow")
    process = fleet.start("--num_workers", "2")
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = signal.Signals[name]
        fleet.wait_for(fleet.num_finished() + 8)
        workers = list(fleet.workers(process).values())
        if name == "SIGINT":
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        fleet.finish(process, exit_code=128 + number)
        all_gone(workers, 1.0)
        finished = fleet.num_finished()
        assert fleet.calls().total() == finished, "what was in flight had time to finish"
        assert f"{name}: no new requests" in fleet.said
        assert f"{finished} of 160 requests are finished and on disk" in fleet.said
        found = re.search(r"^Go on with:\n  ragfleet (.*)$", fleet.said, re.MULTILINE)
        assert found, fleet.said
        assert not (fleet.directory / "out.jsonl").exists()
        command = [sys.executable, "-m", "ragfleet", *shlex.split(found[1])]
        process = fleet.start_command(command)
    fleet.finish(process)
    fleet.check(dropped=0)


def test_a_signal_that_comes_again_drops_what_is_in_flight(fleet: Fleet) -> None:
    """A request that never ends does not keep the run from ending."""
    fleet.records(20, "Gated")
    process = fleet.start("--schedule", "static")
    fleet.wait_for(1)
    until((fleet.directory / "waiting").exists, "the request that never ends")
    (worker,) = fleet.workers(process).values()

    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2.5)  # one Ctrl-C waits for the request, and two at once are one
    process.send_signal(signal.SIGINT)
    fleet.finish(process, exit_code=130)
    all_gone([worker], 1.0)
    assert "1 of 20 requests are finished and on disk" in fleet.said


def test_nohup_is_respected(fleet: Fleet) -> None:
    fleet.records(60, "Slow")

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = fleet.start(preexec_fn=ignore)
    fleet.wait_for(5)
    os.killpg(process.pid, signal.SIGHUP)
    fleet.finish(process)
    fleet.check(dropped=0)
    assert "SIGHUP" not in fleet.said


# ------------------------------------------------------------------ frozen


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_stopped_worker_doubles_nothing(fleet: Fleet, comes_back: bool) -> None:
    """Others take over its chunks when its beat is old; a frozen one is ended at last."""
    fleet.records(60, "Slow")
    process = fleet.start("--num_workers", "2")
    fleet.wait_for(10)
    zombie = fleet.workers(process)[1]
    zombie.suspend()

    def all_answered() -> bool:
        return len({line["request_key"] for line in fleet.shard_lines()}) == 60

    until(all_answered, "the other worker to take over", 40.0)
    if comes_back:
        zombie.resume()
    fleet.finish(process)
    rows = [json.loads(line) for line in (fleet.directory / "out.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"q{n}"[::-1] for n in range(60)]
    # The request that it held when it was stopped, and the one it had claimed to send next, may
    # stand in both shards.
    assert len(fleet.shard_lines()) <= 62
    assert fleet.calls().total() <= 62
    all_gone([zombie], 1.0)
