"""What bad input gets: each row of the documented table, run as a user would.

Nearly everything here starts the command line in a process of its own; all of it looks at the exit
code, the last words and the files that are left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ragfleet.cli import main
from ragfleet.earlier_files import backup_names, before_replacing, move_away
from ragfleet.errors import OutputError
from ragfleet.identity import RunFile, read_run_file
from ragfleet.launch import RunPaths
from ragfleet.records import decode_object
from ragfleet.rows import SHARD_FIELDS
from ragfleet.summary import MergeStatistics
from ragfleet.verify import failed_inputs, verify

KEYS = [
    *("id", "original_item_id", "query_index", "dedup_key", "query", "target_api"),
    *("dependencies", "retrieval_method", "context_length", "answer", "retrieval_time"),
    *("inference_time", "total_time", "worker_rank", "success"),
]
ECHO = ("--engine", "echo", "--temperature", "0")
MODEL = ("--temperature", "0", "--max_new_tokens", "8", "--device", "cpu")
Done = subprocess.CompletedProcess[str]


def ragfleet(
    directory: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    preexec_fn: Callable[[], None] | None = None,
) -> Done:
    """One command, in `directory`."""
    return subprocess.run(
        [sys.executable, "-m", "ragfleet", *arguments],
        cwd=directory,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        preexec_fn=preexec_fn,
    )


def infer(directory: Path, *flags: str, contexts: str = "in", **how: Any) -> Done:
    files = ("--contexts_file", f"{contexts}.jsonl", "--output_file", "out.jsonl")
    return ragfleet(directory, "infer", *files, *flags, **how)


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def without_lock(directory: Path) -> dict[str, bytes | None]:
    """The lock's file names its last holder; all else stays."""
    return {name: data for name, data in contents(directory).items() if name != "out.run/lock"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "query": f"q{number}", "context": f"c{number}", **fields}


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    path.write_text(text, encoding="utf-8")


def resumed(done: Done) -> list[str]:
    """The arguments of the resume command that was printed."""
    found = re.search(r"^Go on with:\n  ragfleet (.*)$", done.stderr, re.MULTILINE)
    assert found, done.stderr
    return shlex.split(found[1])


# ------------------------------------------------------------------ rows of their own kind


@dataclass(frozen=True)
class Hostile:
    """A line of a file that is otherwise fine."""

    line: bytes
    id: str | int | None = None
    """Of its failure row; None: `line:<n>`."""
    reason: str = ""
    error_type: str = "invalid_record"


HOSTILE = {
    "malformed JSON": Hostile(b'{"id": "cut", "query": "q', reason="not valid JSON"),
    "empty braces missing": Hostile(b"}{", reason="not valid JSON"),
    "an array": Hostile(b"[1, 2]", reason="not a JSON object"),
    "a string": Hostile(b'"text"', reason="not a JSON object"),
    "not UTF-8 in the query": Hostile(
        b'{"id": "a", "query": "caf\xe9", "context": "c"}', reason="not UTF-8"
    ),
    "not UTF-8 in a field nobody reads": Hostile(
        b'{"id": "a", "query": "q", "context": "c", "x": "\xff"}', reason="not UTF-8"
    ),
    "NaN": Hostile(b'{"id": "a", "query": "q", "context": "c", "x": NaN}', reason="not valid JSON"),
    "Infinity": Hostile(b'{"id": "a", "query": "q", "context": Infinity}', reason="not valid JSON"),
    "a lone surrogate": Hostile(
        rb'{"id": "a", "query": "\ud800", "context": "c"}', reason="surrogate"
    ),
    "a lone surrogate in a field nobody reads": Hostile(
        rb'{"id": "a", "query": "q", "context": "c", "x": "\udc00 "}', reason="surrogate"
    ),
    **{
        f"nested {depth} deep": Hostile(
            b'{"query": "q", "context": "c", "x": %b%b}' % (b"[" * depth, b"]" * depth),
            reason="nested more than 200 deep",
        )
        for depth in (200, 985, 986, 987, 988, 989, 990, 991, 100_000)
    },
    "a blank query": Hostile(
        b'{"id": "blank", "query": " \\t", "context": "c"}', "blank", "`query` is blank"
    ),
    "no query": Hostile(b'{"id": "none", "context": "c"}', "none", "`query` is missing"),
    "a query of the wrong type": Hostile(
        b'{"id": "number", "query": 7, "context": "c"}', "number", "`query` is a number"
    ),
    "a context of the wrong type": Hostile(
        b'{"id": 12, "query": "q", "context": ["c"]}', 12, "`context` is a list"
    ),
    "success of the wrong type": Hostile(
        b'{"id": "s", "query": "q", "context": "c", "success": "yes"}', "s", "`success` is a string"
    ),
    "a failed context": Hostile(
        b'{"id": "f", "query": "q", "context": "", "success": false, "error": "no document"}',
        "f",
        "no document",
        "context_failed",
    ),
    "a failed context without a reason": Hostile(
        b'{"id": "g", "query": "q", "context": null, "success": false}',
        "g",
        "no reason given",
        "context_failed",
    ),
}
FINE = [
    b'{"id": "twice", "query": "q1", "context": "c"}',
    b'{"query": "q2", "context": "c", "retrieval_time": 0.5}',
    b'{"id": "twice", "query": "q3", "context": "c"}',
    b'{"query": "q4", "context": "c", "deep": %b%b}' % (b"[" * 199, b"]" * 199),
    b'{"query": "q5", "context": "c", "large": [1e999, %b]}' % (b"9" * 5000),
    b'{"query": "q6", "context": "c", "request_key": "mine", "finished_at_ns": 7, "row_check": 0}',
    b'{"id": null, "query": "q7", "context": "c", "success": null, "kept": [1, "\xe4\xb8\xad"]}',
]


