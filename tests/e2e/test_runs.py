"""Whole runs, as users start them: answers don't depend on how many workers gave them, or when.

With a small model where answers matter, with echo where only the rows do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from models import example_records
from ragfleet import inspection
from ragfleet.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "utils" / "RAGutils" / "queryResultByInfer" / "multi_worker_inference.py"
ECHO = ("--engine", "echo", "--temperature", "0")
Done = subprocess.CompletedProcess[str]


def command(directory: Path, *words: str, **environment: str) -> Done:
    """One command, in `directory`; its standard output and error, apart."""
    return subprocess.run(
        words,
        cwd=directory,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def ragfleet(directory: Path, *arguments: str, **environment: str) -> Done:
    return command(directory, sys.executable, "-m", "ragfleet", *arguments, **environment)


def infer(directory: Path, *flags: str, output: str = "out") -> Done:
    files = ("--contexts_file", "in.jsonl", "--output_file", f"{output}.jsonl")
    done = ragfleet(directory, "infer", *files, *flags)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shard_lines(directory: Path, output: str = "out") -> list[dict[str, Any]]:
    return [
        row for path in sorted(directory.glob(f"{output}_rank*.jsonl")) for row in rows_of(path)
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    path.write_text(text, encoding="utf-8")


def plain(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "query": f"q{n}", "context": f"c{n // 3}"} for n in range(count)]


def generated(done: Done) -> tuple[int, int]:
    """(requests answered in this start, requests that earlier starts answered)."""
    found = re.search(r"= ([\d,]+) generated in this start \+ ([\d,]+) resumed", done.stdout)
    assert found, done.stdout
    return int(found[1].replace(",", "")), int(found[2].replace(",", ""))


def torchrun() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here")
    return [str(Path(sys.executable).parent / "torchrun"), "--standalone"]


# ------------------------------------------------------------------ the same answers


Answers = list[tuple[Any, Any, Any]]


@dataclass(frozen=True)
class Greedy:
    """Greedy answers of a small model to 40 records, and those of one worker."""

    directory: Path
    flags: tuple[str, ...]

    def answers(self, name: str, *words: str) -> Answers:
        files = ("--contexts_file", "in.jsonl", "--output_file", f"{name}.jsonl")
        done = command(self.directory, *words, *files, *self.flags)
        assert done.returncode == 0, done.stderr
        rows = rows_of(self.directory / f"{name}.jsonl")
        return [(row["id"], row["answer"], row["completion_tokens"]) for row in rows]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Greedy:
    directory = tmp_path_factory.mktemp("greedy")
    write(directory / "in.jsonl", example_records(40))
    flags = ("--model_path", str(small_model), "--inference_type", "local", "--device", "cpu")
    flags += ("--max_new_tokens", "8", "--temperature", "0", "--precision", "fp32")
    return Greedy(directory, flags)


@pytest.fixture(scope="module")
def of_one_worker(greedy: Greedy) -> Answers:
    answers = greedy.answers("one", sys.executable, str(ENTRY))
    records = example_records(40)
    assert [row[0] for row in answers] == [record["id"] for record in records]
    assert [row[1] is not None for row in answers] == [record["success"] for record in records]
    assert len({row[1] for row in answers}) > 20
    return answers


@pytest.mark.timeout(300)  # model loads, on a machine that may be busy
def test_torchrun_gives_the_answers_of_one_worker(greedy: Greedy, of_one_worker: Answers) -> None:
    """The documented line, with its literal 4."""
    words = (*torchrun(), "--nproc_per_node=4", str(ENTRY))
    assert greedy.answers("torchrun", *words) == of_one_worker


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("schedule", ["static", "dynamic"])
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_any_number_of_workers_gives_the_same_answers(
    greedy: Greedy, of_one_worker: Answers, num_workers: int, schedule: str
) -> None:
    flags = ("--num_workers", str(num_workers), "--schedule", schedule, "--batch_size", "5")
    name = f"{schedule}{num_workers}"
    assert greedy.answers(name, sys.executable, str(ENTRY), *flags) == of_one_worker
    if schedule == "static":
        ranks = {row["worker_rank"] for row in rows_of(greedy.directory / f"{name}.jsonl")}
        assert ranks - {None} == set(range(num_workers))


def test_one_row_per_line_in_order(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(100))
    infer(tmp_path, *ECHO, "--num_workers", "4")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == [f"q{n}" for n in range(100)]
    assert len(shard_lines(tmp_path)) == 100


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_seed_gives_the_same_draws_to_any_worker(tmp_path: Path, small_model: Path) -> None:
    records = example_records(12)
    records[7] = {**records[5], "id": "equal to another"}
    write(tmp_path / "in.jsonl", records)
    flags = ["--model_path", str(small_model), "--device", "cpu", "--max_new_tokens", "8"]
    flags += ["--temperature", "0.8", "--seed", "1"]
    infer(tmp_path, *flags, "--num_workers", "2", output="two")
    # In another order, and on its own in a batch.
    write(tmp_path / "in.jsonl", records[::-1])
    infer(tmp_path, *flags, "--batch_size", "3", output="one")
    two = {row["id"]: row["answer"] for row in rows_of(tmp_path / "two.jsonl")}
    assert {row["id"]: row["answer"] for row in rows_of(tmp_path / "one.jsonl")} == two
    assert two[records[5]["id"]] != two["equal to another"]


# ------------------------------------------------------------------ which lines, how often


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_max_samples_takes_the_first_of_each_even_share(tmp_path: Path, schedule: str) -> None:
    write(tmp_path / "in.jsonl", plain(11))
    flags = (*ECHO, "--schedule", schedule, "--num_workers", "3", "--max_samples_per_worker", "2")
    done = infer(tmp_path, *flags)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["r0", "r1", "r4", "r5", "r8", "r9"]
    assert "6 of 11 selected" in done.stderr
    assert "Selected lines: 6 of 11" in done.stdout
    assert generated(done) == (6, 0)
    if schedule == "dynamic":
        return
    # All of them now: what is answered stays.
    done = infer(tmp_path, *ECHO, "--num_workers", "2")
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == [f"r{n}" for n in range(11)]
    assert generated(done) == (5, 6)
    assert len(shard_lines(tmp_path)) == 11


def test_resuming_generates_only_what_is_new(tmp_path: Path) -> None:
    records = plain(30)
    write(tmp_path / "in.jsonl", records)
    assert generated(infer(tmp_path, *ECHO, "--num_workers", "2")) == (30, 0)
    first = (tmp_path / "out.jsonl").read_bytes()

    # The same command with other workers: nothing, and the same bytes.
    done = infer(tmp_path, *ECHO, "--num_workers", "3", "--schedule", "static")
    assert generated(done) == (0, 30)
    assert "Nothing to generate: all 30 requests are finished" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == first
    assert len(shard_lines(tmp_path)) == 30

    # Moved lines, other metadata, another id: nothing.
    records = records[::-1]
    records[4] = {**records[4], "target_api": "numpy.dot", "id": "renamed", "mine": [1]}
    write(tmp_path / "in.jsonl", records)
    assert generated(infer(tmp_path, *ECHO)) == (0, 30)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert (rows[4]["target_api"], rows[4]["mine"]) == ("numpy.dot", [1])

    # Two edited, two added, one an equal of another, one removed: three are generated.
    records[0] = {**records[0], "query": "edited"}
    records[1] = {**records[1], "context": "edited"}
    records += [{"id": "new", "query": "new", "context": "c"}, {**records[5], "id": "equal"}]
    del records[9]
    write(tmp_path / "in.jsonl", records)
    done = infer(tmp_path, *ECHO, "--num_workers", "2")
    assert generated(done) == (3, 27)
    assert "1 duplicates" in done.stdout
    assert "no selected line asks for: 3" in done.stdout
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == [record["query"] for record in records]
    assert len(shard_lines(tmp_path)) == 33


def test_a_lost_run_folder_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO)
    command(tmp_path, "rm", "-r", "out.run")
    assert generated(infer(tmp_path, *ECHO)) == (0, 10)
    (tmp_path / "out.jsonl").unlink()
    assert generated(infer(tmp_path, *ECHO)) == (0, 10)
    assert len(rows_of(tmp_path / "out.jsonl")) == len(shard_lines(tmp_path)) == 10


def test_remove_shards_and_run_again(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO, "--num_workers", "2", "--remove_shards")
    assert shard_lines(tmp_path) == []
    before = (tmp_path / "out.jsonl").read_bytes()
    done = infer(tmp_path, *ECHO)
    assert "Nothing to do" in done.stderr
    assert generated(done) == (0, 10)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    for words in (["status"], ["merge"], ["merge", "--partial"]):
        done = ragfleet(tmp_path, *words, "--output_file", "out.jsonl")
        assert done.returncode == 0
        assert "all 10 requests finished and merged; the shards were removed" in done.stdout
    assert (tmp_path / "out.jsonl").read_bytes() == before
    files = ("--contexts_file", "in.jsonl", "--output_file", "out.jsonl")
    planned = ragfleet(tmp_path, "plan", *files, *ECHO).stdout
    assert "Finished  10 requests by earlier starts" in planned
    assert "Refused" not in planned
    # It can't be extended, and says so rather than losing the ten.
    write(tmp_path / "in.jsonl", plain(11))
    done = ragfleet(tmp_path, "infer", *files, *ECHO)
    assert done.returncode == 2
    assert "its shards removed (--remove_shards), so it can't be extended" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    planned = ragfleet(tmp_path, "plan", *files, *ECHO).stdout
    assert "Refused   infer would stop: " in planned
    assert "so it can't be extended" in planned
    status = ragfleet(tmp_path, "status", "--output_file", "out.jsonl").stdout
    assert "so it can't be extended" in status
    assert "goes on with it" not in status
    write(tmp_path / "in.jsonl", plain(10))
    (tmp_path / "out.jsonl").unlink()
    done = ragfleet(tmp_path, "merge", "--output_file", "out.jsonl")
    assert done.returncode == 2
    assert "is gone, and so are the shards of its 10 requests" in done.stderr


def test_a_kill_while_shards_are_removed(tmp_path: Path) -> None:
    """What is left of them proves nothing against the output, and the next start removes it."""
    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO)
    left = tmp_path / "out_rank0.jsonl"
    lines = left.read_bytes().splitlines(keepends=True)
    infer(tmp_path, *ECHO, "--remove_shards")
    before = (tmp_path / "out.jsonl").read_bytes()
    left.write_bytes(b"".join(lines[:4]))
    done = ragfleet(tmp_path, "status", "--output_file", "out.jsonl")
    assert "all 10 requests finished and merged; the shards were removed" in done.stdout
    done = ragfleet(tmp_path, "verify", "in.jsonl", "out.jsonl")
    assert (done.returncode, "VERIFIED: one row per selected line" in done.stdout) == (0, True)
    infer(tmp_path, *ECHO)
    assert left.exists(), "who does not ask for it keeps what was put back"
    infer(tmp_path, *ECHO, "--remove_shards")
    assert not left.exists()
    assert (tmp_path / "out.jsonl").read_bytes() == before
    left.write_bytes(b"".join(lines))  # a copy of all of them is a proof again
    done = ragfleet(tmp_path, "verify", "in.jsonl", "out.jsonl")
    assert "VERIFIED: one row per selected line, in order, answers of its key." in done.stdout


def test_a_merge_reads_what_a_start_that_just_ends_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO)

    class LateLock(RunLock):
        def __enter__(self) -> RunLock:
            infer(tmp_path, *ECHO, "--remove_shards")
            return super().__enter__()

    monkeypatch.setattr(inspection, "RunLock", LateLock)
    before = (tmp_path / "out.jsonl").read_bytes()
    said = inspection.merge_now(inspection.MergeOptions(output_file=tmp_path / "out.jsonl"))
    assert "all 10 requests finished and merged; the shards were removed" in said
    assert json.loads((tmp_path / "out.run" / "run.json").read_bytes())["starts"] == 2
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_nothing_to_do_is_said_without_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning counts tokens, for which it loads the model's tokenizer."""
    from ragfleet import RunConfig, run

    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO, "--remove_shards")
    monkeypatch.setattr("ragfleet.runner.plan_requests", None)
    config = RunConfig(
        contexts_file=tmp_path / "in.jsonl",
        output_file=tmp_path / "out.jsonl",
        engine="echo",
        temperature=0,
    )
    summary = run(config)
    assert summary is not None
    assert summary.resumed == 10


