"""What a schedule does to the files of a run, while it goes on and between two starts.

`directory` is the run's folder. What is done to processes is in `harness`.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
from pathlib import Path

from schedules import NUM_RECORDS, STORAGE_ERRORS


def edit_input(directory: Path, which: int) -> None:
    """One letter of one record, in place, as an editor that saves under a running job."""
    path = directory / "in.jsonl"
    data = path.read_bytes()
    places = [found.start(1) for found in re.finditer(rb'"query": "(q)', data)]
    with path.open("r+b") as file:
        file.seek(places[which % len(places)])
        file.write(b"Q")


# ---- during a start


def fail_storage(directory: Path, which: int) -> str:
    """From now on every write to a shard fails; how it does."""
    how = STORAGE_ERRORS[which % len(STORAGE_ERRORS)]
    temporary = directory / "full.tmp"
    temporary.write_text(how)
    temporary.rename(directory / "full")
    return how


def set_clock(directory: Path, which: int) -> None:
    """An hour or a year, forward or back."""
    seconds = (3600, -3600, 31_536_000, -31_536_000)[which % 4]
    (directory / "clock").write_text(str(seconds * 10**9))


def delete_plan(directory: Path) -> None:
    for path in directory.glob("out.run/launches/*/*"):
        if path.suffix in (".npy", ".json"):
            path.unlink(missing_ok=True)


def delete_run(directory: Path) -> None:
    """All that may be removed, under the workers' hands."""
    shutil.rmtree(directory / "out.run", ignore_errors=True)


def delete(directory: Path, pattern: str, which: int) -> None:
    """One of a launch's files that match."""
    found = sorted(directory.glob(f"out.run/launches/*/{pattern}"))
    if found:
        with contextlib.suppress(FileNotFoundError):
            found[which % len(found)].unlink()


# ---- between starts


def damage(directory: Path, kind: str, draw: random.Random) -> int:
    """How many finished lines it took away."""
    if kind == "edit_input":
        edit_input(directory, draw.randrange(NUM_RECORDS))
        return 0
    full = [path for path in sorted(directory.glob("out_rank*.jsonl")) if path.stat().st_size]
    if kind == "delete_launches":
        for path in directory.glob("out.run/launches/*"):
            path.rename(path.with_name("." + path.name))
    if not full or kind in ("nothing", "delete_launches"):
        return 0
    path = draw.choice(full)
    data = path.read_bytes()
    if kind == "cut":
        keep = draw.randint(max(0, len(data) - 1500), len(data))
        path.write_bytes(data[:keep])
        return data.count(b"\n") - data[:keep].count(b"\n")
    line = draw.choice(data.splitlines(keepends=True))
    extra = {
        "duplicate_line": line,
        "foreign_line": b'{"request_key": "' + b"0" * 32 + b'", "finished_at_ns": 1,'
        b' "success": true, "answer": "foreign", "inference_time": 0.0, "worker_rank": 0}\n',
        "garbage": bytes(draw.randrange(256) for _ in range(60)) + b"\n",
    }[kind]
    # A cut line before it swallows it, as it would swallow anything appended to it.
    path.write_bytes(data + extra)
    return 0