@dataclass(frozen=True)
class Answered:
    directory: Path
    rows: list[dict[str, Any]]
    done: Done


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """One run over a file of all hostile lines, and then a few that are fine."""
    directory = tmp_path_factory.mktemp("hostile")
    lines = [*(hostile.line for hostile in HOSTILE.values()), *FINE]
    (directory / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    done = infer(directory, *ECHO)
    assert done.returncode == 0, done.stderr
    rows = [decode_object(line) for line in (directory / "out.jsonl").read_bytes().splitlines()]
    return Answered(directory, rows, done)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_line_gets_a_failure_row(answered: Answered, name: str) -> None:
    place, hostile = list(HOSTILE).index(name), HOSTILE[name]
    row = answered.rows[place]
    assert row["id"] == (f"line:{place + 1}" if hostile.id is None else hostile.id)
    assert (row["error_type"], row["success"]) == (hostile.error_type, False)
    assert hostile.reason in row["error"]


def test_failure_rows_have_all_documented_keys(answered: Answered) -> None:
    for row in answered.rows[: len(HOSTILE)]:
        assert list(row)[: len(KEYS)] == KEYS
        assert row["answer"] is None
        assert row["worker_rank"] is None
        assert (row["inference_time"], row["retrieval_time"], row["total_time"]) == (0.0, 0.0, 0.0)


def test_the_job_goes_on_and_says_how_many_failed(answered: Answered) -> None:
    assert len(answered.rows) == len(HOSTILE) + len(FINE)
    good = answered.rows[len(HOSTILE) :]
    assert [row["answer"] for row in good] == [f"q{number + 1}" for number in range(len(FINE))]
    assert all(row["total_time"] >= row["retrieval_time"] for row in good)
    last = answered.done.stdout.splitlines()[-1]
    bad, every = len(HOSTILE), len(answered.rows)
    assert last.startswith(f"FINISHED WITH {bad} FAILURES of {every} selected")
    assert f"invalid_record {len(HOSTILE) - 2}, context_failed 2" in last


def test_a_missing_id_is_named_by_its_line(answered: Answered) -> None:
    first = len(HOSTILE)
    assert answered.rows[first + 1]["id"] == f"line:{first + 2}"
    assert answered.rows[-1]["id"] == f"line:{first + len(FINE)}"
    assert answered.rows[first + 1]["retrieval_time"] == 0.5
    assert "without an id" in answered.done.stderr


def test_duplicate_ids_are_answered_one_by_one(answered: Answered) -> None:
    twice = [row for row in answered.rows if row["id"] == "twice"]
    assert [row["answer"] for row in twice] == ["q1", "q3"]


def test_unknown_fields_pass_through(answered: Answered) -> None:
    assert answered.rows[-1]["kept"] == [1, "中"]
    of_shards = {name: answered.rows[-2][name] for name in SHARD_FIELDS}
    assert of_shards == {"request_key": "mine", "finished_at_ns": 7, "row_check": 0}


def test_all_of_it_is_verified_and_merged_alike_by_whoever_does_it(answered: Answered) -> None:
    output = answered.directory / "out.jsonl"
    before = output.read_bytes()
    done = ragfleet(answered.directory, "verify", "in.jsonl", "out.jsonl")
    assert "VERIFIED: one row" in done.stdout, done.stdout
    assert main(["merge", "--output_file", str(output)]) == 0
    assert output.read_bytes() == before
    output.write_bytes(before.replace(b"1e999", b"1e998"))
    done = ragfleet(answered.directory, "verify", "in.jsonl", "out.jsonl")
    output.write_bytes(before)
    assert "differs in large\nNOT VERIFIED: 1 rows" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: None, ""),
        (lambda rows: rows.pop(), "row {last}: missing (record line:{last})"),
        (lambda rows: rows.append(rows[0]), "row {next}: one too many"),
        (lambda rows: rows.insert(0, rows.pop(0)[9:]), "row 1: not a JSON object"),
        (
            lambda rows: rows.append(rows.pop().replace(b',"kept"', b',"more":1,"kept"')),
            "row {last} (line:{last}): differs in more",
        ),
        (
            lambda rows: rows.append(rows.pop().replace(b'"answer":"q7"', b'"answer":"q8"')),
            "row {last} (line:{last}): differs in answer",
        ),
    ],
    ids=["none", "missing", "too many", "torn", "another field", "another answer"],
)
@pytest.mark.parametrize("shards", ["all", "gone"])
def test_what_falls_short_is_named(
    answered: Answered, tmp_path: Path, shards: str, change: Any, problem: str
) -> None:
    folder = shutil.copytree(answered.directory, tmp_path / "copy", symlinks=True)
    rows = answered.directory.joinpath("out.jsonl").read_bytes().splitlines(keepends=True)
    change(rows)
    (folder / "out.jsonl").write_bytes(b"".join(rows))
    if shards == "gone":
        (folder / "out_rank0.jsonl").unlink()
    found = verify(folder / "in.jsonl", folder / "out.jsonl")
    is_proved = shards == "all" or "differs in answer" not in problem
    last = len(answered.rows)
    assert found.problems == [problem.format(last=last, next=last + 1)] * bool(
        problem and is_proved
    )
    assert found.num_problems == len(found.problems)
    assert found.answers_proved == (shards == "all")
    assert found.rows == len(rows)
    assert found.succeeded == len(FINE) - (problem.startswith("row {last}: missing"))
    assert found.failed == sum(found.errors.values())
    said = "\n".join(found.lines(folder / "out.jsonl"))
    assert ("The shards are gone" in said) == (shards == "gone")
    assert ("NOT VERIFIED: 1 rows" in said) == bool(found.problems)


