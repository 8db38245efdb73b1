"""A record that kills its worker, workers that stand still: found and ended, nothing else lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import psutil
import pytest

from ragfleet.earlier_files import remove_old_launches
from ragfleet.index import RECORD
from ragfleet.launch import RunPaths

CLASSES = (
    """
import asyncio, os, pathlib, signal, subprocess, time
from ragfleet import QueryBasedInference
"""
    + harness.ONCE
    + """
class Poisoned(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        await asyncio.sleep(0.002)
        if query == "q377":
            os.abort()
        return query[::-1]

class Several(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query in ("q3", "q4", "q5", "q6", "q20"):
            os.kill(os.getpid(), signal.SIGKILL)
        return query[::-1]

class First(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if int(query[1:]) < 10 and not (HERE / "mended").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return query[::-1]

class Stands(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query == "q5" and once("stood"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "600"])
            (HERE / "grandchild").write_text(str(child.pid))
            while True:
                time.sleep(600)
        return query[::-1]

class LoadsForever(QueryBasedInference):
    def setup(self):
        if once("loaded"):
            time.sleep(600)

    def generate_answer(self, query, context, retrieval_method):
        return query[::-1]
"""
)


def started(
    folder: Path, count: int, class_name: str, *flags: str, site: str = ""
) -> subprocess.CompletedProcess[str]:
    """One start."""
    (folder / "mine.py").write_text(CLASSES)
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(site)
    source = harness.environment()["PYTHONPATH"]
    with (folder / "in.jsonl").open("w") as file:
        for number in range(count):
            record = {"id": f"r{number}", "query": f"q{number}", "context": f"c{number // 4}"}
            file.write(json.dumps(record) + "\n")
    command = [sys.executable, "-m", "ragfleet", "infer", "--contexts_file", "in.jsonl"]
    command += ["--output_file", "out.jsonl", "--engine", "echo", "--temperature", "0"]
    command += ["--inference_class", f"mine.py:{class_name}", *flags]
    return subprocess.run(
        command,
        cwd=folder,
        env=harness.environment(PYTHONPATH=os.pathsep.join((str(folder / "site"), source))),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def run(
    folder: Path, count: int, class_name: str, *flags: str, site: str = ""
) -> tuple[list[dict[str, object]], str]:
    """Rows and what was said; the run must end well."""
    done = started(folder, count, class_name, *flags, site=site)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(count)]
    return rows, done.stderr


@pytest.fixture(scope="module", params=["2", "1"])
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by so many workers over 1,000 records, one of which kills."""
    folder = tmp_path_factory.mktemp("poisoned")
    run(folder, 1000, "Poisoned", "--batch_size", "32", "--num_workers", request.param)
    return folder


def test_one_poison_record_in_a_thousand_is_one_failure_row(poisoned: Path) -> None:
    rows = [json.loads(line) for line in (poisoned / "out.jsonl").read_text().splitlines()]
    failures = [row for row in rows if not row["success"]]
    assert [(row["id"], row["error_type"]) for row in failures] == [("r377", "poison")]
    assert "worker died" in str(failures[0]["error"])
    deaths = list(poisoned.glob("out.run/launches/*/claims/death.*"))
    print(f"{len(deaths)} deaths")
    assert 3 <= len(deaths) <= 7  # log2(32) + 2


def test_several_poison_records_end_no_worker_for_good(tmp_path: Path) -> None:
    rows, said = run(tmp_path, 30, "Several", "--num_workers", "1")
    failures = [(row["id"], row["error_type"]) for row in rows if not row["success"]]
    assert failures == [(f"r{number}", "poison") for number in (3, 4, 5, 6, 20)]
    assert len(list(tmp_path.glob("out.run/launches/*/claims/death.*"))) == 15
    assert "given up" not in said


def test_records_that_kill_before_any_answer_are_told_by_later_starts(tmp_path: Path) -> None:
    """A start is given up for four of them, and the next one does not begin with the same four."""
    for _ in range(5):
        done = started(tmp_path, 30, "First", "--num_workers", "1")
        assert done.returncode == 1
        assert "No worker is left" in done.stderr
    rows, _ = run(tmp_path, 30, "First", "--num_workers", "1")
    failures = [(row["id"], row["error_type"]) for row in rows if not row["success"]]
    assert failures == [(f"r{number}", "poison") for number in range(10)]
    assert "worker died 3 times" in str(rows[0]["error"])


def test_what_earlier_starts_suspect_is_tried_before_it_is_poison(tmp_path: Path) -> None:
    for _ in range(3):
        assert started(tmp_path, 30, "First", "--num_workers", "1").returncode == 1
    (tmp_path / "mended").touch()
    rows, _ = run(tmp_path, 30, "First", "--num_workers", "1")
    failed = [row["error_type"] for row in rows if not row["success"]]
    assert failed == ["poison"] * 3, "written down before it was mended"
    rows, _ = run(tmp_path, 30, "First", "--num_workers", "1", "--retry_failed")
    assert all(row["success"] for row in rows)


def test_no_record_is_handed_on_with_more_than_two_deaths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are deaths that say nothing any more, for one of their records is gone."""
    records = np.zeros(3, RECORD)
    records["key_hi"], records["key_lo"] = 7, range(3)
    indexed: Any = SimpleNamespace(
        index=SimpleNamespace(records=records), requests=np.ones(3, bool)
    )
    paths = RunPaths(tmp_path / "out.jsonl")
    (paths.launches / "one").mkdir(parents=True)
    sets = [[0, 1], [0], [0], [1], [1, 2], [2, 9]]
    deaths = [(str(rank), [(7, row) for row in rows]) for rank, rows in enumerate(sets)]
    monkeypatch.setattr("ragfleet.earlier_files._death_sets", lambda _: deaths)
    carried = remove_old_launches(paths, indexed)
    assert list(carried.values()) == [(0,), (0,), (1,), (1, 2)], "the narrowest first"
    assert [owner.partition(".")[0] for owner in carried] == ["1", "2", "3", "4"]
    assert list(paths.launches.iterdir()) == []


def test_a_worker_without_progress_is_ended_with_its_grandchild(tmp_path: Path) -> None:
    # The grace is waited for as well; how long it is does not matter here.
    site = "import ragfleet.launchers.liveness as liveness\nliveness.GRACE_S = 0.5\n"
    rows, said = run(tmp_path, 40, "Stands", "--request_timeout_s", "1", site=site)
    assert "took longer than 1 s" in said
    assert [row["error_type"] for row in rows if not row["success"]] == ["timeout"]
    try:
        grandchild = psutil.Process(int((tmp_path / "grandchild").read_text()))
        assert grandchild.status() == psutil.STATUS_ZOMBIE  # nobody's child, not yet reaped
    except psutil.NoSuchProcess:
        pass


def test_a_worker_that_loads_for_too_long_is_started_again(tmp_path: Path) -> None:
    # Long enough to come as far as its set-up on a busy machine.
    rows, said = run(tmp_path, 8, "LoadsForever", "--start_timeout_s", "5")
    assert all(row["success"] for row in rows)
    assert "is loading for" in said
    log = (tmp_path / "out.run" / "logs" / "worker_0.log").read_text()
    assert "in setup" in log  # the stack that it stood in


def test_what_failed_comes_out_as_input_and_verify_proves_the_rest(poisoned: Path) -> None:
    def ragfleet(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ragfleet", *arguments],
            cwd=poisoned,
            env=harness.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert [
        json.loads(line)["id"] for line in ragfleet("failures", "out.jsonl").stdout.splitlines()
    ] == ["r377"]
    assert ragfleet("verify", "in.jsonl", "out.jsonl").returncode == 0
    output = poisoned / "out.jsonl"
    whole = output.read_text()
    lines = whole.splitlines()
    lines[3] = lines[3].replace('"answer":"3q"', '"answer":"another"')
    del lines[100]
    output.write_text("\n".join(lines) + "\n")
    broken = ragfleet("verify", "in.jsonl", "out.jsonl")
    output.write_text(whole)  # the run is others' as well
    assert broken.returncode == 1
    assert "row 4 (r3): differs in answer" in broken.stdout
    assert "NOT VERIFIED" in broken.stdout
