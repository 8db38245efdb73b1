"""Two workers of one thread against one of one, on the same work.

    python benchmarks/two_workers.py [--vllm_python .venv-vllm/bin/python] [--fraction 0.5]

For each engine two processes (`throughput_arm.py`) are loaded with one thread each. In a round one
of them answers all requests of `workloads.py`'s `shared`, each key once, in the planner's order;
then both answer about half of the prefix groups each, at the same time, and the slower one counts.
`matrix product` is the limit: what this machine's second core adds at all while the first one
works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from arm_processes import ArmProcess, Work, closing_all, shared_out
from throughput import MODELS, ROWS, make_work, scaled
from workloads import ARCHITECTURES, WorkloadSpec, make_model

ENGINES: Final = ("ours on transformers", "ours on vLLM")
LIMIT: Final = "matrix product"
SECOND: Final = "second "


def seconds_of(
    processes: Sequence[ArmProcess], work: Work, spec: WorkloadSpec, orders: Sequence[list[int]]
) -> float:
    """Of the slowest; all begin together."""
    for process, order in zip(processes, orders, strict=True):
        process.ask(work, spec, order)
    return max(float(process.read()["seconds"]) for process in processes)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    row = ROWS["shared"]
    model_dir = make_model(args.arch, MODELS)
    work = make_work(row, args, model_dir, folder)
    planned, parts = work.orders["planned"], shared_out(work, work.orders["planned"], 2)
    settings = {
        "model": str(model_dir),
        "threads": 1,
        "max_new_tokens": row.spec.max_new_tokens,
        "temperature": 0.0,
        "kv_bytes": work.kv_bytes,
        "max_model_len": work.max_model_len,
    }
    processes: dict[str, ArmProcess] = {}
    times: dict[str, list[float]] = {}
    with closing_all(processes):
        for name in (*args.engines, LIMIT):
            python = args.vllm_python if "vLLM" in name else sys.executable
            for prefix in ("", SECOND):
                process = ArmProcess(name, python, settings, folder, prefix)
                processes[prefix + name] = process
        for process in processes.values():
            process.warm_up(work, row.spec)
        for number in range(args.rounds):
            for name in (*args.engines, LIMIT):
                pair = (processes[name], processes[SECOND + name])
                whole, shares = ([0, 0], [[0], [0]]) if name == LIMIT else (planned, parts)
                one = seconds_of(pair[:1], work, row.spec, [whole])
                two = seconds_of(pair, work, row.spec, shares)
                times.setdefault(name, []).append(one / two)
                print(
                    f"  round {number + 1}, {name}: one {one:.1f} s, two {two:.1f} s,"
                    f" {one / two:.2f} x",
                    flush=True,
                )
    return {"ratios": times}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm_python", help="interpreter of an environment with vLLM")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="llama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the records")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    args = parser.parse_args()
    args.static_every = 1
    scaled(args.fraction)
    if args.vllm_python is None and "ours on vLLM" in args.engines:
        print("vLLM is left out: --vllm_python names no environment with vLLM")
        args.engines = [name for name in args.engines if "vLLM" not in name]
    with tempfile.TemporaryDirectory() as name:
        result = measure(args, Path(name))
    for arm, ratios in result["ratios"].items():
        print(f"{arm}: two workers of one thread {statistics.median(ratios):.2f} x one")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