def test_shards_that_hold_more_than_the_output_are_not_removed(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(20))
    infer(tmp_path, *ECHO, "--num_workers", "2")
    done = infer(tmp_path, *ECHO, "--max_samples_per_worker", "5", "--remove_shards")
    assert "the shards stay, for they hold 15 answers that out.jsonl does not" in done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 5
    assert generated(infer(tmp_path, *ECHO, "--remove_shards")) == (0, 20)
    assert len(rows_of(tmp_path / "out.jsonl")) == 20
    assert shard_lines(tmp_path) == []


def test_shards_of_what_only_failed_are_removed(tmp_path: Path) -> None:
    records = plain(5)
    records[2]["query"] = "RAISE"
    write(tmp_path / "in.jsonl", records)
    (tmp_path / "mine.py").write_text(RAISING)
    infer(tmp_path, "--inference_class", "mine.py:Mine", *ECHO)
    records[2]["query"] = "mended"
    write(tmp_path / "in.jsonl", records)
    done = infer(tmp_path, "--inference_class", "mine.py:Mine", *ECHO, "--remove_shards")
    assert generated(done) == (1, 4)
    assert shard_lines(tmp_path) == []


RAISING: str = """
from ragfleet import QueryBasedInference


class Mine(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query == "RAISE":
            raise LookupError("no such page")
        return query
"""