def test_what_shards_have_no_answer_for_is_not_verified(answered: Answered, tmp_path: Path) -> None:
    folder = shutil.copytree(answered.directory, tmp_path / "copy", symlinks=True)
    shard = folder / "out_rank0.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(line for line in lines if b'"answer":"q7"' not in line))
    last = len(answered.rows)
    missing = f"row {last} (line:{last}): its current record has no answer in the shards"
    assert verify(folder / "in.jsonl", folder / "out.jsonl").problems == [missing]
    (folder / "out.jsonl").unlink()
    with pytest.raises(OutputError, match=r"There is no .*out.jsonl yet"):
        verify(folder / "in.jsonl", folder / "out.jsonl")
    (folder / "out.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"out.jsonl is a folder"):
        verify(folder / "in.jsonl", folder / "out.jsonl")


def test_failed_contexts_can_be_dropped(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(1), record(2, success=False, error="gone"), record(3)])
    done = infer(tmp_path, *ECHO, "--failed_contexts", "drop")
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["r1", "r3"]
    assert "1 dropped" in done.stdout
    assert list(failed_inputs(tmp_path / "out.jsonl")) == []
    # Turning them into rows again generates nothing.
    done = infer(tmp_path, *ECHO)
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["r1", "r2", "r3"]
    assert "0 generated in this start + 2 resumed" in done.stdout
    (failed,) = failed_inputs(tmp_path / "out.jsonl")
    assert json.loads(failed)["id"] == "r2"
    write(tmp_path / "out.jsonl", rows_of(tmp_path / "out.jsonl")[:2])
    with pytest.raises(OutputError, match="not of the current selection"):
        list(failed_inputs(tmp_path / "out.jsonl"))


def test_failures_are_exit_3_where_asked(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(1), record(2, query="")])
    done = infer(tmp_path, *ECHO, "--fail_on_errors")
    assert done.returncode == 3
    assert len(rows_of(tmp_path / "out.jsonl")) == 2


def test_bom_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    lines = [json.dumps(record(number), ensure_ascii=False).encode() for number in range(4)]
    text = b"\xef\xbb\xbf%b\r\n\n \t\r\n%b\n%b\r\n\r\n%b" % tuple(lines)
    (tmp_path / "in.jsonl").write_bytes(text)
    done = infer(tmp_path, *ECHO)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["id"], row["answer"]) for row in rows] == [(f"r{n}", f"q{n}") for n in range(4)]
    assert done.stdout.splitlines()[-1].startswith("FINISHED: 4 of 4")


# ------------------------------------------------------------------ whole files and flags


