"""Shards: whatever happens to the files, whole lines are found and the right one counts."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragfleet.errors import StorageError
from ragfleet.plan import split_key
from ragfleet.records import parse_fields
from ragfleet.rows import Answered, failed, parse_shard_row, result_row
from ragfleet.shards import (
    ANSWER,
    ShardIndex,
    ShardWriter,
    Winners,
    choose,
    finished_keys,
    is_own_name,
    list_shards,
    partial_path,
    rank_of,
    scan_shards,
    shard_path,
)


def shard_line(
    key: int | bytes = 1, at: int = 1, success: bool = True, text: str = "answer 答", **fields: Any
) -> bytes:
    """A line as a worker writes it."""
    key = key if isinstance(key, bytes) else key.to_bytes(16, "big")
    own = (("finish_reason", b'"stop"'), ("prompt_tokens", b"3"), ("completion_tokens", b"2"))
    answer = Answered(json.dumps(text, ensure_ascii=False).encode(), 0.25, 0, True, own)
    record = {"id": "a", "query": "q", "context": "c", **fields}
    return result_row(
        parse_fields(json.dumps(record).encode()),
        "line:1",
        answer if success else failed("oom", text, 0),
        extra=b',"request_key":"%b","finished_at_ns":%d' % (key.hex().encode(), at),
    )


def found_in(path: Path) -> list[tuple[bytes, int, int]]:
    """(key, offset, length) of each line found."""
    return [
        (row["key_hi"].tobytes() + row["key_lo"].tobytes(), int(row["offset"]), int(row["length"]))
        for row in scan_shards([path]).answers
    ]


# ---- names and writing


def test_names() -> None:
    output = Path("/data/my results.v2.jsonl")
    assert shard_path(output, 3).name == "my results.v2_rank3.jsonl"
    assert shard_path(output, 3, 2).name == "my results.v2_rank3.2.jsonl"
    assert rank_of(shard_path(output, 12)) == 12
    assert rank_of(shard_path(output, 12, 5)) == 12
    assert partial_path(output).name == "my results.v2.partial.jsonl"


def test_names_of_an_output_are_no_others() -> None:
    output = Path("/data/out.jsonl")
    own = [shard_path(output, 3), shard_path(output, 3, 2), partial_path(output)]
    own += [Path("/data/out.run/run.json"), Path("/data/out.run/launches/1/plan.json")]
    others = [output, Path("/data/out.jsonl.bak"), Path("/other/out_rank0.jsonl")]
    others += [Path("/data/out_rank.jsonl"), Path("/data/out.run"), Path("/data/out.runs/a")]
    assert [is_own_name(path, output) for path in own + others] == [True] * 5 + [False] * 6


def test_only_this_outputs_shards_are_listed_by_rank_and_age(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    names = [*(f"out_rank{r}.jsonl" for r in (0, 2, 10)), "out_rank2.1.jsonl", "out_rank2.10.jsonl"]
    others = ["out.jsonl", "outXrank0.jsonl", "out_rank0.jsonl.bak", "my_out_rank0.jsonl"]
    others += ["out_rank.jsonl", "out_ranka.jsonl", "out_rank0.x.jsonl", "out2_rank0.jsonl"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "out_rank7.jsonl").mkdir()
    assert [path.name for path in list_shards(output)] == [
        "out_rank0.jsonl",
        "out_rank2.jsonl",
        "out_rank2.1.jsonl",
        "out_rank2.10.jsonl",
        "out_rank10.jsonl",
    ]
    assert list_shards(tmp_path / "o+t.jsonl") == [], "a stem is no pattern"


def test_each_process_makes_a_file_of_its_own(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    writers = [ShardWriter(output, 0) for _ in range(3)] + [ShardWriter(output, 1)]
    paths = [writer.open() for writer in writers]
    assert [path.name for path in paths] == [
        "o_rank0.jsonl",
        "o_rank0.1.jsonl",
        "o_rank0.2.jsonl",
        "o_rank1.jsonl",
    ]
    assert writers[0].open() == paths[0], "opening twice is opening once"
    for number, writer in enumerate(writers):
        writer.append(shard_line(number + 1))
        writer.sync()
        writer.close()
        writer.close()
    assert [len(found_in(path)) for path in paths] == [1, 1, 1, 1]
    assert list_shards(output) == paths


def test_a_file_that_is_there_is_never_touched_not_even_an_empty_one(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    shard_path(output, 0).write_bytes(b"theirs")
    shard_path(output, 0, 1).symlink_to(tmp_path / "nowhere")
    writer = ShardWriter(output, 0)
    assert writer.open().name == "o_rank0.2.jsonl"
    writer.append(b"mine\n")
    writer.close()
    assert shard_path(output, 0).read_bytes() == b"theirs"
    assert not (tmp_path / "nowhere").exists()
    assert writer.size_bytes == 5


def test_only_what_was_appended_since_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker syncs every second, also while a model loads; closing comes after the last time."""
    synced: list[int] = []
    writer = ShardWriter(tmp_path / "o.jsonl", 0)
    writer.sync()
    writer.open()
    monkeypatch.setattr("ragfleet.shards.os.fsync", synced.append)
    writer.sync()
    assert len(synced) == 0
    for number in (1, 2):
        writer.append(shard_line(number))
        writer.sync()
        writer.sync()
        assert len(synced) == number
    writer.append(shard_line(3))
    writer.close()
    assert len(synced) == 3


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Can't create .*o_rank0.jsonl: No such file"):
        ShardWriter(tmp_path / "gone" / "o.jsonl", 0).open()