def test_a_template_that_makes_no_prompt_leaves_everything_as_it_was(
    tmp_path: Path, small_model: Path
) -> None:
    write(tmp_path / "in.jsonl", plain(4))
    infer(tmp_path, *ECHO)
    before = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "t.jinja").write_text("{{ nope }}")
    flags = ("--model_path", str(small_model), "--device", "cpu", "--prompt_template", "t.jinja")
    for output, more in (("out", "--overwrite"), ("new", "--no_overwrite")):
        files = ("--contexts_file", "in.jsonl", "--output_file", f"{output}.jsonl")
        done = ragfleet(tmp_path, "infer", *files, *flags, more)
        assert done.returncode == 2
        assert "Not one of the 4 prompts can be made" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.bak*"))
    assert not list(tmp_path.glob("new*"))


def test_failures_of_a_file_that_was_edited_since_are_not_told(tmp_path: Path) -> None:
    records = [
        {**record, "query": " "} if n % 3 == 0 else record for n, record in enumerate(plain(12))
    ]
    write(tmp_path / "in.jsonl", records)
    infer(tmp_path, *ECHO)
    done = ragfleet(tmp_path, "failures", "out.jsonl")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["r0", "r3", "r6", "r9"]
    write(tmp_path / "in.jsonl", records[::-1])
    done = ragfleet(tmp_path, "failures", "out.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not of the current selection; run infer again" in done.stderr


def test_plan_says_what_infer_would_refuse(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(4))
    files = ("--contexts_file", "in.jsonl", "--output_file", "out.jsonl")
    infer(tmp_path, *ECHO)
    assert "Refused" not in ragfleet(tmp_path, "plan", *files, *ECHO).stdout
    other = (*ECHO, "--max_new_tokens", "7")
    done = ragfleet(tmp_path, "plan", *files, *other)
    assert ragfleet(tmp_path, "infer", *files, *other).returncode == 2
    refused = done.stdout.partition("\nRefused   infer would stop: ")[2]
    assert "belongs to a run with other settings" in refused
    assert "max_new_tokens" in refused
    afresh = ragfleet(tmp_path, "plan", *files, *other, "--overwrite").stdout
    assert "Refused" not in afresh
    # The answers there are of other settings, not of other records.
    assert "records that are not selected" not in done.stdout + afresh


def test_paths_that_no_run_can_have(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", plain(4))
    infer(tmp_path, *ECHO)
    done = ragfleet(tmp_path, "status", "--output_file", "in.jsonl/out.jsonl")
    assert done.returncode == 2
    assert "There is no run for" in done.stderr
    done = ragfleet(tmp_path, "failures", "out.run")
    assert done.returncode == 2
    assert "is a folder; name the results file" in done.stderr
    (tmp_path / "gaps.jsonl").write_text('\n{"query": "q", "context": "c"}\n \r\n')
    for number in (1, 3):
        identifier = f"line:{number}"
        done = ragfleet(tmp_path, "show", identifier, "--contexts_file", "gaps.jsonl", *ECHO)
        assert done.returncode == 2
        assert f"{identifier} is a blank line, which is no record" in done.stderr
    done = ragfleet(tmp_path, "show", "\udced\udca0", "--contexts_file", "in.jsonl", *ECHO)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ users' own classes


CLASSES = """
import asyncio, os, pathlib, sys, time
from ragfleet import QueryBasedInference

BROKEN = pathlib.Path(__file__).with_name("broken")

class Sync(QueryBasedInference):
    def setup(self):
        self.word = "sync"

    def generate_answer(self, query, context, retrieval_method):
        if query == "q3" and BROKEN.exists():
            raise LookupError("no such page")
        if query == "q4":
            return 42
        if query == "q5":
            return "half a letter: " + chr(0xD800)
        if query == "q6":
            raise ValueError("half a letter: " + chr(0xD800))
        return f"{self.word} {super().generate_answer(query, context, retrieval_method)}"

class Async(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        await asyncio.sleep(0.01)
        if query == "q3":
            raise LookupError("no such page")
        return f"{self.record['id']} {context}"

class Forks(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query in ("q3", "q5"):
            pid = os.fork()
            if pid == 0:
                sys.exit(0) if query == "q3" else time.sleep(0.2)
                return "of the child"
            if query == "q3":
                os.waitpid(pid, 0)
        return query

class Blocks(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        while query == "q3":
            time.sleep(1)
        return query

class Prompt(QueryBasedInference):
    def create_prompt(self, query, context, retrieval_method):
        return f"{self.record['id']} asks {query}"

if __name__ == "__main__":
    Sync.main()
"""


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    write(tmp_path / "in.jsonl", plain(12))
    (tmp_path / "mine.py").write_text(CLASSES)
    return tmp_path


def test_a_class_that_answers(classes: Path) -> None:
    (classes / "broken").touch()
    done = infer(classes, *ECHO, "--inference_class", "mine.py:Sync", "--num_workers", "2")
    rows = rows_of(classes / "out.jsonl")
    failed = {3, 4, 6}
    assert [row["success"] for row in rows] == [n not in failed for n in range(12)]
    assert rows[0]["answer"] == "sync q0"
    assert rows[5]["answer"].startswith("half a letter: ")
    assert re.fullmatch(r"LookupError: no such page \(.*mine\.py:\d+\)", rows[3]["error"])
    assert rows[3]["error_type"] == "generation_error"
    assert rows[3]["worker_rank"] is not None
    assert "returned int, not a string" in rows[4]["error"]
    assert "ValueError: half a letter" in rows[6]["error"]
    assert "generation_error 3" in done.stdout.splitlines()[-1]

    # Mended: failures stay until they are asked for again, and then only they are.
    (classes / "broken").unlink()
    assert generated(infer(classes, *ECHO, "--inference_class", "mine.py:Sync")) == (0, 12)
    again = ("--inference_class", "mine.py:Sync", "--retry_failed", "--num_workers", "3")
    done = infer(classes, *ECHO, *again)
    assert generated(done) == (3, 9)
    rows = rows_of(classes / "out.jsonl")
    assert [row["success"] for row in rows] == [n not in {4, 6} for n in range(12)]
    assert len(shard_lines(classes)) == 15


def test_an_async_class(classes: Path) -> None:
    infer(classes, *ECHO, "--inference_class", "mine.py:Async")
    rows = rows_of(classes / "out.jsonl")
    assert [row["answer"] for row in rows if row["id"] != "r3"] == [
        f"r{n} c{n // 3}" for n in range(12) if n != 3
    ]
    assert rows[3]["error"].startswith("LookupError: no such page")


def test_show_asks_the_users_class_for_its_prompt(classes: Path) -> None:
    flags = ("--contexts_file", "in.jsonl", "--model_path", "pocket", "--device", "cpu")
    shown = ragfleet(classes, "show", "r11", *flags, "--inference_class", "mine.py:Prompt")
    assert shown.returncode == 0, shown.stderr
    plain = ragfleet(classes, "show", "r11", *flags)
    assert plain.stdout != shown.stdout
    assert "Question:" not in shown.stdout, "the class's own wording"
    own = ragfleet(classes, "show", "r11", *flags, "--inference_class", "mine.py:Sync")
    assert own.returncode == 2
    assert "generate_answer of its own" in own.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_class_that_only_makes_prompts(classes: Path, small_model: Path) -> None:
    """The configured model answers its prompts, together."""
    flags = ["--model_path", str(small_model), "--device", "cpu", "--max_new_tokens", "4"]
    flags += ["--temperature", "0"]
    infer(classes, *flags, "--inference_class", "mine.py:Prompt")
    rows = rows_of(classes / "out.jsonl")
    assert all(row["success"] for row in rows)
    shown = ragfleet(classes, "show", "r11", "--contexts_file", "in.jsonl", *flags)
    assert rows[11]["prompt_tokens"] < int(re.findall(r": (\d+) tokens", shown.stderr)[0])


def test_a_file_that_is_its_own_command(classes: Path) -> None:
    """`MyInference.main()`, and the base class imported from the documented script."""
    files = ["--contexts_file", "in.jsonl", "--output_file", "out.jsonl"]
    done = command(classes, sys.executable, "mine.py", *files, *ECHO)
    assert done.returncode == 0, done.stderr
    assert rows_of(classes / "out.jsonl")[0]["answer"] == "sync q0"
    text = CLASSES.replace(
        "from ragfleet import QueryBasedInference",
        f"sys.path.insert(0, {str(ENTRY.parent)!r})\n"
        "from multi_worker_inference import QueryBasedInference",
    )
    (classes / "mine.py").write_text(text)
    done = command(classes, sys.executable, "mine.py", *files, *ECHO, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert rows_of(classes / "out.jsonl")[0]["answer"] == "sync q0"


def test_a_fork_that_comes_back_is_no_second_worker(classes: Path) -> None:
    infer(classes, *ECHO, "--inference_class", "mine.py:Forks")
    rows = rows_of(classes / "out.jsonl")
    assert [row["answer"] for row in rows] == [f"q{n}" for n in range(12)]
    assert len(shard_lines(classes)) == 12


def test_a_class_that_blocks_for_ever(classes: Path) -> None:
    """Its worker is ended, its row fails, and nobody else notices."""
    flags = ("--inference_class", "mine.py:Blocks", "--request_timeout_s", "2")
    done = infer(classes, *ECHO, *flags, "--num_workers", "2")
    rows = rows_of(classes / "out.jsonl")
    assert [row["success"] for row in rows] == [n != 3 for n in range(12)]
    assert rows[3]["error_type"] == "timeout"
    assert "no answer within 2 s (--request_timeout_s)" in rows[3]["error"]
    assert "a request took longer than 2 s" in done.stderr
    assert "timeout 1" in done.stdout.splitlines()[-1]
    assert len(shard_lines(classes)) == 12


# ------------------------------------------------------------------ looking at runs


def without_torch(directory: Path) -> dict[str, str]:
    """An environment in which torch and transformers can't be imported."""
    for name in ("torch", "transformers"):
        (directory / "hidden" / name).mkdir(parents=True, exist_ok=True)
        text = "raise SystemError('imported')\n"
        (directory / "hidden" / name / "__init__.py").write_text(text)
    inherited = os.environ.get("PYTHONPATH")
    hidden = str(directory / "hidden")
    return {"PYTHONPATH": hidden + (os.pathsep + inherited if inherited else "")}


def test_looking_loads_no_torch(tmp_path: Path, small_model: Path) -> None:
    """plan, show and --help work where importing torch fails."""
    records = sorted(example_records(40), key=lambda each: not each["success"])
    write(tmp_path / "in.jsonl", records)
    environment = without_torch(tmp_path)
    model = ("--model_path", str(small_model), "--temperature", "0", "--device", "cpu")
    flags = ("--contexts_file", "in.jsonl", *model)

    plan = ragfleet(tmp_path, "plan", *flags, "--num_workers", "3", **environment)
    assert plan.returncode == 0, plan.stderr
    sendable = [record for record in records if record["success"]]
    distinct = len({(record["query"], record["context"]) for record in sendable})
    assert f"{distinct} requests in " in plan.stdout
    assert "40 lines, all selected" in plan.stdout
    lines = re.findall(r"worker (\d): lines (\d+)-(\d+), (\d+) selected", plan.stdout)
    assert lines == [("0", "1", "14", "14"), ("1", "15", "27", "13"), ("2", "28", "40", "13")]
    assert sum(map(int, re.findall(r"generates (\d+) in", plan.stdout))) == distinct
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden", "in.jsonl"]

    new = ("--output_file", "new/folder/out.jsonl")
    assert ragfleet(tmp_path, "plan", *flags, *new, **environment).returncode == 0
    assert not (tmp_path / "new").exists()

    record = sendable[20]
    show = ragfleet(tmp_path, "show", record["id"], *flags, **environment)
    assert show.returncode == 0, show.stderr
    assert record["query"] in show.stdout
    assert record["context"][:200] in show.stdout
    assert show.stdout.rstrip("\n").endswith("<|im_start|>assistant")
    assert re.search(r"line 21: [\d,]+ tokens", show.stderr)

    missing = ragfleet(tmp_path, "show", "nobody", *flags, **environment)
    assert missing.returncode == 2
    assert "has no record nobody" in missing.stderr
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "in.jsonl").read_bytes())
    first = ragfleet(tmp_path, "show", "line:1", *flags, **environment)
    assert records[0]["query"] in first.stdout


def test_status_and_merge_of_an_unfinished_run(tmp_path: Path) -> None:
    environment = without_torch(tmp_path)
    write(tmp_path / "in.jsonl", plain(10))
    infer(tmp_path, *ECHO)
    before = (tmp_path / "out.jsonl").read_bytes()
    # As a kill leaves it: two answers less, one of them torn.
    shard = tmp_path / "out_rank0.jsonl"
    shard.write_bytes(b"".join(shard.read_bytes().splitlines(keepends=True)[:-1])[:-20])

    output = ("--output_file", "out.jsonl")
    status = ragfleet(tmp_path, "status", *output, **environment)
    assert status.returncode == 0, status.stderr
    assert "8 of 10 requests finished (0 of them failed), 2 remain; start 1." in status.stdout
    assert "Nothing runs; the same infer command goes on" in status.stdout

    merge = ragfleet(tmp_path, "merge", *output, **environment)
    assert merge.returncode == 1
    assert "2 requests are not finished" in merge.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before

    partial = ragfleet(tmp_path, "merge", *output, "--partial", **environment)
    assert partial.returncode == 0, partial.stderr
    assert "8 of 10 selected lines" in partial.stdout
    rows = rows_of(tmp_path / "out.partial.jsonl")
    kept = {row["id"] for row in rows}
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(10) if f"r{n}" in kept]
    assert len(kept) == 8
    assert (tmp_path / "out.jsonl").read_bytes() == before
    verify = ragfleet(tmp_path, "verify", "in.jsonl", "out.partial.jsonl", **environment)
    assert verify.returncode == 2
    assert "is a partial merge" in verify.stderr

    assert generated(infer(tmp_path, *ECHO)) == (2, 8)
    assert "Nothing runs" not in ragfleet(tmp_path, "status", *output).stdout
    # Finished, but the output is not there: as a disk that fills up at the merge leaves it.
    (tmp_path / "out.jsonl").unlink()
    status = ragfleet(tmp_path, "status", *output)
    assert "ragfleet merge writes the output" in status.stdout
    assert "Merged: complete." not in status.stdout
    assert ragfleet(tmp_path, "merge", *output).returncode == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 10
    merge = ragfleet(tmp_path, "merge", *output, **environment)
    assert "10 rows" in merge.stdout
    other = ragfleet(tmp_path, "status", "--output_file", "other.jsonl", **environment)
    assert other.returncode == 2
    assert "There is no run for other.jsonl" in other.stderr


