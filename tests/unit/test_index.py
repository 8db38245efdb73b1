"""One pass over the input: every record where it is, and one clear complaint about a whole file."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ragfleet.errors import InputError
from ragfleet.index import Index, Kind, build_index
from ragfleet.plan import join_key
from ragfleet.records import Head, Keyer, parse_head

KEYER = Keyer(bytes(16), (), False)
BOM = b"\xef\xbb\xbf"
GOOD = b'{"id":"a","query":"q","context":"c"}'
CHINESE = '{"query":"怎么求和?","context":"用 sum"}\n'


def index_of(path: Path, data: bytes) -> Index:
    path.write_bytes(data)
    return build_index(path, KEYER)


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        build_index(path, KEYER)
    return str(caught.value)


def reread(path: Path, index: Index) -> list[bytes]:
    data = path.read_bytes()
    lines = []
    for row in index.records:
        line = data[int(row["offset"]) : int(row["offset"]) + int(row["length"])]
        assert xxhash.xxh3_64_intdigest(line) == row["line_hash"]
        lines.append(line)
    return lines


# ---- places


@pytest.mark.parametrize("bom", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "unended"])
def test_records_are_found_whatever_ends_a_line(
    tmp_path: Path, bom: bytes, end: bytes, last: bool
) -> None:
    other = b'{"query":"r","context":"c"}'
    lines = [GOOD, b"", other, b"  \t", b"broken", GOOD]
    data = bom + end.join(lines) + (end if last else b"")
    path = tmp_path / "c.jsonl"
    index = index_of(path, data)
    assert [line.strip() for line in reread(path, index)] == [GOOD, other, b"broken", GOOD]
    assert index.records["line_no"].tolist() == [1, 3, 5, 6]
    assert index.records["kind"].tolist() == [Kind.SEND, Kind.SEND, Kind.INVALID, Kind.SEND]
    assert index.records["leader"].tolist() == [0, 1, 2, 3]
    assert index.num_missing_ids == 2
    assert [number for number, _ in index.first_invalid] == [5]


lines_ = st.one_of(
    st.builds(
        lambda query, context, identifier: json.dumps(
            {"id": identifier, "query": query, "context": context}, ensure_ascii=False
        ).encode(),
        st.text(st.characters(codec="utf-8"), max_size=10),
        st.text(st.characters(codec="utf-8"), max_size=10),
        st.none() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=3),
    ),
    st.sampled_from([b"", b" ", b"\t\r", b"{", b'{"query":"q"}', b"[]", b"\xff", b"7", b"\x0b"]),
    st.just(b'{"query":"q","context":"c","success":false}'),
)


@given(
    st.lists(st.tuples(lines_, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_each_record_is_read_again_at_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[bytes, bytes]],
    bom: bool,
    unended: bool,
) -> None:
    lines = [(GOOD, b"\n"), *lines, (GOOD, b"\n"), *[(GOOD, b"\n")] * len(lines)]
    data = b"".join(line + end for line, end in lines)
    data = data[:-1] if unended else data
    path = tmp_path_factory.getbasetemp() / "again.jsonl"
    index = index_of(path, BOM * bom + data)
    expected = [
        (number, line)
        for number, line in enumerate(data.split(b"\n"), 1)
        if line and not line.isspace()
    ]
    assert [line.rstrip(b"\n") for line in reread(path, index)] == [line for _, line in expected]
    assert index.records["line_no"].tolist() == [number for number, _ in expected]
    for (_, line), row in zip(expected, index.records, strict=True):
        head = parse_head(line)
        if isinstance(head, Head) and head.error is None:
            assert row["kind"] == Kind.SEND
            assert join_key(int(row["key_hi"]), int(row["key_lo"])) == KEYER.key(head, line)
        else:
            kind = Kind.FAILED_CONTEXT if isinstance(head, Head) else Kind.INVALID
            assert row["kind"] == kind
            assert row["key_hi"] == row["key_lo"] == 0


def test_records_of_one_prefix_share_a_group(tmp_path: Path) -> None:
    index = index_of(
        tmp_path / "c.jsonl",
        '{"query":"a","context":"文档","retrieval_method":"m"}\n'
        '{"query":"bcd","context":"文档","retrieval_method":"m"}\n'
        '{"query":"a","context":"文档","retrieval_method":"n"}\n'
        '{"query":"a","context":"else"}\n'.encode(),
    )
    first, second, third, fourth = index.grouping.tolist()
    assert first[0] == second[0]
    assert len({first[0], third[0], fourth[0]}) == 3
    assert first[1:] == (6, 1)
    assert second[1:] == (6, 3)


def test_a_last_line_cut_in_the_middle_is_one_invalid_record(tmp_path: Path) -> None:
    index = index_of(tmp_path / "c.jsonl", GOOD + b"\n" + GOOD[:20])
    assert index.records["kind"].tolist() == [Kind.SEND, Kind.INVALID]


def test_only_the_first_ten_invalid_lines_are_told(tmp_path: Path) -> None:
    index = index_of(tmp_path / "c.jsonl", GOOD + b"\nx" * 30)
    assert len(index) == 31
    assert [number for number, _ in index.first_invalid] == list(range(2, 12))


def test_progress_is_told_in_records_and_share(tmp_path: Path) -> None:
    path, seen = tmp_path / "c.jsonl", []
    path.write_bytes((GOOD + b"\n") * (1 << 17))
    build_index(path, KEYER, lambda count, share: seen.append((count, share)))
    assert seen == [(1 << 16, 0.5), (1 << 17, 1.0)]
    assert len(build_index(path, KEYER)) == 1 << 17, "or to nobody"


def test_the_index_may_be_written_to(tmp_path: Path) -> None:
    """Planning gives duplicates their leaders in place."""
    index = index_of(tmp_path / "c.jsonl", GOOD)
    index.records["leader"] = 7
    assert np.array_equal(index.records["leader"], [7])


# ---- whole files


def command_of(message: str) -> str:
    """What a message ends in: the command to copy."""
    return message.rpartition(": ")[2]


@pytest.mark.parametrize("name", ["c.jsonl", "c", "my contexts (1).jsonl", "a'b.txt"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [("gbk", "GB18030"), ("utf-16", "UTF-16"), ("latin-1", "ISO-8859-1")],
)
def test_another_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, name: str, encoding: str, named: str
) -> None:
    text = '{"query":"café","context":"déjà"}\n' if encoding == "latin-1" else CHINESE
    path = tmp_path / name
    path.write_bytes((text * 5).encode(encoding))
    message = complaint(path)
    assert f"{path} is not UTF-8 (it looks like {named})" in message
    target = path.with_suffix(".utf8.jsonl")
    words = shlex.split(command_of(message))
    assert words == ["iconv", "-f", named, "-t", "UTF-8", str(path), ">", str(target)]
    subprocess.run(command_of(message), shell=True, check=True)
    assert target.read_text(encoding="utf-8") == text * 5
    assert len(build_index(target, KEYER)) == 5


def test_half_of_a_file_in_gbk_is_told_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    bad = CHINESE.encode("gbk")
    index = index_of(path, (CHINESE.encode() + bad) * 3)
    assert index.records["kind"].tolist() == [0, 1] * 3
    assert len(index_of(path, CHINESE.encode() + b"x\n" + bad)) == 3, "one good line is enough"
    path.write_bytes(CHINESE.encode() + bad * 2)
    assert "GB18030" in complaint(path)


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl", "c d.jsonl"])
def test_a_compressed_file_is_refused_with_a_command_that_works(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD))
    message = complaint(path)
    assert f"{path} is gzip-compressed" in message
    command = command_of(message)
    target = Path(shlex.split(command)[-1])
    assert target.suffix == ".jsonl"
    assert target != path
    subprocess.run(command, shell=True, check=True)
    assert len(build_index(target, KEYER)) == 1
    assert path.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"[" + GOOD + b"]",
        b"[" + GOOD + b"]\n",
        b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n",
        b"[\n",
        BOM + b"\n [" + GOOD + b",\n" + GOOD + b"]",
        b"[" + b'{"query":"' + b"q" * 9000 + b'","context":"c"}]',
    ],
    ids=["one line", "ended", "pretty", "cut", "after a BOM", "long"],
)
@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c d.json"])
def test_a_json_array_is_refused_and_never_written_over(
    tmp_path: Path, data: bytes, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    message = complaint(path)
    target = tmp_path / f"{path.stem}.lines.jsonl"
    assert f"{path} is a JSON array" in message
    assert shlex.split(command_of(message)) == ["jq", "-c", ".[]", str(path), ">", str(target)]
    assert target != path


def test_a_first_line_that_is_an_array_is_one_bad_line(tmp_path: Path) -> None:
    index = index_of(tmp_path / "c.jsonl", b"[1, 2]\n" + GOOD + b"\n")
    assert index.records["kind"].tolist() == [Kind.INVALID, Kind.SEND]


def test_a_file_that_is_not_there_or_empty_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    assert complaint(path) == f"There is no contexts file {path}."
    path.write_bytes(b"")
    assert complaint(path) == f"The contexts file {path} is empty."
    for blank in (b"\n\n \r\n", BOM, BOM + b"\n"):
        path.write_bytes(blank)
        assert complaint(path) == f"{path} has no records: every line is blank."
    assert complaint(tmp_path) == f"The contexts file {tmp_path} is a folder; name a file in it."
    below = path / "c.jsonl"
    assert complaint(below) == f"Can't read the contexts file {below}: Not a directory."


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for whoever writes
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        assert "socket is a socket, not a regular file" in complaint(tmp_path / "socket")
    assert "pipe is a pipe, not a regular file" in complaint(tmp_path / "pipe")
    assert "/dev/zero is a device, not a regular file" in complaint(Path("/dev/zero"))


def test_a_name_that_each_process_has_for_a_file_of_its_own_is_refused(tmp_path: Path) -> None:
    """`--contexts_file /dev/stdin < c.jsonl`: a worker's stdin is nothing."""
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    with (tmp_path / "c.jsonl").open("rb") as file:
        for folder in ("/dev/fd", "/proc/self/fd"):
            name = Path(folder, str(file.fileno()))
            assert f"The contexts file {name} is another file to each process" in complaint(name)
        stdin = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            message = complaint(Path("/dev/stdin"))
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
        assert "The contexts file /dev/stdin is another file to each process" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    assert "Permission denied" in complaint(path)


def test_a_file_without_one_record_says_what_is_wrong_with_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b"\nid,query,context\n1,q,c\n")
    message = complaint(path)
    assert message.startswith(f"{path}: not one of 2 lines is a record; line 2: not valid JSON")


def test_failed_contexts_are_records(tmp_path: Path) -> None:
    index = index_of(tmp_path / "c.jsonl", b'{"query":"q","success":false,"error":"none"}\nx\n')
    assert index.records["kind"].tolist() == [Kind.FAILED_CONTEXT, Kind.INVALID]


def test_repeated_ids_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "contexts.jsonl"
    lines = [
        {"id": identifier, "query": "q", "context": "c"}
        for identifier in ("a", "b", "a", None, None, 7, "7", "a")
    ]
    lines.append({"id": "b", "query": ""})  # invalid, under its own id
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    index = build_index(path, Keyer(bytes(16), (), False))
    assert index.num_repeated_ids == 4, "7 and '7' are one name in the output's logs"
    assert index.num_missing_ids == 2