@dataclass(frozen=True)
class Refused:
    """A start that is refused: exit 2, one message, nothing written."""

    says: str
    """A regular expression."""
    flags: tuple[str, ...] = ECHO
    contexts: bytes | None = b'{"query": "q", "context": "c"}\n'
    prepare: Callable[[Path], object] = lambda directory: None


CHINESE = json.dumps(record(1, query="形状是什么？"), ensure_ascii=False) + "\n"


def pickled_model(directory: Path) -> None:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "pytorch_model.bin").write_bytes(b"pickle")


def cut_model(directory: Path) -> None:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little"))


def model_without_tokenizer(directory: Path) -> None:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def foreign_output(directory: Path) -> None:
    (directory / "out.jsonl").write_text("somebody's\n")


REFUSED = {
    "another encoding": Refused(
        r"not UTF-8.*\n?.*iconv -f GB18030 -t UTF-8 .*in\.jsonl > .*in\.utf8\.jsonl",
        contexts=CHINESE.encode("gb18030"),
    ),
    "UTF-16": Refused(r"iconv -f UTF-16 -t UTF-8", contexts=CHINESE.encode("utf-16")),
    "no valid line": Refused(r"not one of 2 lines is a record; line 1: ", contexts=b"a\n{}\n"),
    "an array of records": Refused(r"JSON array.*jq -c", contexts=b'[\n{"query": "q"}\n]\n'),
    "compressed": Refused(r"gunzip", contexts=b"\x1f\x8b\x08\x00"),
    "no such file": Refused(r"There is no contexts file .*in\.jsonl", contexts=None),
    "an empty file": Refused(r"in\.jsonl is empty", contexts=b""),
    "only blank lines": Refused(r"every line is blank", contexts=b"\n \n"),
    "the contexts file is a folder": Refused(
        r"The contexts file \. is a folder; name a file in it", (*ECHO, "--contexts_file", ".")
    ),
    "the contexts file's name is too long": Refused(
        r"Can't read the contexts file .*File name too long",
        (*ECHO, "--contexts_file", "x" * 300 + ".jsonl", "--overwrite"),
        prepare=foreign_output,
    ),
    "the contexts file is a pipe": Refused(
        r"is a pipe, not a regular file", contexts=None, prepare=lambda d: os.mkfifo(d / "in.jsonl")
    ),
    "the output is a folder": Refused(
        r"is a folder; name a file in it", (*ECHO, "--output_file", ".")
    ),
    "the output is a device": Refused(
        r"/dev/null is no ordinary file", (*ECHO, "--output_file", "/dev/null")
    ),
    "the output is a link to nothing": Refused(
        r"link\.jsonl is a link to nothing; name the file itself",
        (*ECHO, "--output_file", "link.jsonl", "--overwrite"),
        prepare=lambda d: (d / "link.jsonl").symlink_to("elsewhere.jsonl"),
    ),
    "no prompt has room": Refused(
        r"--max_new_tokens 4,096 leaves no room for a prompt: the model takes 4,096 tokens",
        ("--model_path", "pocket", "--device", "cpu", "--max_new_tokens", "4096"),
    ),
    "more than the model takes": Refused(
        r"--max_model_len 5000 is above the 4096 that .*config\.json allows",
        ("--model_path", "pocket", "--device", "cpu", "--max_model_len", "5000"),
    ),
    "the output is a stream": Refused(
        r"/proc/self/exe is no ordinary file",
        (*ECHO, "--output_file", "/proc/self/exe", "--overwrite"),
    ),
    "the output's name leaves no room": Refused(
        r"has 246 bytes; with more than 225", (*ECHO, "--output_file", f"{'中' * 80}.jsonl")
    ),
    "the output is the input": Refused(
        r"is the contexts file itself", (*ECHO, "--output_file", "in.jsonl")
    ),
    "the output is below a file": Refused(
        r"Can't write to .*is a file, not a folder", (*ECHO, "--output_file", "in.jsonl/out.jsonl")
    ),
    "the output is where nobody can write": Refused(
        r"Can't (write|create)", (*ECHO, "--output_file", "/proc/nowhere/out.jsonl")
    ),
    "the output's name is too long": Refused(
        r"File name too long", (*ECHO, "--output_file", "x" * 300 + ".jsonl")
    ),
    "the output is somebody else's": Refused(
        r"out\.jsonl exists, and no run of ragfleet made it.*--overwrite", prepare=foreign_output
    ),
    "an unknown flag": Refused(
        r"(?s)--max_new_token\b.*Perhaps you meant:.*--max_new_tokens", (*ECHO, "--max_new_token=4")
    ),
    "an unknown value": Refused(r"(?s)'turbo'.*'dynamic'.*'static'", (*ECHO, "--schedule=turbo")),
    "a word where a number belongs": Refused(
        r"(?s)two.*--num_workers", (*ECHO, "--num_workers=two")
    ),
    "an unknown setting in TOML": Refused(
        r"run\.toml: there is no setting temprature\. Did you mean temperature\?",
        (*ECHO, "--config", "run.toml"),
        prepare=lambda directory: (directory / "run.toml").write_text("temprature = 1\n"),
    ),
    "a value that means nothing": Refused(
        r"--top_p is 2\.0; it must be above 0 and at most 1", (*ECHO, "--top_p", "2")
    ),
    "GPUs without GPUs": Refused(
        r"--device cpu uses no GPU, but --total_gpus is 2",
        ("--model_path", "pocket", "--device", "cpu", "--total_gpus", "2"),
    ),
    "no room for a prompt": Refused(
        r"--max_model_len 8 leaves no room for a prompt beside --max_new_tokens 8",
        (*ECHO, "--max_model_len", "8", "--max_new_tokens", "8"),
    ),
    "an engine and an inference type that disagree": Refused(
        r"--engine echo uses no model; leave --inference_type out",
        (*ECHO, "--inference_type", "huggingface"),
    ),
    "a template that is not there": Refused(
        r"--prompt_template nowhere\.j2 can't be read", (*ECHO, "--prompt_template", "nowhere.j2")
    ),
    "a class that is not there": Refused(
        r"there is no file .*mine\.py", (*ECHO, "--inference_class", "mine.py:Mine")
    ),
    "no model named": Refused(r"--model_path is missing", MODEL),
    "a bad model path": Refused(
        r"There is no model folder .*nowhere/model\..*--inference_type huggingface",
        (*MODEL, "--model_path", "nowhere/model"),
    ),
    "an empty model folder": Refused(
        r"config\.json is missing: this is not a model folder", (*MODEL, "--model_path", ".")
    ),
    "a model of pickles": Refused(
        r"only pickled weights.*convert once:\n.*save_pretrained.* \S+/model \S+/model-safetensors",
        (*MODEL, "--model_path", "model"),
        prepare=pickled_model,
    ),
    "a model without a tokenizer": Refused(
        r"model: there is no tokenizer here.*download it again",
        (*MODEL, "--model_path", "model"),
        prepare=model_without_tokenizer,
    ),
    "a model cut short": Refused(
        r"model\.safetensors is cut short or not safetensors; download it again",
        (*MODEL, "--model_path", "model"),
        prepare=cut_model,
    ),
    "the Together API": Refused(
        r"There is no API key for .*: set TOGETHER_API_KEY in the environment",
        (*MODEL, "--model_path", "m", "--inference_type", "togetherai"),
    ),
}