def test_a_short_write_is_a_storage_error_and_what_was_whole_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ShardWriter(tmp_path / "o.jsonl", 0)
    path = writer.open()
    writer.append(shard_line(1))
    whole = writer.size_bytes
    write = os.write
    monkeypatch.setattr("ragfleet.shards.os.write", lambda fd, data: write(fd, data[:-7]))
    with pytest.raises(StorageError, match="no space left"):
        writer.append(shard_line(2))
    monkeypatch.undo()
    assert writer.size_bytes == whole
    assert [key for key, *_ in found_in(path)] == [(1).to_bytes(16, "big")]
    writer.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_failing_disk_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    writer = ShardWriter(tmp_path / "o.jsonl", 0)
    path = writer.open()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("ragfleet.shards.os.write", fail)
        with pytest.raises(StorageError, match=os.strerror(number)) as caught:
            writer.append(b"x\n")
        assert str(path) in str(caught.value)
    writer.append(b"x\n")
    with monkeypatch.context() as patch:
        patch.setattr("ragfleet.shards.os.fsync", fail)
        with pytest.raises(StorageError, match="Can't sync"):
            writer.sync()
    writer.close()


# ---- reading


@given(
    st.lists(
        st.tuples(st.booleans(), st.text(st.characters(codec="utf-8"), max_size=6)),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=6)
def test_a_shard_cut_at_any_byte_gives_every_whole_line_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[bool, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut_rank0.jsonl"
    rows = [shard_line(n + 1, n, success, text) for n, (success, text) in enumerate(lines)]
    data = b"".join(rows)
    ends = np.cumsum([len(row) for row in rows]).tolist()
    path.write_bytes(data)
    for cut in range(len(data), -1, -1):
        os.truncate(path, cut)
        index = scan_shards([path])
        # A line that only lacks its line end is whole.
        whole = [number for number, end in enumerate(ends) if end - 1 <= cut]
        assert [row["key_lo"] for row in index.answers] == [
            split_key((n + 1).to_bytes(16, "big"))[1] for n in whole
        ]
        for number, row in zip(whole, index.answers, strict=True):
            start, length = int(row["offset"]), int(row["length"])
            assert start == ends[number] - len(rows[number])
            again = parse_shard_row(data[:cut][start : start + length])
            assert again.finished_at_ns == number
            assert again.success == lines[number][0] == bool(row["success"])
        torn = cut > 0 and not any(cut in (end, end - 1) for end in ends)
        assert index.num_invalid == torn


KEY = "0" * 32
SOUND = {
    "answer": "a",
    "inference_time": 0.5,
    "worker_rank": 0,
    "success": True,
    "request_key": KEY,
    "finished_at_ns": 5,
}
GARBAGE: dict[str, bytes] = {
    "text": b"hello",
    "NULs": b"\x00" * 50,
    "half": shard_line()[:40],
    "its other half": shard_line()[40:-1],
    "two at once": shard_line()[:-1] + shard_line()[:-1],
    "a contexts line": b'{"id":"a","query":"q","context":"c"}',
    "not UTF-8": shard_line(text="x").replace(b'"x"', b'"\xff"')[:-1],
    "not UTF-8, unread": shard_line(other="x").replace(b'"x"', b'"\xff"')[:-1],
    "deep": b"[" * 10**5,
    "array": b"[]",
    **{
        f"{name} {value!r}"[:40]: json.dumps({**SOUND, name: value}).encode()
        for name, value in [
            ("request_key", "0" * 31),
            ("request_key", "0" * 34),
            ("request_key", "g" * 32),
            ("request_key", "00 " * 10 + "00"),
            ("request_key", " " * 32),
            ("request_key", "٣" * 32),
            ("request_key", None),
            ("finished_at_ns", 1.5),
            ("finished_at_ns", -1),
            ("finished_at_ns", 2**63),
            ("finished_at_ns", 10**40),
            ("success", 1),
            ("success", "true"),
            ("answer", None),
            ("answer", 5),
            ("inference_time", "fast"),
            ("inference_time", 1e300),
            ("inference_time", float("nan")),
            ("worker_rank", "0"),
            ("error_type", 7),
            ("error_type", None),
            ("prompt_tokens", "many"),
            ("completion_tokens", [1]),
            ("finish_reason", 3),
        ]
    },
    **{
        f"no {name}": json.dumps({k: v for k, v in SOUND.items() if k != name}).encode()
        for name in SOUND
    },
}


@pytest.mark.parametrize("name", GARBAGE)
def test_lines_that_are_no_results_are_counted_and_skipped(tmp_path: Path, name: str) -> None:
    path = tmp_path / "o_rank0.jsonl"
    before, after = shard_line(1), shard_line(2)
    path.write_bytes(before + GARBAGE[name] + b"\n" + b"\n \r\n" + after)
    index = scan_shards([path])
    assert index.num_invalid == 1
    assert len(index.answers) == 2
    assert [line for line, *_ in found_in(path)] == [n.to_bytes(16, "big") for n in (1, 2)]
    start, length = int(index.answers[1]["offset"]), int(index.answers[1]["length"])
    assert path.read_bytes()[start : start + length] == after


def test_a_sound_line_of_someone_else_is_read(tmp_path: Path) -> None:
    path = tmp_path / "o_rank0.jsonl"
    path.write_bytes(json.dumps(SOUND, indent=None).encode() + b"\r\n" + shard_line(9))
    assert len(scan_shards([path]).answers) == 2


def test_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "o_rank0.jsonl"
    path.write_bytes(b"")
    for paths in ([], [path]):
        winners = choose(scan_shards(paths))
        assert len(winners.answers) == 0
        assert winners.find(np.array([1, 2], "<u8"), np.array([1, 2], "<u8")).tolist() == [-1, -1]


def test_finished_keys_from_an_offset_on(tmp_path: Path) -> None:
    path = tmp_path / "o_rank0.jsonl"
    rows = [shard_line(1), shard_line(2, success=False), b"torn\n", shard_line(3)]
    path.write_bytes(b"".join(rows))
    one, two, three = (n.to_bytes(16, "big") for n in (1, 2, 3))
    assert finished_keys(path, 0) == {one, two, three}
    assert finished_keys(path, len(rows[0])) == {two, three}
    assert finished_keys(path, sum(map(len, rows))) == set()
    assert finished_keys(path, 10**9) == set()
    assert finished_keys(tmp_path / "gone.jsonl", 0) == set()


# ---- choosing


def answers_of(rows: list[tuple[int, int, int, int, int, bool]]) -> np.ndarray[Any, Any]:
    """Rows of (hi, lo, finished_at_ns, shard, offset, success)."""
    answers = np.zeros(len(rows), ANSWER)
    for number, (hi, lo, at, shard, offset, success) in enumerate(rows):
        answers[number] = (hi, lo, at, offset, 10, shard, success, 0)
    return answers


def indexed(rows: list[tuple[int, int, int, int, int, bool]], names: list[str]) -> ShardIndex:
    return ShardIndex(tuple(Path(name) for name in names), answers_of(rows), 0)


NAMES = ["o_rank0.jsonl", "o_rank1.jsonl", "o_rank1.1.jsonl"]
places = st.tuples(
    st.integers(0, 2),  # hi
    st.integers(0, 2),  # lo
    st.integers(0, 3),  # finished_at_ns
    st.integers(0, 2),  # shard
    st.integers(0, 20),  # offset
    st.booleans(),
)
some_places = st.lists(places, max_size=25, unique_by=lambda row: (row[3], row[4]))


def chosen(index: ShardIndex) -> dict[tuple[int, int], tuple[int, str, int, bool]]:
    return {
        (int(row["key_hi"]), int(row["key_lo"])): (
            int(row["finished_at_ns"]),
            index.paths[int(row["shard"])].name,
            int(row["offset"]),
            bool(row["success"]),
        )
        for row in choose(index).answers
    }


@given(some_places)
def test_the_rule_of_choosing(rows: list[tuple[int, int, int, int, int, bool]]) -> None:
    expected: dict[tuple[int, int], tuple[int, str, int, bool]] = {}
    for key in {row[:2] for row in rows}:
        mine = [(row[2], NAMES[row[3]], row[4], row[5]) for row in rows if row[:2] == key]
        good = [row for row in mine if row[3]]
        bad = [(-at, name, offset, ok) for at, name, offset, ok in mine if not ok]
        if good:
            expected[key] = min(good)
        else:
            at, *rest = min(bad)
            expected[key] = (-at, *rest)
    index = indexed(rows, NAMES)
    winners = choose(index)
    assert chosen(index) == expected
    assert winners.num_superseded == len(rows) - len(expected)
    keys = [(int(row["key_hi"]), int(row["key_lo"])) for row in winners.answers]
    assert keys == sorted(keys)


@given(some_places, st.randoms(use_true_random=False), st.permutations(range(3)))
def test_choosing_is_blind_to_order_and_idempotent(
    rows: list[tuple[int, int, int, int, int, bool]], random: Any, order: list[int]
) -> None:
    index = indexed(rows, NAMES)
    shuffled = [(*row[:3], order.index(row[3]), *row[4:]) for row in rows]
    random.shuffle(shuffled)
    permuted = indexed(shuffled, [NAMES[number] for number in order])
    assert chosen(permuted) == chosen(index)
    once = choose(index)
    twice = choose(ShardIndex(index.paths, once.answers, 0))
    assert np.array_equal(once.answers, twice.answers)
    assert twice.num_superseded == 0


def test_a_retry_beats_the_failure_and_a_late_success_changes_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "o_rank0.jsonl", tmp_path / "o_rank0.1.jsonl"
    first.write_bytes(shard_line(1, at=50, success=False) + shard_line(2, at=60))
    second.write_bytes(shard_line(1, at=40) + shard_line(2, at=70) + shard_line(2, 1, False))
    for paths in ([first, second], [second, first]):
        winners = choose(scan_shards(paths))
        assert winners.answers["finished_at_ns"].tolist() == [40, 60]
        assert winners.answers["success"].tolist() == [1, 1]
        assert winners.num_superseded == 3


# ---- finding

words = st.one_of(st.integers(0, 3), st.sampled_from([2**63, 2**64 - 1, 2**64 - 2]))


@given(
    st.lists(st.tuples(words, words), max_size=30, unique=True),
    st.lists(st.tuples(words, words), max_size=30),
)
def test_find_is_a_dict(present: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    present = sorted(present)
    model = {key: place for place, key in enumerate(present)}
    winners = Winners((), answers_of([(hi, lo, 0, 0, 0, True) for hi, lo in present]))
    asked = asked + present
    hi = np.array([hi for hi, _ in asked], "<u8")
    lo = np.array([lo for _, lo in asked], "<u8")
    assert winners.find(hi, lo).tolist() == [model.get(key, -1) for key in asked]
