"""What ragfleet costs around a model: the whole job with an engine that does nothing.

    python benchmarks/overhead.py [--records 100000] [--json FILE]

Arms, each a process (with its children) of its own, interleaved over the rounds:

  ragfleet    `ragfleet infer --engine echo`, 1 worker: plan, answer, merge
  by hand     benchmarks/by_hand.py --passes 3: index and hash, answer with one write each, merge
  one pass    benchmarks/by_hand.py --passes 1: read, answer, write
  datatrove   benchmarks/by_datatrove.py: JsonlReader → no-op → JsonlWriter

Then one run of `--memory_records` records, with the peak memory of each process. Wall times are
noisy where others use the machine too; CPU seconds less so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
HERE: Final = ROOT / "benchmarks"
MEMORY_LIMIT_MB: Final = 300
TIMES: Final = ("inference_time", "total_time")
PACKAGES: Final = ("ragfleet", "msgspec", "numpy", "xxhash", "datatrove", "orjson")


@dataclass
class Measured:
    """One run of one arm."""

    wall_s: float
    cpu_s: float
    """User and system time of the process and its children."""
    max_rss_mb: float
    """Of its largest process."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(seconds since the start, what it printed)."""


# ---- the workload


def write_workload(
    path: Path, num_records: int, record_bytes: int, records_per_context: int = 1, seed: int = 0
) -> None:
    """Records of about this size, with all documented fields and no two equal questions.

    Contexts are cut from the documentation in examples/contexts.jsonl. Where one stands in several
    records, they are anywhere in the file, so that the planned order is not the file's.
    """
    draw = random.Random(seed)
    records = [
        record
        for record in rows(ROOT / "examples" / "contexts.jsonl")
        if record["success"] and record["context"]
    ]
    text = "\n\n".join(dict.fromkeys(record["context"] for record in records))
    # Line ends and quotes take two bytes in JSON.
    rest_bytes = sum(len(msgspec.json.encode({**record, "context": ""})) for record in records)
    size = int((record_bytes - 25 - rest_bytes / len(records)) * 0.965)
    num_contexts = min(max(1, num_records // records_per_context), len(text))
    starts = draw.sample(range(len(text)), num_contexts)
    starts = [starts[number % num_contexts] for number in range(num_records)]
    draw.shuffle(starts)
    text += text[:size]
    with open(path, "wb") as file:
        for number, start in enumerate(starts):
            record = dict(draw.choice(records))
            record["id"] = f"item_{number}_0"
            record["original_item_id"] = f"item_{number}"
            record["query"] = f"{record['query']} (question {number})"
            record["context"] = text[start : start + size]
            record["context_length"] = size
            file.write(msgspec.json.encode(record) + b"\n")


# ---- running


def measure(command: list[str]) -> Measured:
    """Run to the end and note each line it prints, when it does."""
    lines: list[tuple[float, str]] = []
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - started, line.decode(errors="replace").rstrip()))

    reader = threading.Thread(target=read)
    reader.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    if process.returncode:
        text = "\n".join(line for _, line in lines)
        raise SystemExit(f"{' '.join(command)}\nexited with {process.returncode}:\n{text}")
    return Measured(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, lines)


