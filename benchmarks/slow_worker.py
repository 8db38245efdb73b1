"""One worker five times slower than the other three: dynamic and static schedules, side by side.

    python benchmarks/slow_worker.py [--records 1600] [--rounds 3] [--json FILE]

Real launcher, workers, claims and stealing; only the answers are simulated, by a class that sleeps
as long as a request would take (uneven, deterministic lengths). The bound: all of that, spread over
all the speed there is. Counted from the first request to the last answer, by the workers' clock, so
that loading and merging, which no schedule changes, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "src"
ENGINE = """
import os, pathlib, sys, time
from ragfleet import QueryBasedInference

HERE = pathlib.Path(__file__).parent
RANK = int(sys.argv[2])

class Simulated(QueryBasedInference):
    def setup(self):
        # All begin together, as workers that loaded equally long do.
        (HERE / f"ready.{RANK}").touch()
        while len(list(HERE.glob("ready.*"))) < 4:
            time.sleep(0.005)
        self.log = open(HERE / f"times.{RANK}", "a", buffering=1)

    def generate_answer(self, query, context, retrieval_method):
        started = time.time()
        time.sleep(float(query) * (5 if RANK == 0 else 1))
        self.log.write(f"{started} {time.time()}\\n")
        return query
"""
SLOW, WORKERS = 5.0, 4


def service_times(count: int) -> list[float]:
    """Seconds of each request at full speed: uneven, the same in every run."""
    return [0.010 + 0.040 * ((number * 2654435761) % 997) / 997 for number in range(count)]


def makespan_s(schedule: str, times: list[float]) -> float:
    with tempfile.TemporaryDirectory(prefix="slow-worker-") as name:
        folder = Path(name)
        (folder / "engine.py").write_text(ENGINE)
        with (folder / "in.jsonl").open("w") as file:
            for number, seconds in enumerate(times):
                record = {"id": number, "query": f"{seconds:.6f}", "context": str(number)}
                file.write(json.dumps(record) + "\n")
        files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
        how = ["--engine", "echo", "--temperature", "0", "--dedup", "off"]
        how += ["--num_workers", str(WORKERS), "--schedule", schedule]
        how += ["--inference_class", "engine.py:Simulated"]
        subprocess.run(
            [sys.executable, "-m", "ragfleet", "infer", *files, *how],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            check=True,
            capture_output=True,
        )
        spans = [
            tuple(map(float, line.split()))
            for path in folder.glob("times.*")
            for line in path.read_text().splitlines()
        ]
        assert len(spans) == len(times)
        return max(end for _, end in spans) - min(start for start, _ in spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    times = service_times(options.records)
    bound_s = sum(times) / (WORKERS - 1 + 1 / SLOW)
    rounds: list[dict[str, Any]] = [
        {schedule: makespan_s(schedule, times) for schedule in ("dynamic", "static")}
        for _ in range(options.rounds)
    ]
    print(f"{options.records} requests, {WORKERS} workers, one {SLOW:g} × slower")
    print(f"bound    {bound_s:6.2f} s")
    for schedule in ("dynamic", "static"):
        seconds = statistics.median(row[schedule] for row in rounds)
        print(f"{schedule:<8} {seconds:6.2f} s, {seconds / bound_s - 1:+.1%} over the bound")
    if options.json:
        options.json.write_text(json.dumps({"bound_s": bound_s, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
