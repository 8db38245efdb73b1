"""How long it takes until something happens: imports, --help, a plan.

    python benchmarks/startup.py [--json FILE]

Each command is a fresh process; rounds are interleaved and the medians are shown, with what they
take beyond a Python that does nothing. Aims: 150 ms for `import ragfleet`, 400 ms for
`ragfleet --help`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
AIMS_MS: Final = {"import ragfleet": 150, "ragfleet --help": 400}
BARE: Final = "python -c pass"


def commands(scratch: Path) -> dict[str, list[str]]:
    python, ragfleet = [sys.executable], [sys.executable, "-m", "ragfleet"]
    plan = ["plan", "--engine", "echo", "--contexts_file", str(ROOT / "examples/contexts.jsonl")]
    return {
        BARE: [*python, "-c", "pass"],
        "import ragfleet": [*python, "-c", "import ragfleet"],
        "ragfleet --help": [*ragfleet, "--help"],
        "ragfleet infer --help": [*ragfleet, "infer", "--help"],
        "ragfleet plan": [*ragfleet, *plan, "--output_file", str(scratch / "results.jsonl")],
    }


def seconds_of(command: list[str]) -> tuple[float, float]:
    """(wall, user and system) seconds of one run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    started = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return wall_s, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="ragfleet-startup-") as scratch:
        runs = commands(Path(scratch))
        for name, command in runs.items():
            seconds_of(command)  # compiled files and page cache
            times[name] = []
        for _ in range(args.rounds):
            for name, command in runs.items():
                times[name].append(seconds_of(command))
    medians = {
        name: [1000 * statistics.median(values) for values in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    bare_ms, bare_cpu_ms = medians[BARE]
    print(f"{'':<24}{'wall ms':>9}{'beyond bare':>13}{'CPU ms':>9}{'beyond bare':>13}{'aim ms':>9}")
    for name, (wall_ms, cpu_ms) in medians.items():
        print(
            f"{name:<24}{wall_ms:>9.0f}{wall_ms - bare_ms:>13.0f}{cpu_ms:>9.0f}"
            f"{cpu_ms - bare_cpu_ms:>13.0f}{AIMS_MS.get(name, ''):>9}"
        )
    if args.json is not None:
        report = {name: {"wall_ms": wall, "cpu_ms": cpu} for name, (wall, cpu) in medians.items()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