IN_A_PROCESS = ("another encoding", "an unknown flag", "a model of pickles")
"""The others run in this one: each would be little but the start of an interpreter."""


def called(*arguments: str, capture: pytest.CaptureFixture[str]) -> Done:
    """As `ragfleet`, in this process and its working directory."""
    try:
        code: Any = main(arguments)
    except SystemExit as end:  # a word that the parser of arguments does not know
        code = end.code
    out, err = capture.readouterr()
    return Done(arguments, code, out, err)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    case = REFUSED[name]
    if case.contexts is not None:
        (tmp_path / "in.jsonl").write_bytes(case.contexts)
    case.prepare(tmp_path)
    before = contents(tmp_path)
    if name in IN_A_PROCESS:
        done = infer(tmp_path, *case.flags)
    else:
        monkeypatch.chdir(tmp_path)
        files = ("--contexts_file", "in.jsonl", "--output_file", "out.jsonl")
        done = called("infer", *files, *case.flags, capture=capfd)
    assert done.returncode == 2, done.stderr
    text = re.sub(r"[│╭╮╰╯─]+", " ", done.stderr)
    assert re.search(case.says, text), done.stderr
    assert contents(tmp_path) == before
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_the_iconv_line_mends_the_file(tmp_path: Path) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed here")
    (tmp_path / "in.jsonl").write_bytes(CHINESE.encode("gb18030"))
    command = re.search(r"iconv .*", infer(tmp_path, *ECHO).stderr)
    assert command
    subprocess.run(command[0], shell=True, cwd=tmp_path, check=True, timeout=10)
    assert infer(tmp_path, *ECHO, contexts="in.utf8").returncode == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["answer"] == "形状是什么？"


# ------------------------------------------------------------------ too long


