"""Seeded schedules of faults over the real launcher and workers, and what must hold after each.

    python tests/fault/harness.py --seeds 500     # all of them (make fault SEEDS=500)
    python tests/fault/harness.py --seed 17       # one again, with its story

A schedule is made from its seed alone: how many starts, with how many workers and which engine
class, what happens during each start (kills, freezes also for longer than a claim lives, storage
that fails, deleted claims, plans and beats, clocks that jump, edits of the input, a second run, and
now and then torchrun instead of our own launcher, whose agent is killed) and what is done between
two starts (cuts at any byte, duplicated, foreign and garbled lines, an edited input). The last
start is left in peace, with the first input. Then: the merged output equals that of an
uninterrupted run to the byte, timings and worker_rank aside; no row is lost, none doubled; nothing
but what was in flight was done again; and nobody died but who was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import file_faults
import psutil
from schedules import (
    BEAT_TIMEOUT_S,
    IN_FLIGHT,
    KILLS,
    NUM_RECORDS,
    SHORT_LIFE_S,
    Fault,
    Schedule,
    make_schedule,
    write_input,
)

LAUNCHER = """
import sys
import ragfleet.beats
ragfleet.beats.BEAT_TIMEOUT_S = float(sys.argv.pop(1))
from ragfleet.cli import main
sys.exit(main())
"""
ONCE = '''
HERE = pathlib.Path(__file__).parent

def once(name):
    """True for the first process that asks."""
    try:
        os.close(os.open(HERE / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
'''
"""For users' classes that tests write: os and pathlib are imported before."""
UNCOMPARED = ("inference_time", "total_time", "worker_rank")
RUN_LIMIT_S = 120.0


def environment(**more: str) -> dict[str, str]:
    """This tree's package, wherever the run's folder is; `more` is for the harness's own tests."""
    source = str(Path(__file__).resolve().parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, **more}


def command(
    engine: str, workers: int, beat_timeout_s: float = BEAT_TIMEOUT_S, torchrun: bool = False
) -> list[str]:
    files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
    how = ["--engine", "echo", "--temperature", "0", "--num_workers", str(workers)]
    start = [sys.executable, "-c", LAUNCHER, str(beat_timeout_s), "infer"]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc_per_node={workers}", "-m", "ragfleet", "infer"]
    return [*start, *files, *how, "--max_restarts", "4", "--inference_class", f"engine.py:{engine}"]


