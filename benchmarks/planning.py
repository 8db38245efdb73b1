"""What planning costs: `ragfleet plan` on a large file, and the pure planner on synthetic rows.

    python benchmarks/planning.py [--records 1000000] [--rows 10000000] [--json FILE]

1. A contexts file of `--records` records of about 2 KB, eight a context, anywhere in the file;
   `ragfleet plan` on one core: records/s and the peak memory of the process, end to end, beside the
   least that any planner must do (read the file, parse query and context of each line with msgspec
   into a struct, hash them), in a process of its own on the same core. Arms alternate; medians.
2. `--rows` index rows made up with Zipf-shared contexts, planned in memory for 8 workers: seconds
   of telling duplicates apart, grouping, cutting, LPT.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from overhead import ROOT, environment, environment_facts, write_workload

LEAST: Final = """
import sys
import msgspec, xxhash
class Question(msgspec.Struct):
    query: str
    context: str
decode = msgspec.json.Decoder(Question).decode
keys = []
with open(sys.argv[1], "rb", buffering=1 << 20) as file:
    for line in file:
        question = decode(line)
        keys.append(xxhash.xxh3_128_digest(question.query.encode() + question.context.encode()))
print(len(keys))
"""


@dataclass
class Measured:
    """One process."""

    wall_s: float
    cpu_s: float
    max_rss_mb: float
    output: str


def measure(command: list[str]) -> Measured:
    """Run to the end, pinned to one core."""
    core = min(os.sched_getaffinity(0))
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            cwd=ROOT,
            env={**environment(), "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{text}")
    return Measured(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def plan_file(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ragfleet-planning-") as name:
        contexts = Path(name) / "contexts.jsonl"
        write_workload(contexts, args.records, args.record_bytes, args.records_per_context)
        size_gb = contexts.stat().st_size / 1e9
        plan = [sys.executable, "-m", "ragfleet", "plan", "--contexts_file", str(contexts)]
        plan += ["--output_file", str(Path(name) / "out.jsonl"), "--temperature", "0"]
        arms = {
            "ragfleet plan, no tokenizer": [*plan, "--engine", "echo", "--num_workers", "8"],
            "ragfleet plan": [*plan, "--model_path", "pocket", "--num_workers", "8"],
            "read, parse and hash alone": [sys.executable, "-c", LEAST, str(contexts)],
        }
        runs: dict[str, list[Measured]] = {arm: [] for arm in arms}
        for number in range(args.rounds):
            for arm, command in arms.items():
                runs[arm].append(measure(command))
            walls = ", ".join(f"{arm} {found[-1].wall_s:.1f} s" for arm, found in runs.items())
            print(f"round {number + 1}: {walls}", flush=True)
    print(f"\n{args.records:,} records, {size_gb:.1f} GB, one core")
    print(f"{'':<30}{'records/s':>11}{'a CPU s':>10}{'wall s':>9}{'CPU s':>8}{'max MB':>8}")
    report: dict[str, Any] = {}
    for arm, found in runs.items():
        wall_s = statistics.median(run.wall_s for run in found)
        cpu_s = statistics.median(run.cpu_s for run in found)
        peak = max(run.max_rss_mb for run in found)
        report[arm] = {
            "records_per_s": args.records / wall_s,
            "records_per_cpu_s": args.records / cpu_s,
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "max_rss_mb": peak,
            "rounds_wall_s": [run.wall_s for run in found],
        }
        print(
            f"{arm:<30}{args.records / wall_s:>11,.0f}{args.records / cpu_s:>10,.0f}{wall_s:>9.1f}"
            f"{cpu_s:>8.1f}{peak:>8.0f}"
        )
    report["output"] = runs["ragfleet plan"][-1].output
    return report


def plan_rows(num_rows: int, num_workers: int) -> dict[str, float]:
    """The pure planner alone, in this process."""
    import numpy as np

    from ragfleet.index import RECORD
    from ragfleet.plan import CostModel, find_leaders, plan_dynamic
    from simulate_schedule import zipf_contexts

    grouping, _ = zipf_contexts(num_rows, num_rows // 8)
    draw = np.random.default_rng(0)
    records = np.zeros(num_rows, RECORD)
    # A tenth of the rows are equal to an earlier one.
    keys = draw.integers(0, int(num_rows * 4.8), num_rows, dtype=np.uint64)
    records["key_hi"] = records["key_lo"] = keys
    records["leader"] = np.arange(num_rows)
    started = time.monotonic()
    requests = find_leaders(records, np.ones(num_rows, bool), distinct=False)
    leaders_s = time.monotonic() - started
    plan = plan_dynamic(requests, grouping, num_workers, CostModel(answer_tokens=128))
    total_s = time.monotonic() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"\n{num_rows:,} rows: {total_s:.1f} s ({leaders_s:.1f} s of it duplicates),"
        f" {len(plan.order):,} requests in {plan.num_groups:,} groups and {len(plan.chunks):,}"
        f" chunks; peak {peak_mb:,.0f} MB with the rows themselves"
    )
    return {"rows": num_rows, "total_s": total_s, "leaders_s": leaders_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--record_bytes", type=int, default=2_000)
    parser.add_argument("--records_per_context", type=int, default=8)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment_facts(), "arguments": vars(args)}
    if args.records:
        report["plan"] = plan_file(args)
    if args.rows:
        report["rows"] = plan_rows(args.rows, 8)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