@pytest.mark.timeout(300)  # a model is loaded, on a machine that may be busy
def test_too_long_for_the_model(tmp_path: Path, small_model: Path) -> None:
    long = "first words " + "and a long explanation " * 200 + "last words"
    records = [record(1), record(2, context=long), record(3, query=long)]
    write(tmp_path / "in.jsonl", records)
    flags = ("--contexts_file", "in.jsonl", "--model_path", str(small_model), *MODEL)
    flags += ("--max_model_len", "300")

    cutting = ("--output_file", "out.jsonl", "--truncate_context", "tail")

    def show(how: str) -> Done:
        return ragfleet(tmp_path, "show", "r2", *flags, "--truncate_context", how)

    def both_numbers(text: str) -> bool:
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]
        return bool({292, 300} & set(numbers)) and max(numbers) > 400

    with ThreadPoolExecutor(2) as pool:
        answering = pool.submit(ragfleet, tmp_path, "infer", *flags, *cutting)
        error, head, tail = pool.map(show, ("error", "head", "tail"))
    assert (error.returncode, error.stdout) == (2, "")
    assert "too_long" in error.stderr
    assert both_numbers(error.stderr.partition("too_long")[2]), error.stderr
    assert "first words" in tail.stdout
    assert "last words" not in tail.stdout
    assert "last words" in head.stdout
    assert "first words" not in head.stdout

    done = answering.result()
    assert done.returncode == 0, done.stderr
    fits, cut, hopeless = rows_of(tmp_path / "out.jsonl")
    assert fits["success"]
    assert "truncated_tokens" not in fits
    assert cut["success"]
    assert cut["truncated_tokens"] > 100
    assert cut["prompt_tokens"] <= 292
    # No context is left to cut.
    assert hopeless["error_type"] == "too_long"
    assert both_numbers(hopeless["error"]), hopeless["error"]
    unsent = (hopeless["answer"], hopeless["worker_rank"], hopeless["inference_time"])
    assert unsent == (None, None, 0.0)
    assert "too_long 1" in done.stdout.splitlines()[-1]


# ------------------------------------------------------------------ what stops a run


def limit_file_size(num_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def check_stopped_and_resumes(directory: Path, done: Done, name: str) -> None:
    """It said so, the resume command completes, and nothing finished was generated twice."""
    assert done.returncode == 1, done.stderr
    assert re.search(rf"ragfleet: Can't write .*{name}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (directory / "out.jsonl").exists()
    assert not list(directory.glob(".*.tmp"))
    shards = b"".join(path.read_bytes() for path in sorted(directory.glob("out_rank*")))
    kept = sum(line.startswith(b"{") and line.endswith(b"}") for line in shards.splitlines())
    again = ragfleet(directory, *resumed(done))
    assert again.returncode == 0, again.stderr
    assert f" + {kept} resumed" in again.stdout
    assert [row["id"] for row in rows_of(directory / "out.jsonl")] == [f"r{n}" for n in range(200)]


def test_disk_full_for_a_worker(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(n, query="why? " * 60) for n in range(200)])
    done = infer(tmp_path, *ECHO, "--dedup", "off", preexec_fn=limit_file_size(50_000))
    assert "requests are finished and on disk" in done.stderr
    check_stopped_and_resumes(tmp_path, done, r"out_rank0\.jsonl")


def test_disk_full_for_the_merge(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(n, query="why? " * 60) for n in range(200)])
    flags = (*ECHO, "--num_workers", "2", "--schedule", "static")
    done = infer(tmp_path, *flags, preexec_fn=limit_file_size(140_000))
    check_stopped_and_resumes(tmp_path, done, r"out\.jsonl")


@pytest.mark.parametrize(
    "size_kib",
    [pytest.param(20, marks=pytest.mark.slow), 60, pytest.param(90, marks=pytest.mark.slow)],
)
def test_disk_full_of_a_file_system(tmp_path: Path, size_kib: int) -> None:
    """Full while the plan is written, while workers start, and while they answer."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={size_kib}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        write(tmp_path / "in.jsonl", [record(n, query="why? " * 60) for n in range(200)])
        done = infer(disk, *ECHO, "--num_workers", "2", "--dedup", "off", contexts="../in")
        # More room: what somebody does who reads the message.
        remount = ["mount", "-o", "remount,size=20m", str(disk)]
        subprocess.run(remount, check=True, capture_output=True, timeout=10)
        check_stopped_and_resumes(disk, done, "")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, capture_output=True, timeout=10)


GATED = """
import pathlib, time
from ragfleet import QueryBasedInference