def compared(path: Path) -> list[bytes]:
    """The rows as they stand, without what may differ."""
    what = "|".join(UNCOMPARED).encode()
    return re.sub(rb'"(%b)":[^,}]*' % what, rb'"\1":', path.read_bytes()).splitlines()


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
        self.problems: list[str] = []
        self.num_workers = 0

    def run(self, expected: list[bytes]) -> list[str]:
        """Everything that does not hold."""
        write_input(self.directory)
        for (workers, faults), damages in zip(
            self.schedule.starts, self.schedule.damages, strict=True
        ):
            self.start(workers, faults, torchrun=self.schedule.torchrun and not self.story)
            for damage in damages:
                self.story.append(f"between starts: {damage}")
                self.damaged += file_faults.damage(self.directory, damage, self.draw)
        write_input(self.directory)
        code = self.start(self.schedule.last_workers, [])
        problems = self.problems + ([] if code == 0 else [f"the last start exited {code}"])
        output = self.directory / "out.jsonl"
        if not output.exists():
            return [*problems, "LOST: there is no output"]
        return problems + self.check(compared(output), expected)

    def check(self, rows: list[bytes], expected: list[bytes]) -> list[str]:
        problems = []
        name = re.compile(rb'"id":("[^"]*")').search
        have, want = (
            Counter(found[1].decode() for found in map(name, part) if found)
            for part in (rows, expected)
        )
        problems += [f"LOST: {name}" for name in want - have]
        problems += [f"DOUBLED: {name}" for name in have - want]
        if rows != expected and not problems:
            first = next(a for a, b in zip(rows, expected, strict=True) if a != b)
            problems.append(f"WRONG: {first!r}")
        asked = Counter((self.directory / "calls").read_text().splitlines())
        again = sum(count - 1 for count in asked.values())
        if again > self.allowed_again + self.damaged:
            problems.append(
                f"REDONE: {again} requests, though {self.allowed_again} were in flight at kills"
                f" and {self.damaged} lines were damaged"
            )
        return problems

    # ---- a start and its faults

    def start(self, workers: int, faults: list[Fault], torchrun: bool = False) -> int:
        how = "torchrun" if torchrun else "our launcher"
        self.story.append(f"start with {workers} workers of {self.schedule.engine} by {how}")
        self.num_workers = workers
        before = self.num_lines()
        said_before = self.said()
        with (self.directory / "said").open("a") as said:
            process = subprocess.Popen(
                command(self.schedule.engine, workers, self.schedule.beat_timeout_s, torchrun),
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
            try:
                code = process.wait(timeout=RUN_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.problems.append(f"HUNG: {self.story[-3:]}")
                return -1
            self.check_deaths(self.said()[len(said_before) :], faults)
            return code
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
            for name in ("full", "clock", "during"):
                (self.directory / name).unlink(missing_ok=True)
            if any(fault.kind == "edit_input" for fault in faults):
                write_input(self.directory)

    def said(self) -> str:
        path = self.directory / "said"
        return path.read_text() if path.exists() else ""

    def check_deaths(self, said: str, faults: list[Fault]) -> None:
        """Survivors keep their processes: no worker dies but those that were killed."""
        kinds = [fault.kind for fault in faults]
        if {"delete_plan", "delete_done", "delete_run", "kill_agent"} & set(kinds):
            return  # started anew without a plan to read, or though it had seen all finished
        deaths, kills = said.count(" died ("), sum(kind in KILLS for kind in kinds)
        if deaths > kills and not {"storage", "file_limit"} & set(kinds):
            self.problems.append(f"SURVIVORS: {deaths} workers died, {kills} were killed")

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
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ragfleet.worker_main" in child.cmdline():
                        workers.append(child)
        return sorted(workers, key=lambda worker: worker.pid)

    def inflict(self, fault: Fault, process: subprocess.Popen[bytes]) -> None:
        workers = self.workers_of(process)
        in_flight = IN_FLIGHT[self.schedule.engine]
        self.story.append(f"after {fault.after} lines: {fault.kind}")
        actions: dict[str, Callable[[], None]] = {
            "kill_worker": lambda: self.kill_one(workers, fault.which),
            "kill_supervisor": process.kill,
            "kill_all": lambda: self.kill(workers, process),
            "terminate": process.terminate,
            "kill_agent": lambda: self.kill_agent(process),
            "freeze": lambda: self.freeze(workers, fault.which, 0.1),
            "zombie": lambda: self.freeze(workers, fault.which, SHORT_LIFE_S + 1.5),
            "storage": lambda: self.story.append(
                f"storage: {file_faults.fail_storage(self.directory, fault.which)}"
            ),
            "file_limit": lambda: self.limit_files(workers),
            "clock": lambda: file_faults.set_clock(self.directory, fault.which),
            "edit_input": lambda: file_faults.edit_input(self.directory, fault.which),
            "second_run": self.second_run,
            "delete_plan": lambda: file_faults.delete_plan(self.directory),
            "delete_run": lambda: file_faults.delete_run(self.directory),
            "delete_claim": lambda: file_faults.delete(self.directory, "claims/*.g*", fault.which),
            "delete_done": lambda: file_faults.delete(self.directory, "claims/*.done", fault.which),
            "delete_beat": lambda: file_faults.delete(self.directory, "beats/*", fault.which),
        }
        actions[fault.kind]()
        if fault.kind == "kill_worker":
            self.allowed_again += in_flight
        elif fault.kind in ("zombie", "second_run"):
            # Its claims went to others, who did again what stood in no shard yet.
            self.allowed_again += NUM_RECORDS // 4
        elif fault.kind not in ("freeze", "clock", "delete_beat", "delete_claim", "delete_done"):
            # Of all that this start has: some may only be coming up when it strikes.
            self.allowed_again += in_flight * self.num_workers
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

    def kill_agent(self, process: subprocess.Popen[bytes]) -> None:
        """torchrun itself; nobody tells its ranks."""
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=30.0)
        left = [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
        if left:
            self.problems.append(f"LEFT: {left}")

    def freeze(self, workers: list[psutil.Process], which: int, seconds: float) -> None:
        if workers:
            victim = workers[which % len(workers)]
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGSTOP)
                time.sleep(seconds)  # frozen for so long; nothing can announce its end
                victim.send_signal(signal.SIGCONT)

    def limit_files(self, workers: list[psutil.Process]) -> None:
        """Shards may grow a little more; the kernel cuts the line that goes over."""
        sizes = [path.stat().st_size for path in self.directory.glob("out_rank*.jsonl")]
        limit = max([*sizes, 8192]) + 700
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.rlimit(psutil.RLIMIT_FSIZE, (limit, limit))

    def second_run(self) -> None:
        second = subprocess.run(
            command(self.schedule.engine, 1, self.schedule.beat_timeout_s),
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
        )
        refused = second.returncode == 2 and "is being written by" in second.stderr
        if not refused and second.returncode != 0:  # 0: the first one ended meanwhile
            self.problems.append(f"SECOND: {second.returncode}: {second.stderr[-500:]}")


def reference(directory: Path) -> list[bytes]:
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
    seed: int, expected: list[bytes], environ: dict[str, str] | None = None
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
    parser.add_argument("--seeds", type=int, default=20, help="run so many seeds")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
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
    seeds = range(options.first, options.first + options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed, (problems, _) in zip(
            seeds, pool.map(lambda seed: run_seed(seed, expected), seeds), strict=True
        ):
            if (seed + 1) % 50 == 0:
                print(f"up to seed {seed}: {failed} failed", flush=True)
            if problems:
                failed += 1
                print(f"seed {seed}: {'; '.join(problems[:3])}", flush=True)
    print(f"{options.seeds - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