# ------------------------------------------------------------------ from Python


def test_from_python(tmp_path: Path) -> None:
    from ragfleet import RunConfig, run

    write(tmp_path / "in.jsonl", [*plain(10), {"id": "blank", "query": "", "context": "c"}])
    config = RunConfig(
        contexts_file=tmp_path / "in.jsonl",
        output_file=str(tmp_path / "out.jsonl"),  # type: ignore[arg-type]
        engine="echo",
        temperature=0.0,
        num_workers=2,
    )
    kinds: list[str] = []
    summary = run(config, lambda event: kinds.append(event.kind))
    assert summary is not None
    rows = list(summary.results())
    assert [row["answer"] for row in rows] == [*(f"q{n}" for n in range(10)), None]
    assert (summary.num_selected, summary.answered_now, summary.resumed) == (11, 10, 0)
    assert (summary.statistics.succeeded, summary.statistics.failed) == (10, 1)
    assert kinds[0] == "header"
    assert kinds[-1] == "summary"
    assert {"ready", "first", "progress", "merging"} <= set(kinds)


def test_from_a_thread_of_a_program(tmp_path: Path) -> None:
    """Two runs at once, in threads: no signal handlers, nothing global."""
    from ragfleet import RunConfig, RunSummary, run

    write(tmp_path / "in.jsonl", plain(20))
    threads = threading.active_count()

    def answer(name: str) -> RunSummary | None:
        files = {"contexts_file": tmp_path / "in.jsonl", "output_file": tmp_path / f"{name}.jsonl"}
        return run(RunConfig(**files, engine="echo", temperature=0.0))

    with ThreadPoolExecutor(2) as pool:
        for summary in pool.map(answer, ("a", "b")):
            assert summary is not None
            assert len(list(summary.results())) == 20
    assert threading.active_count() == threads