class Gated(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        gate = pathlib.Path(__file__).with_name("gate")
        while query != "q0" and not gate.exists():
            time.sleep(0.01)
        return query
"""


@contextlib.contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ragfleet", *arguments],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize(
    "how", ["in place", "replaced", "appended", pytest.param("truncated", marks=pytest.mark.slow)]
)
def test_input_edited_during_the_run(tmp_path: Path, how: str) -> None:
    records = [record(n, context="c") for n in range(200)]
    write(tmp_path / "in.jsonl", records)
    (tmp_path / "mine.py").write_text(GATED)
    flags = (*ECHO, "--schedule", "static", "--inference_class", "mine.py:Gated")
    files = ("--contexts_file", "in.jsonl", "--output_file", "out.jsonl")
    with started(tmp_path, "infer", *files, *flags) as process:
        deadline_s = time.monotonic() + 30
        shard = tmp_path / "out_rank0.jsonl"
        while not (shard.exists() and shard.stat().st_size) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if how == "truncated":
            write(tmp_path / "in.jsonl", records[:150])
        elif how == "appended":
            records += [record(n, context="c") for n in range(200, 210)]
            write(tmp_path / "in.jsonl", records)
        else:
            records[150]["query"] = "Q150"
            place = tmp_path / ("in.jsonl" if how == "in place" else "new.jsonl")
            write(place, records)
            place.replace(tmp_path / "in.jsonl")
        (tmp_path / "gate").touch()
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1, stderr
    says = "grew by" if how == "appended" else r"was edited .*\(line 151\)"
    assert re.search(rf"in\.jsonl {says}", stderr), stderr
    assert "What is finished is safe" in stderr
    assert "Go on with:" in stderr
    assert not (tmp_path / "out.jsonl").exists()
    finished = len(shard.read_bytes().splitlines())
    assert finished >= 64
    again = infer(tmp_path, *flags)
    assert again.returncode == 0, again.stderr
    expected = [each["query"] for each in (records[:150] if how == "truncated" else records)]
    assert [row["answer"] for row in rows_of(tmp_path / "out.jsonl")] == expected
    # In place the worker noticed; a replaced file shows at the merge, when all 200 are answered.
    kept = min(finished, 150) if how == "truncated" else finished - (how == "replaced")
    assert f"{len(expected) - kept} generated in this start + {kept} resumed" in again.stdout


# ------------------------------------------------------------------ an output of another run


def test_output_of_another_run(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(n) for n in range(3)])
    assert infer(tmp_path, *ECHO, "--max_new_tokens", "8").returncode == 0
    other = (*ECHO, "--max_new_tokens", "16", "--system_prompt", "Be brief.")
    run_file = tmp_path / "out.run" / "run.json"
    whole = run_file.read_bytes()
    run_file.write_text(json.dumps({**json.loads(whole), "merged": None}))
    done = infer(tmp_path, *other)
    assert "belongs to a run with other settings" in done.stderr, "though it was never merged"
    run_file.write_bytes(whole)
    before = without_lock(tmp_path)
    done = infer(tmp_path, *other)
    assert done.returncode == 2
    assert re.search(r"out\.jsonl belongs to a run with other settings:", done.stderr)
    assert re.search(r"max_new_tokens +first start 8, now 16", done.stderr)
    assert re.search(r'system prompt +first start ".*", now "Be brief\."', done.stderr)
    assert "temperature" not in done.stderr
    assert without_lock(tmp_path) == before

    # --overwrite moves, and deletes nothing.
    done = infer(tmp_path, *other, "--overwrite")
    assert done.returncode == 0, done.stderr
    (backup,) = tmp_path.glob("out.bak-*")
    moved = contents(backup)
    assert moved["out.jsonl"] == before["out.jsonl"]
    assert moved["out_rank0.jsonl"] == before["out_rank0.jsonl"]
    assert moved["out.run/run.json"] == before["out.run/run.json"]
    assert len(rows_of(tmp_path / "out.jsonl")) == 3
    assert "3 generated in this start + 0 resumed" in done.stdout


def test_overwrite_moves_what_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(1)])
    foreign_output(tmp_path)
    assert infer(tmp_path, *ECHO, "--overwrite").returncode == 0
    (backup,) = tmp_path.glob("out.bak-*")
    assert (backup / "out.jsonl").read_text() == "somebody's\n"


def test_fewer_answers_than_before_keep_the_old_file(tmp_path: Path) -> None:
    """An input that shrank replaces the output, and the longer one stays beside it."""
    write(tmp_path / "in.jsonl", [record(n) for n in range(3)])
    assert infer(tmp_path, *ECHO).returncode == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    write(tmp_path / "in.jsonl", [record(0)])
    done = infer(tmp_path, *ECHO)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == 1
    (backup,) = tmp_path.glob("out.bak-*.jsonl")
    assert backup.read_bytes() == before
    assert backup.name in done.stderr
    assert "no selected line asks for: 2" in done.stdout


@pytest.mark.parametrize("command", ["infer", "merge"])
def test_an_output_that_was_edited_is_kept(tmp_path: Path, command: str) -> None:
    """Labels that somebody wrote into it are in no shard."""
    write(tmp_path / "in.jsonl", [record(n) for n in range(3)])
    output = tmp_path / "out.jsonl"
    merges = [sys.executable, "-m", "ragfleet", "merge", "--output_file", str(output)]

    def again() -> str:
        if command == "infer":
            return infer(tmp_path, *ECHO).stderr
        return subprocess.run(merges, capture_output=True, text=True, check=True).stdout

    assert infer(tmp_path, *ECHO).returncode == 0
    merged = output.read_bytes()
    again()
    assert not list(tmp_path.glob("*.bak*")), "it is as it was written"
    labelled = merged.replace(b'"success":true', b'"success":TRUE')
    output.write_bytes(labelled)
    said = again()
    (backup,) = tmp_path.glob("out.bak-*.jsonl")
    assert f"is not what a merge wrote: that file is kept as {backup.name}" in said
    assert (backup.read_bytes(), output.read_bytes()) == (labelled, merged)


def test_a_kill_around_the_replacement_confuses_no_output_with_an_edited_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either file may be there then; and what is kept needs no room where links can be made."""
    paths, run_file = RunPaths(tmp_path / "out.jsonl"), RunFile(run_key="", parts={}, clock="")
    digests = {text: xxhash.xxh3_128_hexdigest(text.encode()) for text in "abc"}

    def merge(new: str, there: str | None) -> str | None:
        if there is not None:
            paths.output_file.unlink(missing_ok=True)
            paths.output_file.write_text(there)
        return before_replacing(paths, run_file, MergeStatistics(), digests[new])

    assert merge("a", None) is None
    assert merge("b", "a") is None
    assert merge("c", "a") is None, "killed before b was there"
    assert merge("b", "c") is None, "or just after"
    assert merge("b", "c") is None
    assert read_run_file(paths) == run_file
    assert not list(tmp_path.glob("*.bak*"))
    for number, makes_links in enumerate([True, False], 1):
        if not makes_links:
            monkeypatch.setattr(os, "link", raise_os_error)
        note = merge("b", f"mine {number}")
        kept = set(tmp_path.glob("*.bak*"))
        assert len(kept) == number
        assert note is not None
        assert any(path.name in note and path.read_text() == f"mine {number}" for path in kept)
    paths.output_file.unlink()
    assert merge("b", None) is None


def raise_os_error(*_: object) -> None:
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("name", ["answers", ".answers", "中" * 73 + ".jsonl"])
def test_outputs_with_other_names(tmp_path: Path, name: str) -> None:
    """Without an ending, or as long as may be: moved away, kept and written all the same."""
    write(tmp_path / "in.jsonl", [record(n) for n in range(3)])
    asked = (*ECHO, "--output_file", name)
    assert infer(tmp_path, *asked).returncode == 0
    assert infer(tmp_path, *asked, "--overwrite").returncode == 0
    write(tmp_path / "in.jsonl", [record(0)])
    assert infer(tmp_path, *asked).returncode == 0
    assert len(rows_of(tmp_path / name)) == 1
    stem = Path(name).stem
    folders = [path for path in tmp_path.glob(f"{stem}.bak-*") if path.is_dir()]
    files = [path for path in tmp_path.glob(f"{stem}.bak-*") if path.is_file()]
    assert [len(rows_of(path)) for path in (*files, folders[0] / name)] == [3, 3]


def test_no_backup_takes_the_name_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file alone and a folder of all may be moved away within a second."""
    monkeypatch.setattr("ragfleet.earlier_files.time.strftime", lambda _: "now")
    output = tmp_path / "out.jsonl"
    assert backup_names(output)[0].name == "out.bak-now.jsonl"
    backup_names(output)[0].touch()
    assert backup_names(output)[0].name == "out.bak-now-1.jsonl"
    backup_names(output)[0].with_suffix("").mkdir()
    assert backup_names(output)[0].name == "out.bak-now-2.jsonl"


def test_a_run_without_any_result_is_moved_too(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    paths.directory.mkdir()
    paths.lock.touch()
    move_away(paths, private=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"], "there is nothing to move"
    paths.identity.write_text("{}")
    move_away(paths, private=False)
    (backup,) = tmp_path.glob("out.bak-*")
    assert (backup / "out.run" / "run.json").read_text() == "{}"
    assert list(paths.directory.iterdir()) == [paths.lock]


def test_environment_of_torchrun_without_torchrun(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [record(1)])
    before = contents(tmp_path)
    done = infer(tmp_path, *ECHO, environment={"RANK": "0", "WORLD_SIZE": "4"})
    assert done.returncode == 2
    assert "unset RANK WORLD_SIZE" in done.stderr
    assert contents(tmp_path) == before
