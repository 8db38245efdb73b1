"""Seeded schedules of faults over the real launcher and workers, and what must hold after each.

    python tests/fault/harness.py --seeds 500     # all of them (make fault SEEDS=500)
    python tests/fault/harness.py --seed 17       # one again, with its story

A schedule is made from its seed alone: how many starts, with how many workers and which engine
class, what happens during each start (kills, freezes, deleted claims and beats) and what is done
to the shards between two starts (cuts at any byte, duplicated, foreign and garbled lines). The last
start is left in peace. Then: the merged output equals that of an uninterrupted run, timings and
worker_rank aside; no row is lost, none doubled; nothing but what was in flight was done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ENGINE = """
import asyncio, os, pathlib, time
from ragfleet import QueryBasedInference

CALLS = pathlib.Path(__file__).with_name("calls")

def asked(query):
    fd = os.open(CALLS, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(fd, (query + "\\n").encode())
    os.close(fd)

class OneByOne(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        asked(f"{query} {context}")
        time.sleep(0.002)
        return f"{context}: {query[::-1]}"

class Together(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        asked(f"{query} {context}")
        await asyncio.sleep(0.006)
        return f"{context}: {query[::-1]}"
"""
NUM_RECORDS = 160
IN_FLIGHT = {"OneByOne": 1, "Together": 8}
UNCOMPARED = ("inference_time", "total_time", "worker_rank")
RUN_LIMIT_S = 120.0


@dataclass
class Fault:
    """One thing that happens, `after` so many finished lines of this start."""

    kind: str
    after: int
    which: int


@dataclass
class Schedule:
    seed: int
    engine: str
    starts: list[tuple[int, list[Fault]]] = field(default_factory=list)
    """(workers, faults) of each start but the last."""
    damages: list[list[str]] = field(default_factory=list)
    """What is done to the shards after each of them."""
    last_workers: int = 2


DURING = (
    "kill_worker",
    "kill_worker",
    "kill_supervisor",
    "kill_all",
    "terminate",
    "freeze",
    "delete_claim",
    "delete_beat",
    "delete_done",
)
BETWEEN = ("cut", "duplicate_line", "foreign_line", "garbage", "delete_launches", "nothing")


def make_schedule(seed: int) -> Schedule:
    draw = random.Random(seed)
    schedule = Schedule(seed, draw.choice(list(IN_FLIGHT)))
    for _ in range(draw.randint(1, 2)):
        faults = [
            Fault(draw.choice(DURING), draw.randint(0, NUM_RECORDS // 3), draw.randrange(1 << 16))
            for _ in range(draw.randint(1, 2))
        ]
        schedule.starts.append((draw.randint(1, 3), faults))
        schedule.damages.append([draw.choice(BETWEEN) for _ in range(draw.randint(0, 2))])
    schedule.last_workers = draw.randint(1, 3)
    return schedule


def write_input(directory: Path) -> None:
    """Groups of four records on one context, some equal, some invalid, some without a context."""
    lines = []
    for number in range(NUM_RECORDS):
        same = number - 4 if number % 16 == 9 else number
        record: dict[str, Any] = {
            "id": f"r{same}",
            "query": f"q{same}",
            "context": f"c{same // 4}",
        }
        if number % 40 == 7:
            record["success"] = False
        lines.append(json.dumps(record))
    lines[33] = '{"id": "r33", "query": "  ", "context": "blank"}'
    lines[77] = '{"id": "r77", broken'
    (directory / "in.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "engine.py").write_text(ENGINE)


def environment(**more: str) -> dict[str, str]:
    """This tree's package, wherever the run's folder is; `more` is for the harness's own tests."""
    source = str(Path(__file__).resolve().parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, **more}


def command(engine: str, workers: int) -> list[str]:
    files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
    how = ["--engine", "echo", "--temperature", "0", "--num_workers", str(workers)]
    # Kills from outside are not the point of --max_restarts here.
    return [
        sys.executable,
        "-m",
        "ragfleet",
        "infer",
        *files,
        *how,
        "--max_restarts",
        "20",
        "--inference_class",
        f"engine.py:{engine}",
    ]


def compared(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in UNCOMPARED} for row in rows]


class Harness:
    """One schedule in a folder of its own. `story` says what was done."""

    def __init__(
        self, schedule: Schedule, directory: Path, environ: dict[str, str] | None = None
    ) -> None:
        self.schedule, self.directory = schedule, directory
        self.environment = environ or environment()
        self.draw = random.Random(~schedule.seed)
        self.story: list[str] = []
        self.allowed_again = 0
        """Requests that were in flight at a kill, at most."""
        self.damaged = 0
        """Finished lines that a damage took away."""

    def run(self, expected: list[dict[str, Any]]) -> list[str]:
        """Everything that does not hold."""
        write_input(self.directory)
        for (workers, faults), damages in zip(
            self.schedule.starts, self.schedule.damages, strict=True
        ):
            self.start(workers, faults)
            for damage in damages:
                self.damage(damage)
        code = self.start(self.schedule.last_workers, [])
        problems = [] if code == 0 else [f"the last start exited {code}"]
        output = self.directory / "out.jsonl"
        if not output.exists():
            return [*problems, "LOST: there is no output"]
        return problems + self.check(compared(output), expected)

    def check(self, rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
        problems = []
        have, want = (Counter(str(row["id"]) for row in part) for part in (rows, expected))
        problems += [f"LOST: {name}" for name in want - have]
        problems += [f"DOUBLED: {name}" for name in have - want]
        if rows != expected and not problems:
            first = next(a for a, b in zip(rows, expected, strict=True) if a != b)
            problems.append(f"WRONG: {first}")
        asked = Counter((self.directory / "calls").read_text().splitlines())
        again = sum(count - 1 for count in asked.values())
        if again > self.allowed_again + self.damaged:
            problems.append(
                f"REDONE: {again} requests, though {self.allowed_again} were in flight at kills"
                f" and {self.damaged} lines were damaged"
            )
        return problems

    # ---- a start and its faults

    def start(self, workers: int, faults: list[Fault]) -> int:
        self.story.append(f"start with {workers} workers of {self.schedule.engine}")
        before = self.num_lines()
        with (self.directory / "said").open("a") as said:
            process = subprocess.Popen(
                command(self.schedule.engine, workers),
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        try:
            for fault in sorted(faults, key=lambda fault: fault.after):
                if not self.reached(process, before + fault.after):
                    break
                self.inflict(fault, process)
            return process.wait(timeout=RUN_LIMIT_S)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()

    def num_lines(self) -> int:
        return sum(
            path.read_bytes().count(b"\n") for path in self.directory.glob("out_rank*.jsonl")
        )

    def reached(self, process: subprocess.Popen[bytes], lines: int) -> bool:
        deadline_s = time.monotonic() + RUN_LIMIT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            if self.num_lines() >= lines:
                return True
            time.sleep(0.002)  # shards grow; there is no event for it
        return False

    def workers_of(self, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        try:
            children = psutil.Process(process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted(children, key=lambda child: child.pid)

    def inflict(self, fault: Fault, process: subprocess.Popen[bytes]) -> None:
        workers = self.workers_of(process)
        in_flight = IN_FLIGHT[self.schedule.engine]
        self.story.append(f"after {fault.after} lines: {fault.kind}")
        actions: dict[str, Callable[[], None]] = {
            "kill_worker": lambda: self.kill_one(workers, fault.which),
            "kill_supervisor": process.kill,
            "kill_all": lambda: self.kill(workers, process),
            "terminate": process.terminate,
            "freeze": lambda: self.freeze(workers, fault.which),
            "delete_claim": lambda: self.delete("claims/*.g*", fault.which),
            "delete_done": lambda: self.delete("claims/*.done", fault.which),
            "delete_beat": lambda: self.delete("beats/*", fault.which),
        }
        actions[fault.kind]()
        if fault.kind == "kill_worker":
            self.allowed_again += in_flight
        elif fault.kind in ("kill_supervisor", "kill_all", "terminate"):
            self.allowed_again += in_flight * max(1, len(workers))
        elif fault.kind in ("delete_claim", "delete_done"):
            # The plan forgot who works on a chunk: its open requests may be asked twice.
            self.allowed_again += NUM_RECORDS // 8

    def kill_one(self, workers: list[psutil.Process], which: int) -> None:
        """The others must go on as the processes they are."""
        if not workers:
            return
        victim = workers[which % len(workers)]
        others = [worker for worker in workers if worker is not victim]
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        for worker in others:
            if not worker.is_running() and self.num_lines() == 0:
                self.story.append(f"worker process {worker.pid} went with it")

    def kill(self, workers: list[psutil.Process], process: subprocess.Popen[bytes]) -> None:
        for victim in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.kill()

    def freeze(self, workers: list[psutil.Process], which: int) -> None:
        if workers:
            victim = workers[which % len(workers)]
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGSTOP)
                time.sleep(0.1)  # frozen for so long; nothing can announce its end
                victim.send_signal(signal.SIGCONT)

    def delete(self, pattern: str, which: int) -> None:
        found = sorted(self.directory.glob(f"out.run/launches/*/{pattern}"))
        if found:
            with contextlib.suppress(FileNotFoundError):
                found[which % len(found)].unlink()

    # ---- damage between starts

    def damage(self, kind: str) -> None:
        self.story.append(f"between starts: {kind}")
        shards = sorted(self.directory.glob("out_rank*.jsonl"))
        full = [path for path in shards if path.stat().st_size]
        if kind == "delete_launches":
            for path in self.directory.glob("out.run/launches/*"):
                path.rename(path.with_name("." + path.name))
        if not full or kind in ("nothing", "delete_launches"):
            return
        path = self.draw.choice(full)
        data = path.read_bytes()
        if kind == "cut":
            keep = self.draw.randint(max(0, len(data) - 1500), len(data))
            self.damaged += data.count(b"\n") - data[:keep].count(b"\n")
            path.write_bytes(data[:keep])
            return
        line = self.draw.choice(data.splitlines(keepends=True))
        extra = {
            "duplicate_line": line,
            "foreign_line": b'{"request_key": "' + b"0" * 32 + b'", "finished_at_ns": 1,'
            b' "success": true, "answer": "foreign", "inference_time": 0.0, "worker_rank": 0}\n',
            "garbage": bytes(self.draw.randrange(256) for _ in range(60)) + b"\n",
        }[kind]
        # A cut line before it swallows it, as it would swallow anything appended to it.
        path.write_bytes(data + extra)


def reference(directory: Path) -> list[dict[str, Any]]:
    """The output of an uninterrupted run."""
    write_input(directory)
    subprocess.run(
        command("OneByOne", 2),
        cwd=directory,
        check=True,
        capture_output=True,
        env=environment(),
    )
    return compared(directory / "out.jsonl")


def run_seed(
    seed: int, expected: list[dict[str, Any]], environ: dict[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """(problems, story) of one schedule."""
    with tempfile.TemporaryDirectory(prefix=f"fault-{seed}-") as directory:
        harness = Harness(make_schedule(seed), Path(directory), environ)
        problems = harness.run(expected)
        if problems:
            said = (Path(directory) / "said").read_text()
            harness.story.append(said[-3000:])
        return problems, harness.story


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="run seeds 0 to N-1")
    parser.add_argument("--seed", type=int, help="run this one and tell its story")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fault-reference-") as directory:
        expected = reference(Path(directory))
    if options.seed is not None:
        problems, story = run_seed(options.seed, expected)
        print("\n".join([*story, *problems, "failed" if problems else "passed"]))
        return bool(problems)
    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed, (problems, _) in enumerate(
            pool.map(lambda seed: run_seed(seed, expected), range(options.seeds))
        ):
            if problems:
                failed += 1
                print(f"seed {seed}: {'; '.join(problems[:3])}", flush=True)
    print(f"{options.seeds - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
