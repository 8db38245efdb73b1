"""The processes behind arms of benchmarks: loaded once, asked in turn, several at a time.

Owns `throughput_arm.py`'s processes and what is asked of them (`Work`), one by one (`ArmProcess`)
or as workers beside each other that share the prefix groups out (`Workers`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ragfleet.engines.protocol import Prepared
from workloads import TokenCounts, WorkloadSpec

ROOT: Final = Path(__file__).resolve().parent.parent
ANSWER_COST: Final = 150
"""Prompt tokens that a further request on a context weighs: its question, its answer."""


@dataclass
class Work:
    """One row's requests, and the orders in which arms take them (indices into `requests`)."""

    requests: list[Prepared]
    orders: dict[str, list[int]]
    counts: TokenCounts
    kv_bytes: int
    max_model_len: int


class ArmEnded(SystemExit):
    """An arm's process ended; its last line. Ends the benchmark where it is not caught."""


class ArmProcess:
    """throughput_arm.py, loaded and waiting. `prefix`: of its files, where there are two."""

    def __init__(
        self, name: str, python: str, settings: dict[str, Any], folder: Path, prefix: str = ""
    ) -> None:
        self.name, self.settings = name, settings
        stem = (prefix + name).replace(" ", "_")
        file = folder / f"{stem}.json"
        file.write_text(json.dumps(settings))
        threads = str(settings["threads"])
        self.log = open(folder / f"{stem}.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "throughput_arm.py"), name, str(file)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_NO_USAGE_STATS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.is_ready = False

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = Path(self.log.name).read_text(errors="replace").splitlines()
            print("\n".join(said[-20:]), file=sys.stderr)
            raise ArmEnded(f"its process ended: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def warm_up(self, work: Work, spec: WorkloadSpec) -> None:
        """Wait until it has loaded; then threads, buffers and kernels built at the first call."""
        if not self.is_ready:
            self.read()
            self.answer(work, spec, work.orders["file"][:3])
            self.is_ready = True

    def answer(self, work: Work, spec: WorkloadSpec, order: Sequence[int]) -> dict[str, Any]:
        self.ask(work, spec, order)
        return self.read()

    def ask(self, work: Work, spec: WorkloadSpec, order: Sequence[int]) -> None:
        assert self.process.stdin is not None
        task = {
            "ids": [list(request.token_ids) for request in work.requests],
            "seeds": [r.request.seed if spec.temperature else None for r in work.requests],
            "order": list(order),
            "temperature": spec.temperature,
        }
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


class Workers:
    """Several processes of one arm, a thread each: the answer of all, the time of the slowest."""

    def __init__(
        self, name: str, python: str, settings: dict[str, Any], folder: Path, count: int
    ) -> None:
        self.settings = settings
        alone = {**settings, "threads": 1}
        self.processes = [
            ArmProcess(name, python, alone, folder, f"worker {number} ") for number in range(count)
        ]

    def warm_up(self, work: Work, spec: WorkloadSpec) -> None:
        for process in self.processes:
            process.warm_up(work, spec)

    def answer(self, work: Work, spec: WorkloadSpec, order: Sequence[int]) -> dict[str, Any]:
        parts = shared_out(work, order, len(self.processes))
        for process, part in zip(self.processes, parts, strict=True):
            process.ask(work, spec, part)
        results = [process.read() for process in self.processes]
        found = {
            place: answer
            for part, result in zip(parts, results, strict=True)
            for place, answer in zip(part, result["answers"], strict=True)
        }
        counts = [result["prefilled"] for result in results]
        return {
            "seconds": max(result["seconds"] for result in results),
            "prefilled": None if None in counts else sum(counts),
            "answers": [found[place] for place in order],
        }

    def close(self) -> None:
        for process in self.processes:
            process.close()


def shared_out(work: Work, order: Sequence[int], count: int) -> list[list[int]]:
    """`order` in `count` parts, its prefix groups whole: the largest to whoever has least."""
    groups: dict[str, list[int]] = {}
    for number in order:
        groups.setdefault(work.requests[number].request.context, []).append(number)
    # What a group costs: its context once, then what each request adds.
    costs = {
        context: max(len(work.requests[n].token_ids) for n in numbers) + ANSWER_COST * len(numbers)
        for context, numbers in groups.items()
    }
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for context in sorted(groups, key=costs.__getitem__, reverse=True):
        least = loads.index(min(loads))
        parts[least].extend(groups[context])
        loads[least] += costs[context]
    return parts


@contextlib.contextmanager
def closing_all(processes: Mapping[str, ArmProcess | Workers]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes.values():
            process.close()