def environment() -> dict[str, str]:
    """This tree's package, whatever is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def ragfleet_command(contexts: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "ragfleet", "infer", "--engine", "echo", "--temperature", "0"]
    return [*command, "--contexts_file", str(contexts), "--output_file", str(output)]


def commands(contexts: Path, folder: Path) -> dict[str, list[str]]:
    """Each arm's command; `folder` is empty and one run's own."""
    output = folder / "output.jsonl"
    by_hand = [sys.executable, str(HERE / "by_hand.py"), str(contexts), str(output)]
    arms = {
        "ragfleet": ragfleet_command(contexts, output),
        "by hand": [*by_hand, "--passes", "3"],
        "one pass": [*by_hand, "--passes", "1"],
    }
    if importlib.util.find_spec("datatrove") is not None:
        script = str(HERE / "by_datatrove.py")
        arms["datatrove"] = [sys.executable, script, str(contexts), str(folder)]
    else:
        print("datatrove is not installed and left out: pip install -e '.[bench]'")
    return arms


def run_rounds(scratch: Path, args: argparse.Namespace) -> Any:
    """[arm][round] Measured."""
    contexts = scratch / "contexts.jsonl"
    write_workload(contexts, args.records, args.record_bytes, args.records_per_context)
    print(f"{args.records:,} records of {contexts.stat().st_size / args.records:,.0f} bytes")
    runs: dict[str, list[Measured]] = {}
    folder = scratch / "run"
    outputs: dict[str, Path] = {}
    for number in range(args.rounds):
        for name, command in commands(contexts, folder).items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            runs.setdefault(name, []).append(measure(command))
            if number == 0 and name in ("ragfleet", "by hand"):
                outputs[name] = scratch / f"{name}.jsonl"
                (folder / "output.jsonl").rename(outputs[name])
        times = ", ".join(f"{name} {measured[-1].wall_s:.2f}" for name, measured in runs.items())
        print(f"round {number + 1}: {times} s", flush=True)
    check_same(outputs["ragfleet"], outputs["by hand"], args.records)
    shutil.rmtree(folder)
    return runs


def check_same(ours: Path, by_hand: Path, num_records: int) -> None:
    """Both did the same work: equal rows, but for the times in them."""
    count = 0
    for mine, theirs in zip(rows(ours), rows(by_hand), strict=True):
        if list(mine) != list(theirs) or any(
            mine[name] != theirs[name] for name in mine if name not in TIMES
        ):
            raise SystemExit(f"The outputs differ:\n{mine}\n{theirs}")
        count += 1
    if count != num_records:
        raise SystemExit(f"{count:,} rows came out of {num_records:,} records.")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


# ---- results


def summarise(runs: dict[str, list[Measured]], num_records: int) -> dict[str, Any]:
    """Medians over the rounds, and what they are of ours."""
    arms: dict[str, Any] = {}
    for name, measured in runs.items():
        wall_s = [run.wall_s for run in measured]
        arm: dict[str, Any] = {
            "wall_s": statistics.median(wall_s),
            "cpu_s": statistics.median(run.cpu_s for run in measured),
            "max_rss_mb": max(run.max_rss_mb for run in measured),
            "rounds_wall_s": wall_s,
            "rounds_cpu_s": [run.cpu_s for run in measured],
        }
        if name == "datatrove":
            inside = [json.loads(run.lines[-1][1])["seconds"] for run in measured]
            arm["wall_s_without_imports"] = statistics.median(inside)
        kinder_s = arm.get("wall_s_without_imports", arm["wall_s"])
        arm["records_per_s"] = num_records / kinder_s
        arms[name] = arm
    ours = arms["ragfleet"]
    for arm in arms.values():
        arm["ours_over_it"] = ours["records_per_s"] / arm["records_per_s"]
        arm["cpu_ours_over_it"] = ours["cpu_s"] / arm["cpu_s"]
    return arms


def phases(runs: list[Measured]) -> dict[str, float]:
    """Where ours spends its time: medians, from the lines that end each phase."""
    found: dict[str, list[float]] = {}
    for run in runs:
        ready = next(at for at, text in run.lines if text.startswith("worker 0 ready"))
        merging = next(at for at, text in run.lines if text == "Merging.")
        planned = max(at for at, text in run.lines if at < ready)
        for name, begin, end in (
            ("start and plan", 0.0, planned),
            ("start of the worker", planned, ready),
            ("worker", ready, merging),
            ("merge", merging, run.wall_s),
        ):
            found.setdefault(name, []).append(end - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def print_arms(arms: dict[str, Any], spent: dict[str, float]) -> None:
    print(
        f"\n{'':<12}{'records/s':>11}{'wall s':>9}{'CPU s':>9}{'max MB':>9}"
        f"{'ours/it':>10}{'CPU ours/it':>13}"
    )
    for name, arm in arms.items():
        print(
            f"{name:<12}{arm['records_per_s']:>11,.0f}{arm['wall_s']:>9.2f}{arm['cpu_s']:>9.2f}"
            f"{arm['max_rss_mb']:>9.0f}{arm['ours_over_it']:>10.2f}{arm['cpu_ours_over_it']:>13.2f}"
        )
    if "datatrove" in arms:
        print("datatrove's records/s, and what ours are of them, leave its imports out.")
    print("Of ragfleet's time: " + ", ".join(f"{name} {s:.2f} s" for name, s in spent.items()))


# ---- memory


def peak_memory(scratch: Path, num_records: int, record_bytes: int) -> dict[str, float]:
    """Largest resident size in MB of each process of a run."""
    needed = num_records * (record_bytes + 2500)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        print(f"Memory is left out: {needed / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} free.")
        return {}
    contexts = scratch / "contexts.jsonl"
    write_workload(contexts, num_records, record_bytes)
    peaks: dict[str, float] = {}
    with open(scratch / "log", "wb") as log:
        command = ragfleet_command(contexts, scratch / "output.jsonl")
        process = psutil.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        while process.poll() is None:
            for member in family(process):
                sample(member, peaks)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit((scratch / "log").read_text())
    return peaks


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def sample(member: psutil.Process, peaks: dict[str, float]) -> None:
    try:
        arguments = member.cmdline()
        status = Path(f"/proc/{member.pid}/status").read_text()
    except (psutil.Error, OSError):
        return  # it has ended meanwhile
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    if found and arguments:
        name = "supervisor"
        if "ragfleet.worker_main" in arguments:
            name = f"worker {arguments[arguments.index('ragfleet.worker_main') + 2]}"
        peaks[name] = max(peaks.get(name, 0.0), int(found[0]) / 1024)


# ---- the command


def environment_facts() -> dict[str, Any]:
    """Hardware, versions and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit + ("+changes" if changes else ""),
    }


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--record_bytes", type=int, default=2_000)
    parser.add_argument("--records_per_context", type=int, default=1, help="above 1: scattered")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory_records", type=int, default=1_000_000, help="0 leaves this part out"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = {"environment": environment_facts(), "arguments": vars(args)}
    with tempfile.TemporaryDirectory(prefix="ragfleet-overhead-") as name:
        runs = run_rounds(Path(name), args)
    report["arms"] = summarise(runs, args.records)
    report["ragfleet_phases_s"] = phases(runs["ragfleet"])
    report["rounds"] = {arm: [asdict(run) for run in measured] for arm, measured in runs.items()}
    print_arms(report["arms"], report["ragfleet_phases_s"])
    if args.memory_records:
        with tempfile.TemporaryDirectory(prefix="ragfleet-overhead-") as name:
            peaks = peak_memory(Path(name), args.memory_records, args.record_bytes)
        report["peak_memory_mb"] = peaks
        for process, peak in sorted(peaks.items()):
            verdict = "below" if peak < MEMORY_LIMIT_MB else "NOT BELOW"
            print(
                f"{args.memory_records:,} records: {process} {peak:.0f} MB"
                f" ({verdict} the limit of {MEMORY_LIMIT_MB})"
            )
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
