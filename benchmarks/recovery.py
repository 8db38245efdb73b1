"""How soon a worker that stands still is found and replaced, and what is left of it.

    python benchmarks/recovery.py [--stall_timeout_s 3] [--json FILE]

Real runs over the echo engine, whose worker hangs once at the same record in five ways. `found` and
`recovered` (its replacement is ready) are seconds from the hang; the aim is stall_timeout_s + 5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "src"

# Put on PYTHONPATH as sitecustomize.py: the first worker that comes to the record q20 hangs.
HANG = """
import os, pathlib, re, signal, subprocess, sys, time

HERE = pathlib.Path(os.environ["HANG_FOLDER"])

def hang(how):
    try:
        os.close(os.open(HERE / "hung", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if how == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "grandchildren":
        subprocess.Popen(["sleep", "600"])
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if how == "holds the GIL":
        re.fullmatch("(a|a)*b", "a" * 64)
    while True:
        time.sleep(600)

if "ragfleet.worker_main" in sys.orig_argv:
    from ragfleet.engines.echo import EchoEngine
    how = os.environ["HANG_HOW"]
    step, prepare = EchoEngine.step, EchoEngine.prepare

    def hanging_step(self, timeout_s):
        if how != "in prepare" and any(item.prompt == "q20" for item in self._queue):
            hang(how)
        return step(self, timeout_s)

    def hanging_prepare(self, request):
        if how == "in prepare" and request.query == "q20":
            hang(how)
        return prepare(self, request)

    EchoEngine.step, EchoEngine.prepare = hanging_step, hanging_prepare
"""
CASES = ("in step", "in prepare", "ignores SIGTERM", "grandchildren", "holds the GIL")


def command(stall_timeout_s: float) -> list[str]:
    files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
    how = ["--engine", "echo", "--temperature", "0", "--batch_size", "1"]
    limit = ["--stall_timeout_s", str(stall_timeout_s)]
    return [sys.executable, "-m", "ragfleet", "infer", *files, *how, *limit]


def start(folder: Path, how: str, stall_timeout_s: float) -> subprocess.Popen[str]:
    """A run of 40 records in `folder`; its stderr is a pipe."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(HANG)
    with (folder / "in.jsonl").open("w") as file:
        for number in range(40):
            record = {"id": f"r{number}", "query": f"q{number}", "context": f"c{number}"}
            file.write(json.dumps(record) + "\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(folder / "site"), str(SOURCE))),
        "HANG_FOLDER": str(folder),
        "HANG_HOW": how,
    }
    return subprocess.Popen(
        command(stall_timeout_s),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_over(folder: Path) -> list[int]:
    """Processes that still carry the folder in their environment, but for those that are asked."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HANG_FOLDER={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def measure(how: str, stall_timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="recovery-") as name:
        folder = Path(name)
        process = start(folder, how, stall_timeout_s)
        assert process.stderr is not None
        found_s = recovered_s = float("nan")
        ready = 0
        for line in process.stderr:
            now_s = time.time()
            if "its stacks go to its log" in line:
                found_s = now_s - (folder / "hung").stat().st_mtime
            ready += " ready: " in line
            if ready == 2 and " ready: " in line:
                recovered_s = now_s - (folder / "hung").stat().st_mtime
        code = process.wait(timeout=60)
        answered = (folder / "out.jsonl").read_text().count('"success":true') if code == 0 else 0
        return {
            "case": how,
            "found_s": found_s,
            "recovered_s": recovered_s,
            "answered": answered,
            "left": len(left_over(folder)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stall_timeout_s", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    rows = [measure(how, options.stall_timeout_s) for how in CASES]
    print(f"{'the worker':<18}{'found after':>12}{'recovered':>12}{'answered':>10}{'left':>6}")
    for row in rows:
        print(
            f"{row['case']:<18}{row['found_s']:>10.1f} s{row['recovered_s']:>10.1f} s"
            f"{row['answered']:>7}/40{row['left']:>6}"
        )
    print(f"aim: {options.stall_timeout_s + 5:.1f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
