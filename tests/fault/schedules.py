"""What a seed stands for: the starts of a run, what happens during each, what between two.

Also the input that all of them are about, and the engine that answers it.
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENGINE = """
import asyncio, errno, os, pathlib, time
import ragfleet.shards
from ragfleet import QueryBasedInference

HERE = pathlib.Path(__file__).parent
CALLS = HERE / "calls"
now_ns = time.time_ns

class Storage:
    # The os module as the shard's writer sees it; fails in the way that the file `full` names.
    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, row):
        try:
            how = (HERE / "full").read_text()
        except FileNotFoundError:
            return os.write(fd, row)
        if how == "SHORT":
            return os.write(fd, row[: len(row) // 2])
        raise OSError(getattr(errno, how), how)

ragfleet.shards.os = Storage()

def jumping_ns():
    try:
        return now_ns() + int((HERE / "clock").read_text())
    except (OSError, ValueError):
        return now_ns()

time.time_ns = jumping_ns

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
BEAT_TIMEOUT_S = 10.0
SHORT_LIFE_S = 3.0
"""Where a schedule waits for claims to outlive their owner."""
IN_FLIGHT = {"OneByOne": 1, "Together": 8}


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
    torchrun: bool = False
    """The first start is torchrun's, and its agent is killed."""

    @property
    def beat_timeout_s(self) -> float:
        kinds = [fault.kind for _, faults in self.starts for fault in faults]
        return SHORT_LIFE_S if "zombie" in kinds else BEAT_TIMEOUT_S


DURING = (
    "kill_worker",
    "kill_worker",
    "kill_supervisor",
    "kill_all",
    "terminate",
    "freeze",
    "zombie",
    "storage",
    "file_limit",
    "clock",
    "edit_input",
    "second_run",
    "delete_claim",
    "delete_beat",
    "delete_done",
    "delete_plan",
    "delete_run",
)
BETWEEN = (
    "cut",
    "cut",
    "duplicate_line",
    "foreign_line",
    "garbage",
    "delete_launches",
    "edit_input",
    "nothing",
)
STORAGE_ERRORS = ("SHORT", "ENOSPC", "EROFS", "EIO")
KILLS = ("kill_worker", "kill_all", "kill_supervisor", "kill_agent", "storage", "file_limit")
TORCHRUN_EVERY = 25


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
    if seed % TORCHRUN_EVERY == TORCHRUN_EVERY - 1 and importlib.util.find_spec("torch"):
        schedule.torchrun = True
        schedule.starts[0] = (2, [Fault("kill_agent", draw.randint(0, NUM_RECORDS // 3), 0)])
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
