#!/usr/bin/env python3
"""Check how records and GPUs are shared out, and that two workers really answer.

    python utils/RAGutils/queryResultByInfer/test_multi_worker_inference.py --skip-inference
    python utils/RAGutils/queryResultByInfer/test_multi_worker_inference.py --model_path MODEL

Slices and GPU allocations are worked out for machines that aren't there: no GPU, no model and no
torch is needed, and it takes a second. Without --skip-inference a handful of the example contexts
is then answered by two workers, with the model named or with the demo model in the package.

One line per case. Exit code 0: all is as expected; 1: a case differs; 2: nothing to run with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragfleet.allocation import Allocation

ROOT = Path(__file__).resolve().parents[3]
CONTEXTS_FILE = ROOT / "examples" / "contexts.jsonl"
DEMO_MODEL = "pocket"
NUM_RECORDS = 6
NUM_WORKERS = 2

# This tree's package, installed or not, and not an older copy that is installed elsewhere.
sys.path.insert(0, str(ROOT / "src"))


@dataclass(frozen=True)
class Case:
    what: str
    expected: Any
    compute: Callable[[], Any]


def slicing_cases() -> Iterator[Case]:
    """Contiguous, even; the first total % workers get one more."""
    from ragfleet.plan import static_slices

    def spans(total: int, num_workers: int) -> list[str]:
        return [
            f"{part.start}-{part.stop - 1}" if part else "none"
            for part in static_slices(total, num_workers)
        ]

    documented = [
        (1000, 4, ["0-249", "250-499", "500-749", "750-999"]),
        (10, 4, ["0-2", "3-5", "6-7", "8-9"]),
        (7, 3, ["0-2", "3-4", "5-6"]),
        (3, 3, ["0-0", "1-1", "2-2"]),
        (2, 4, ["0-0", "1-1", "none", "none"]),
        (0, 2, ["none", "none"]),
        (5, 1, ["0-4"]),
    ]
    for total, num_workers, expected in documented:
        yield Case(
            f"{total} records, {num_workers} workers",
            expected,
            lambda total=total, num_workers=num_workers: spans(total, num_workers),
        )


def allocation_cases() -> Iterator[Case]:
    """The documented configurations, and what a shared node brings."""
    from ragfleet.allocation import allocate, tensor_parallel_size, worker_environment
    from ragfleet.errors import DeviceError
    from ragfleet.gpus import visible_gpus
    from ragfleet.inventory import fake_inventory

    def give(num_gpus: int, workers: int, **options: Any) -> Allocation:
        machine = fake_inventory(
            num_gpus, busy=options.pop("busy", None), mig=options.pop("mig", None)
        )
        visible = visible_gpus(machine, options.pop("cuda_visible_devices", None))
        return allocate(visible, num_workers=workers, cpu_cores=16, **options)

    def gpus(*arguments: int, **options: Any) -> str:
        return " | ".join(
            ",".join(gpu.label for gpu in worker.gpus) or "CPU"
            for worker in give(*arguments, **options).workers
        )

    def exit_code(*arguments: int, parts: tuple[str, ...] = (), **options: Any) -> str:
        try:
            return gpus(*arguments, **options)
        except DeviceError as error:
            missing = [part for part in parts if part not in str(error)]
            return f"exit {error.exit_code}" + (f" without {missing}: {error}" if missing else "")

    # NUM_WORKERS / TOTAL_GPUS / GPUS_PER_WORKER, as in run_multi_worker_inference.sh.
    for workers, total, each, expected in (
        (4, 8, 2, "0,1 | 2,3 | 4,5 | 6,7"),
        (2, 8, 4, "0,1,2,3 | 4,5,6,7"),
        (8, 8, 1, "0 | 1 | 2 | 3 | 4 | 5 | 6 | 7"),
        (2, 4, 2, "0,1 | 2,3"),
    ):
        name = f"NUM_WORKERS={workers} TOTAL_GPUS={total}"
        yield Case(
            f"{name} GPUS_PER_WORKER={each}",
            expected,
            lambda w=workers, t=total, e=each: gpus(8, w, total_gpus=t, gpus_per_worker=e),
        )
        yield Case(
            f"{name} GPUS_PER_WORKER=",
            expected,
            lambda w=workers, t=total: gpus(t, w, total_gpus=t),
        )

    busy = {1: "pid 7 (python), 70 GiB", 2: "pid 7 (python), 70 GiB", 6: "pid 8 (python), 9 GiB"}
    yield Case(
        "5 of 8 GPUs usable, 4 workers with 2 each",
        "exit 2",
        lambda: exit_code(
            *(8, 4),
            busy=busy,
            gpus_per_worker=2,
            parts=(
                "need 8 GPUs",
                "give 5",
                "--num_workers 2 --gpus_per_worker 2",
                "--num_workers 4 --gpus_per_worker 1",
            ),
        ),
    )
    yield Case(
        "5 of 8 GPUs usable, 4 workers, TOTAL_GPUS=8",
        "0 | 3 | 4 | 5",
        lambda: gpus(8, 4, busy=busy, total_gpus=8),
    )
    yield Case(
        "busy GPUs, --gpu_pick all",
        "0,1 | 2,3 | 4,5 | 6,7",
        lambda: gpus(8, 4, busy=busy, gpu_pick="all"),
    )
    yield Case(
        "every GPU busy",
        "exit 2",
        lambda: exit_code(1, 1, busy={0: "pid 7"}, parts=("pid 7", "--device cpu")),
    )
    yield Case("5 GPUs, 2 workers: one over", "0,1 | 2,3", lambda: gpus(5, 2))
    yield Case("2 GPUs, 5 workers: shared", "0 | 1 | 0 | 1 | 0", lambda: gpus(2, 5))
    yield Case("28 heads (4 key/value) on 8 GPUs", 4, lambda: tensor_parallel_size(8, 28, 4))
    yield Case("32 heads (8 key/value) on 8 GPUs", 8, lambda: tensor_parallel_size(8, 32, 8))
    yield Case(
        "CUDA_VISIBLE_DEVICES=3,1, 2 workers",
        "3 | 1",
        lambda: gpus(4, 2, cuda_visible_devices="3,1"),
    )
    yield Case(
        "CUDA_VISIBLE_DEVICES=GPU-00000002, 1 worker",
        "2",
        lambda: gpus(4, 1, cuda_visible_devices="GPU-00000002"),
    )
    yield Case("CUDA_VISIBLE_DEVICES= (empty)", "CPU", lambda: gpus(4, 1, cuda_visible_devices=""))
    yield Case(
        "CUDA_VISIBLE_DEVICES=0,0",
        "exit 2",
        lambda: exit_code(4, 1, cuda_visible_devices="0,0", parts=("twice",)),
    )
    yield Case(
        "GPU 0 in 2 MIG instances, 2 workers",
        "0/MIG-00000000 | 0/MIG-00000001",
        lambda: gpus(1, 2, mig={0: 2}),
    )
    yield Case(
        "a MIG name among GPUs",
        "0/MIG-00000001",
        lambda: gpus(2, 1, mig={0: 2}, cuda_visible_devices="MIG-00000001"),
    )
    yield Case("no GPU, 2 workers, TOTAL_GPUS=8", "CPU | CPU", lambda: gpus(0, 2, total_gpus=8))
    yield Case(
        "--device cpu, 4 workers on 16 cores",
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"},
        lambda: {
            name: value
            for name, value in worker_environment(give(8, 4, device="cpu").workers[3]).items()
            if name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        },
    )


def inference_cases(model_path: str) -> Iterator[Case]:
    """Two workers answer a handful of the example contexts; the folder is removed afterwards."""
    from ragfleet import RunConfig, run

    with open(CONTEXTS_FILE, encoding="utf-8") as file:
        lines = [line for _, line in zip(range(NUM_RECORDS), file, strict=False)]
    ids = [json.loads(line)["id"] for line in lines]
    with tempfile.TemporaryDirectory(prefix="ragfleet-test-") as folder:
        contexts_file = Path(folder, "contexts.jsonl")
        output_file = Path(folder, "results.jsonl")
        contexts_file.write_text("".join(lines), encoding="utf-8")
        run(
            RunConfig(
                contexts_file=contexts_file,
                output_file=output_file,
                model_path=model_path,
                num_workers=NUM_WORKERS,
                max_new_tokens=16,
                temperature=0.0,
            )
        )
        with open(output_file, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    yield Case("one row per line, in the order of the input", ids, lambda: [r["id"] for r in rows])
    yield Case(
        "every row has an answer",
        [],
        lambda: [(r["id"], r.get("error")) for r in rows if not r["success"]],
    )
    yield Case(
        f"ranks that are not among the {NUM_WORKERS} workers",
        [],
        lambda: sorted({r["worker_rank"] for r in rows} - set(range(NUM_WORKERS))),
    )


def check(title: str, cases: Iterator[Case]) -> int:
    """Print a line per case; the number of those that differ."""
    # A GBK or ASCII terminal has no ✓.
    good, bad = ("✓", "✗") if "utf" in (sys.stdout.encoding or "").lower() else ("ok", "FAILED")
    print(title)
    failed = 0
    for case in cases:
        try:
            got = case.compute()
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
        same = got == case.expected
        failed += not same
        outcome = f"expected {show(case.expected)}, got {show(got)}"
        print(f"  {good if same else bad} {case.what}: {outcome}")
    return failed


def show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return str(value)


def main(argv: list[str] | None = None) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (the script may meet any Python)
        print(f"ragfleet needs Python 3.11 or newer; this is {sys.version}", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--skip-inference",
        "--skip_inference",
        action="store_true",
        help="only slices and GPU allocations: no model is loaded",
    )
    parser.add_argument(
        "--model_path",
        "--model-path",
        default=DEMO_MODEL,
        help="model folder to answer with (default: pocket, the demo model in the package)",
    )
    args = parser.parse_args(argv)
    try:
        failed = check("Slices", slicing_cases())
        failed += check("GPUs", allocation_cases())
    except ModuleNotFoundError as error:
        print(
            f"The package {error.name} is missing in {sys.executable}. Install what ragfleet needs"
            f' (it never installs or changes torch or vLLM): "{sys.executable}" -m pip install -e'
            f' "{ROOT}"',
            file=sys.stderr,
        )
        return 2
    if not args.skip_inference:
        from ragfleet import RagfleetError

        try:
            failed += check(f"Inference with {args.model_path}", inference_cases(args.model_path))
        except RagfleetError as error:
            print(f"inference stopped: {error}", file=sys.stderr)
            return error.exit_code
    print(f"{failed} case(s) differ." if failed else "All as expected.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
