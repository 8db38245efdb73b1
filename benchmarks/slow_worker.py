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
import subprocess
import sys
import tempfile
from pathlib import Path

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


def measure(schedule: str, times: list[float]) -> dict[str, float]:
    """Of one run, in seconds: `makespan_s`; `bound_s`; and what the makespan is made of.

    `bound_s` counts each request as long as it took (a busy machine oversleeps), `waited_s` is the
    time that workers had nothing more to do, `between_s` that between two of their requests, both
    weighted by the workers' speed, so that makespan = bound + waited + between.
    """
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
        spans = {}
        for path in folder.glob("times.*"):
            lines = path.read_text().splitlines()
            spans[int(path.suffix[1:])] = [tuple(map(float, line.split())) for line in lines]
    assert sum(map(len, spans.values())) == len(times)
    begin = min(worker[0][0] for worker in spans.values())
    end = max(worker[-1][1] for worker in spans.values())
    speed = {rank: 1 / SLOW if rank == 0 else 1.0 for rank in spans}
    total = sum(speed.values())
    busy = {rank: sum(stop - start for start, stop in worker) for rank, worker in spans.items()}
    waited = {rank: end - worker[-1][1] for rank, worker in spans.items()}
    return {
        "makespan_s": end - begin,
        "bound_s": sum(speed[rank] * busy[rank] for rank in spans) / total,
        "waited_s": sum(speed[rank] * waited[rank] for rank in spans) / total,
        "between_s": sum(speed[rank] * (end - begin - waited[rank] - busy[rank]) for rank in spans)
        / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    times = service_times(options.records)
    rounds: list[dict[str, dict[str, float]]] = [
        {schedule: measure(schedule, times) for schedule in ("dynamic", "static")}
        for _ in range(options.rounds)
    ]
    ideal_s = sum(times) / (WORKERS - 1 + 1 / SLOW)
    print(f"{options.records} requests, {WORKERS} workers, one {SLOW:g} × slower")
    print(f"bound if sleeps were exact: {ideal_s:.2f} s; medians of {options.rounds}:")
    print(f"{'':<9}{'makespan':>10}{'bound':>10}{'over it':>9}{'waited':>9}{'between':>10}")
    for schedule in ("dynamic", "static"):
        rows = sorted((row[schedule] for row in rounds), key=lambda row: row["makespan_s"])
        row = rows[len(rows) // 2]
        print(
            f"{schedule:<9}{row['makespan_s']:>8.2f} s{row['bound_s']:>8.2f} s"
            f"{row['makespan_s'] / row['bound_s'] - 1:>+9.1%}"
            f"{row['waited_s'] / row['bound_s']:>9.1%}{row['between_s'] / row['bound_s']:>10.1%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"ideal_s": ideal_s, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
