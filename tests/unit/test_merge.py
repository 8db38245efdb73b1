"""Merging: shards and the input in, one row per selected line out, whatever came in between."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ragfleet.errors import InputChanged, StorageError
from ragfleet.identity import Selection
from ragfleet.index import Kind
from ragfleet.merge import allow_open_files, write_results
from ragfleet.plan import join_key
from ragfleet.planning import Finished, Indexed, find_finished, index_contexts
from ragfleet.records import parse_fields
from ragfleet.rows import OUTPUT_FIELDS, Answered, failed, result_row
from ragfleet.shards import list_shards, shard_path
from ragfleet.summary import MergeStatistics

RUN_KEY = bytes(16)


def line_of(record: Any) -> bytes:
    return record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()


@dataclass
class Job:
    """A contexts file, its shards and its output in one folder."""

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def contexts(self) -> Path:
        return self.folder / "contexts.jsonl"

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    def write(self, *records: Any) -> Job:
        self.contexts.write_bytes(b"".join(line_of(record) + b"\n" for record in records))
        return self

    def index(self) -> Indexed:
        options = {
            "key_fields": [],
            "covers_id": False,
            "distinct": False,
            "num_workers": 1,
            "max_samples_per_worker": None,
            "include_context": False,
            "drop_failed_contexts": False,
            **self.options,
        }
        return index_contexts(Selection(contexts_file=str(self.contexts), **options), RUN_KEY)

    def answer(
        self,
        rows: Iterable[int] | None = None,
        *,
        rank: int = 0,
        copy: int = 0,
        at: int = 1,
        text: str = "answer",
        success: bool = True,
    ) -> Job:
        """Append what a worker would for these index rows (None: all requests)."""
        indexed = self.index()
        data = self.contexts.read_bytes()
        with shard_path(self.output, rank, copy).open("ab") as shard:
            for row in range(len(indexed.index)) if rows is None else rows:
                if not indexed.requests[row]:
                    assert rows is None, f"row {row} is no request"
                    continue
                record = indexed.index.records[row]
                start, length = int(record["offset"]), int(record["length"])
                key = join_key(int(record["key_hi"]), int(record["key_lo"])).hex().encode()
                said = f'"{text} {row}"'.encode()
                own = (
                    ("finish_reason", b'"stop"'),
                    ("prompt_tokens", b"3"),
                    ("completion_tokens", b"2"),
                )
                answered = Answered(said, 0.5, rank, True, own)
                shard.write(
                    result_row(
                        parse_fields(data[start : start + length]),
                        f"line:{row + 1}",
                        answered if success else failed("oom", f"{text} {row}", rank),
                        extra=b',"request_key":"%b","finished_at_ns":%d' % (key, at),
                    )
                )
        return self

    def finished(self) -> Finished:
        return find_finished(self.index(), self.output)

    def merge(self) -> tuple[list[dict[str, Any]], MergeStatistics]:
        indexed = self.index()
        winners = find_finished(indexed, self.output).winners
        statistics = write_results(indexed.merge_job(winners), self.output)
        assert_adds_up(statistics)
        rows = [json.loads(line) for line in self.output.read_bytes().splitlines()]
        assert len(rows) == statistics.rows
        return rows, statistics


def assert_adds_up(statistics: MergeStatistics) -> None:
    s = statistics
    assert s.rows == s.succeeded + s.failed == s.generated + s.duplicates + s.not_sent
    assert sum(s.errors.values()) == s.failed
    assert sum(worker.processed for worker in s.workers.values()) == s.generated


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def ask(query: str, **others: Any) -> dict[str, Any]:
    return {"id": query, "query": query, "context": "c", **others}


def answers(rows: list[dict[str, Any]]) -> list[Any]:
    return [row["answer"] for row in rows]


# ---- rows


def test_rows_stand_in_input_order_whatever_order_they_were_answered_in(job: Job) -> None:
    job.write(ask("a"), ask("b"), ask("c"), ask("d"))
    job.answer([3, 1], rank=1).answer([2, 0], rank=0)
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert answers(rows) == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert [row["worker_rank"] for row in rows] == [0, 1, 0, 1]
    assert statistics.generated == statistics.succeeded == 4
    assert (statistics.prompt_tokens, statistics.completion_tokens) == (12, 8)
    assert {rank: worker.succeeded for rank, worker in statistics.workers.items()} == {0: 2, 1: 2}
    assert statistics.workers[1].shards == ["out_rank1.jsonl"]
    assert statistics.workers[0].mean_inference_time_s == 0.5


def test_metadata_come_from_the_input_and_only_the_answer_from_the_shard(job: Job) -> None:
    job.write(ask("a", tag="old", dedup_key=1)).answer()
    job.write(ask("a", tag="new", dedup_key=2, id="renamed", retrieval_time=0.25))
    rows, _ = job.merge()
    assert rows[0]["id"] == "renamed"
    assert rows[0]["tag"] == "new"
    assert rows[0]["dedup_key"] == 2
    assert rows[0]["total_time"] == 0.75
    assert rows[0]["context_length"] == 1
    assert "request_key" not in rows[0]
    assert "finished_at_ns" not in rows[0]


def test_duplicates_take_one_answer_under_metadata_of_their_own(job: Job) -> None:
    job.write(
        ask("q", id=1, tag="x"), ask("other"), ask("q", id=2, retrieval_time=2), ask("q", id=3)
    )
    job.answer([0, 1])
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == [1, "other", 2, 3]
    assert answers(rows) == ["answer 0", "answer 1", "answer 0", "answer 0"]
    assert [row["total_time"] for row in rows] == [0.5, 0.5, 2.5, 0.5]
    assert [row.get("tag") for row in rows] == ["x", None, None, None]
    assert (statistics.generated, statistics.duplicates) == (2, 2)
    assert statistics.workers[0].processed == 2
    assert statistics.prompt_tokens == 6, "tokens are spent once"


def test_distinct_lines_have_answers_of_their_own(job: Job) -> None:
    job.options["distinct"] = True
    job.write(ask("q"), ask("q"), ask("q")).answer()
    rows, statistics = job.merge()
    assert answers(rows) == ["answer 0", "answer 1", "answer 2"]
    assert (statistics.generated, statistics.duplicates) == (3, 0)


def test_failed_contexts_are_rows_or_dropped(job: Job) -> None:
    bad = {"id": "bad", "query": "q", "context": "", "success": False, "error": "no such API"}
    job.write(ask("a"), bad, ask("b")).answer()
    rows, statistics = job.merge()
    assert [row["success"] for row in rows] == [True, False, True]
    assert rows[1]["id"] == "bad"
    assert rows[1]["error_type"] == "context_failed"
    assert "no such API" in rows[1]["error"]
    assert set(OUTPUT_FIELDS) <= set(rows[1])
    assert statistics.errors == {"context_failed": 1}
    assert statistics.not_sent == 1
    job.options["drop_failed_contexts"] = True
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == ["a", "b"]
    assert (statistics.dropped, statistics.rows, statistics.not_sent) == (1, 2, 0)


def test_invalid_lines_are_failure_rows_in_their_place(job: Job) -> None:
    job.write(
        ask("a"),
        b"broken",
        b'{"id":"own","query":"","context":"c","tag":"kept"}',
        b'{"id":"x","query":"q","context":"\xff"}',
        b"[1]",
        b'{"id":"y","query":"\\ud800","context":"c"}',
        b'{"id":"z","query":"q"}',
        ask("b"),
    )
    job.answer()
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == [
        *("a", "line:2", "own", "line:4", "line:5", "line:6", "z", "b")
    ]
    for row in rows[1:7]:
        assert row["error_type"] == "invalid_record"
        assert row["answer"] is None
        assert row["worker_rank"] is None
        assert row["inference_time"] == 0.0
        assert list(row)[: len(OUTPUT_FIELDS)] == list(OUTPUT_FIELDS)
    assert rows[2]["tag"] == "kept"
    assert "blank" in rows[2]["error"]
    assert statistics.errors == {"invalid_record": 6}
    assert statistics.not_sent == 6


def test_failures_keep_their_reason_and_count_for_their_worker(job: Job) -> None:
    job.write(ask("a"), ask("b"), ask("a"))
    job.answer([0], success=False, text="no room").answer([1])
    rows, statistics = job.merge()
    assert answers(rows) == [None, "answer 1", None]
    assert rows[0]["error_type"] == "oom"
    assert rows[0]["error"] == "no room 0"
    assert statistics.errors == {"oom": 2}
    assert (statistics.workers[0].failed, statistics.workers[0].succeeded) == (1, 1)
    job.answer([0], copy=1, at=2, text="at last")
    rows, statistics = job.merge()
    assert answers(rows) == ["at last 0", "answer 1", "at last 0"]
    assert statistics.failed == 0


def test_only_the_selected_lines_are_written(job: Job) -> None:
    job.options |= {"num_workers": 2, "max_samples_per_worker": 1}
    job.write(ask("a"), ask("b"), ask("c"), ask("d")).answer()
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == ["a", "c"]
    assert statistics.rows == 2


def test_the_context_is_repeated_only_when_asked_for(job: Job) -> None:
    job.write(ask("a", context="文档")).answer()
    assert "context" not in job.merge()[0][0]
    job.options["include_context"] = True
    assert job.merge()[0][0]["context"] == "文档"
    assert "文档".encode() in job.output.read_bytes()


def test_answers_of_records_that_vanished_are_ignored_and_counted(job: Job) -> None:
    job.write(ask("a"), ask("gone"), ask("b")).answer()
    job.write(ask("b"), ask("a"))
    assert job.finished().num_superfluous == 1
    rows, statistics = job.merge()
    assert answers(rows) == ["answer 2", "answer 0"]
    assert statistics.generated == 2


def test_records_added_or_moved_find_their_answers_by_key(job: Job) -> None:
    job.write(ask("a"), ask("b")).answer()
    job.write(ask("new"), ask("b", id=7), ask("a"))
    finished = job.finished().mask(job.index())
    assert finished.tolist() == [False, True, True]
    rows, statistics = job.merge()
    assert answers(rows) == ["answer 1", "answer 0"]
    assert statistics.missing == 1


def test_retrying_failures_asks_only_for_those(job: Job) -> None:
    job.write(ask("a"), ask("b"), ask("c")).answer([0]).answer([1], success=False)
    indexed, finished = job.index(), job.finished()
    assert finished.mask(indexed).tolist() == [True, True, False]
    assert finished.mask(indexed, retry_failed=True).tolist() == [True, False, False]


def test_a_partial_merge_leaves_out_what_has_no_outcome(job: Job) -> None:
    job.write(ask("a"), b"broken", ask("b"), ask("a")).answer([2])
    rows, statistics = job.merge()
    assert [row["id"] for row in rows] == ["line:2", "b"]
    assert statistics.missing == 2
    assert statistics.rows == 2


def test_garbage_in_a_shard_changes_nothing(job: Job) -> None:
    job.write(ask("a"), ask("b")).answer([0])
    shard = shard_path(job.output, 0)
    shard.write_bytes(shard.read_bytes() + b'{"torn": \n\x00\xff\n')
    job.answer([1])
    assert job.finished().num_invalid == 2
    assert answers(job.merge()[0]) == ["answer 0", "answer 1"]


def test_a_last_line_without_its_end_counts(job: Job) -> None:
    job.write(ask("a"), ask("b")).answer()
    shard = shard_path(job.output, 0)
    os.truncate(shard, shard.stat().st_size - 1)
    assert answers(job.merge()[0]) == ["answer 0", "answer 1"]


def test_a_bom_line_ends_and_blank_lines_do_no_harm(job: Job) -> None:
    job.contexts.write_bytes(
        b"\xef\xbb\xbf" + line_of(ask("a")) + b"\r\n\r\n" + line_of(ask("b", id=None))
    )
    rows, _ = job.answer().merge()
    assert [row["id"] for row in rows] == ["a", "line:3"]


# ---- the input changes


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b'"b"', b'"x"'),
        lambda data: data.replace(b'"b"', b'"bb"'),
        lambda data: data[:-5],
        lambda data: data[: len(data) // 2],
        lambda data: b"\n" + data,
        lambda data: b"",
    ],
    ids=["byte", "longer", "cut", "halved", "moved", "emptied"],
)
def test_an_input_edited_meanwhile_is_noticed_and_the_old_output_kept(
    job: Job, change: Any
) -> None:
    job.write(ask("a"), ask("b"), ask("c")).answer()
    indexed = job.index()
    winners = find_finished(indexed, job.output).winners
    job.output.write_bytes(b"old")
    job.contexts.write_bytes(change(job.contexts.read_bytes()))
    with pytest.raises(InputChanged, match=r"contexts.jsonl was edited .*line [123]"):
        write_results(indexed.merge_job(winners), job.output)
    assert job.output.read_bytes() == b"old"
    assert [path.name for path in job.folder.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.parametrize("added", [b'{"query":"d","context":"c"}\n', b"\n", b'{"que'])
def test_lines_that_came_meanwhile_are_not_passed_over(job: Job, added: bytes) -> None:
    job.write(ask("a"), ask("b")).answer()
    indexed = job.index()
    winners = find_finished(indexed, job.output).winners
    with job.contexts.open("ab") as file:
        file.write(added)
    with pytest.raises(InputChanged, match=rf"contexts.jsonl grew by {len(added)} bytes since"):
        write_results(indexed.merge_job(winners), job.output)
    assert not job.output.exists()


# ---- files


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (80, 4096, None),
        (79, 4096, 80),
        (64, resource.RLIM_INFINITY, 80),
        (64, 70, 70),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_each_shard_may_be_open(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None
) -> None:
    """Beside 64 others. A run of many starts has more shards than a process may have files."""
    limits = [(soft, hard)]
    monkeypatch.setattr("ragfleet.merge.resource.getrlimit", lambda _: limits[0])
    monkeypatch.setattr("ragfleet.merge.resource.setrlimit", lambda _, pair: limits.append(pair))
    allow_open_files(16)
    assert limits[1:] == ([] if raised is None else [(raised, hard)])


# ---- the disk fails


@pytest.mark.parametrize("step", ["write", "flush", "fsync", "replace"])
def test_a_full_disk_keeps_the_old_output(
    job: Job, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    job.write(ask("a"), ask("b")).answer()
    indexed = job.index()
    winners = find_finished(indexed, job.output).winners
    job.output.write_bytes(b"old")
    before = sorted(path.name for path in job.folder.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step in ("fsync", "replace"):
        monkeypatch.setattr(f"ragfleet.merge.os.{step}", fail)
    else:
        real_open = open

        def broken_open(path: Any, mode: str = "r", **options: Any) -> Any:
            file = real_open(path, mode, **options)
            if "w" not in mode:
                return file

            class Broken:
                def __getattr__(self, name: str) -> Any:
                    return fail if name == step else getattr(file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

            return Broken()

        monkeypatch.setattr("ragfleet.merge.open", broken_open, raising=False)
    with pytest.raises(StorageError, match=r"Can't write .*out.jsonl: No space left on device"):
        write_results(indexed.merge_job(winners), job.output)
    monkeypatch.undo()
    assert job.output.read_bytes() == b"old"
    assert sorted(path.name for path in job.folder.iterdir()) == before
    assert answers(job.merge()[0]) == ["answer 0", "answer 1"]


def test_what_is_asked_before_replacing_may_still_refuse(job: Job) -> None:
    job.write(ask("a")).answer()
    indexed = job.index()
    winners = find_finished(indexed, job.output).winners
    job.output.write_bytes(b"old")
    seen = []

    def refuse(statistics: MergeStatistics, content: str) -> None:
        (new,) = job.folder.glob(".*tmp")
        assert content == xxhash.xxh3_128_hexdigest(new.read_bytes())
        seen.append((statistics.succeeded, job.output.read_bytes()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(indexed.merge_job(winners), job.output, refuse)
    assert seen == [(1, b"old")]
    assert job.output.read_bytes() == b"old"
    assert not list(job.folder.glob(".*tmp"))


# ---- any history

records = st.one_of(
    st.sampled_from(["a", "b", "c", "d"]).map(ask),
    st.sampled_from(
        [
            b"broken",
            b'{"query":" ","context":"c"}',
            b'{"query":"q","context":"c","success":false}',
            b'{"query":"a","context":"c","n":1e400}',
        ]
    ),
)
attempts = st.lists(
    st.tuples(
        st.integers(0, 9),  # which request
        st.integers(0, 2),  # rank
        st.integers(0, 1),  # copy
        st.integers(0, 3),  # finished_at_ns
        st.booleans(),
    ),
    max_size=12,
)


@given(
    st.lists(records, min_size=1, max_size=8),
    attempts,
    st.randoms(use_true_random=False),
    st.booleans(),
    st.booleans(),
)
@example([ask("a"), ask("a")], [(0, 0, 0, 1, True), (0, 1, 0, 1, True)], None, False, False)
@settings(max_examples=60)
def test_merging_is_idempotent_and_blind_to_order(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[Any],
    history: list[tuple[int, int, int, int, bool]],
    random: Any,
    distinct: bool,
    drop: bool,
) -> None:
    job = Job(tmp_path_factory.mktemp("merge"))
    job.options |= {"distinct": distinct, "drop_failed_contexts": drop}
    job.write(ask("first"), *lines)
    indexed = job.index()
    requests = [row for row, is_request in enumerate(indexed.requests) if is_request]
    for which, rank, copy, at, success in history:
        row = requests[which % len(requests)]
        job.answer([row], rank=rank, copy=copy, at=at, success=success, text=f"{rank}.{copy}.{at}")
    rows, statistics = job.merge()
    first = job.output.read_bytes()
    assert job.merge() == (rows, statistics)
    assert job.output.read_bytes() == first
    selected = len(indexed.index)
    assert statistics.rows + statistics.dropped + statistics.missing == selected
    kinds = indexed.index.records["kind"].tolist()
    assert statistics.dropped == (kinds.count(Kind.FAILED_CONTEXT) if drop else 0)
    answered = {requests[which % len(requests)] for which, *_ in history}
    leaders = indexed.index.records["leader"].tolist()
    missing = sum(
        kind == Kind.SEND and leader not in answered
        for kind, leader in zip(kinds, leaders, strict=True)
    )
    assert statistics.missing == missing
    if random is not None:
        for shard in list_shards(job.output):
            written = shard.read_bytes().splitlines(keepends=True)
            random.shuffle(written)
            shard.write_bytes(b"".join(written))
        assert job.merge() == (rows, statistics)
        assert job.output.read_bytes() == first


def test_a_merge_tells_how_far_it_is(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragfleet.merge._PROGRESS_EVERY", 2)
    job.write(*(ask(f"q{number}") for number in range(5)))
    indexed, told = job.index(), list[int]()
    merging = indexed.merge_job(job.finished().winners, mark_unfinished=True)
    write_results(merging, job.output, on_progress=told.append)
    assert told == [2, 4]
