"""Workers that stand still, whatever they do about it: found, ended with all they started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recovery import CASES, left_over, start

FAST = ("grandchildren",)


@pytest.mark.parametrize(
    "how", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_worker_that_stands_still_is_replaced_whole(tmp_path: Path, how: str) -> None:
    """Its neighbours in flight are answered by the next one; `benchmarks/recovery.py` times it."""
    process = start(tmp_path, how, stall_timeout_s=1.5)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 0, said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(40)]
    assert all(row["success"] for row in rows)
    silent = how == "holds the GIL"
    assert ("gives no sign of life" if silent else "makes no progress") in said or silent
    assert "its stacks go to its log, and it is restarted" in said
    log = (tmp_path / "out.run" / "logs" / "worker_0.log").read_text()
    assert "in hang" in log, "the stack that it stood in"
    assert left_over(tmp_path) == []