def test_plan_says_what_sharing_saves_and_the_end_what_came_true(tmp_path: Path) -> None:
    contexts = ("alpha is the first letter. " * 6, "beta is the second letter. " * 6)
    lines = [
        {"query": f"Which letter is number {number}?", "context": contexts[number % 2]}
        for number in range(6)
    ]
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--contexts_file", "contexts.jsonl", "--model_path", "pocket", "--device", "cpu")
    flags = (*flags, "--temperature", "0", "--max_new_tokens", "4", "--num_workers", "2")
    plan = ragfleet(tmp_path, "plan", *flags, "--exact_tokens")
    assert plan.returncode == 0, plan.stderr
    found = re.search(
        r"Prefill   ([\d,]+) prompt tokens; each prefix once ([\d,]+) \((\d+)% less\), counted",
        plan.stdout,
    )
    assert found is not None, plan.stdout
    prompts, shared = (int(text.replace(",", "")) for text in found.groups()[:2])
    assert shared < 0.7 * prompts
    assert "Bound     no schedule ends before one worker" in plan.stdout
    done = ragfleet(tmp_path, "infer", *flags, "--output_file", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"Prefill   {prompts:,} prompt tokens; each prefix once {shared:,}" in done.stderr
    computed = re.search(rf"Prefill: ([\d,]+) of {prompts:,} prompt tokens computed", done.stdout)
    assert computed is not None, done.stdout
    assert re.search(r"Generation: [\d.]+s, [\d.]+% above the bound of", done.stdout)


# ------------------------------------------------------------------ what slows a run down


FAILING: str = """
from ragfleet import QueryBasedInference
from ragfleet.engines.shared_prefix.forward import Forward


def fail(self, tensors):
    raise RuntimeError("no such kernel")


class Mine(QueryBasedInference):
    def create_prompt(self, query, context, retrieval_method):
        Forward.__call__ = fail  # not before: the self-check at the start would find it
        return query
"""


def test_what_slows_a_run_down_on_the_way_is_in_its_statistics(
    tmp_path: Path, small_model: Path
) -> None:
    write(tmp_path / "in.jsonl", plain(6))
    (tmp_path / "mine.py").write_text(FAILING)
    flags = ("--inference_class", "mine.py:Mine", "--temperature", "0", "--max_new_tokens", "4")
    device = ("--device", "cpu", "--batch_size", "1")
    done = infer(tmp_path, *flags, "--model_path", str(small_model), *device)
    reason = "plain batches after 3 failed passes: RuntimeError: no such kernel"
    assert f"Degraded: {reason}" in done.stdout
    assert reason in done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 6
