"""Files that look like a run's own but are somebody else's, and two starts that meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ragfleet import RunConfig
from ragfleet.errors import ConfigError


def write_contexts(path: Path, count: int = 6) -> None:
    rows = [{"id": f"r{n}", "query": f"q{n}", "context": "c"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(contexts: str, *flags: str) -> list[str]:
    files = ["--contexts_file", contexts, "--output_file", "out.jsonl"]
    return [sys.executable, "-m", "ragfleet", "infer", *files, "--engine", "echo", *flags]


def infer(folder: Path, contexts: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(contexts, *flags),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["out_rank0.jsonl", "out_rank3.1.jsonl", "out.partial.jsonl"])
def test_contexts_with_the_name_of_a_shard_are_refused(tmp_path: Path, name: str) -> None:
    write_contexts(tmp_path / name)
    done = infer(tmp_path, name, "--remove_shards", "--overwrite")
    assert done.returncode == 2
    assert "give one of them another name" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_results_of_another_tool_are_neither_replaced_nor_removed(tmp_path: Path) -> None:
    write_contexts(tmp_path / "in.jsonl")
    foreign = '{"id": "old", "answer": "kept"}\n'
    for name in ("out.jsonl", "out_rank0.jsonl"):
        (tmp_path / name).write_text(foreign)
    done = infer(tmp_path, "in.jsonl")
    assert done.returncode == 2
    assert "no run of ragfleet made it" in done.stderr
    (tmp_path / "out.jsonl").unlink()
    assert infer(tmp_path, "in.jsonl", "--remove_shards").returncode == 0
    assert (tmp_path / "out_rank0.jsonl").read_text() == foreign
    assert not (tmp_path / "out_rank0.1.jsonl").exists()


@pytest.mark.parametrize("name", ["out_rank8.jsonl", "out.partial.jsonl"])
def test_outputs_that_take_each_others_files_for_their_own_are_refused(
    tmp_path: Path, name: str
) -> None:
    write_contexts(tmp_path / "in.jsonl")
    for first, second in ((name, "out.jsonl"), ("out.jsonl", name)):
        folder = tmp_path / f"{first} first"
        folder.mkdir()
        assert infer(folder, "../in.jsonl", "--output_file", first).returncode == 0
        before = {path.name for path in folder.iterdir()}
        done = infer(folder, "../in.jsonl", "--output_file", second, "--overwrite")
        assert done.returncode == 2
        folder_name = f"{first.removesuffix('.jsonl')}.run"
        assert f"--output_file {second} and the run of" in done.stderr
        assert f"{folder_name} would take each other's files" in done.stderr
        assert {path.name for path in folder.iterdir()} == before
        looked = [sys.executable, "-m", "ragfleet", "verify", "../in.jsonl", first]
        assert subprocess.run(looked, cwd=folder, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "broken",
    [
        b'{"run_key":"\xff","parts":{},"clock":""}',
        b'{"run_key":"","clock":"","parts":' + b"[" * 10**5,
        b'{"run_key":"","clock":"","parts":{},"output_name":"a/b"}',
    ],
)
def test_a_neighbours_broken_run_is_not_this_ones_trouble(tmp_path: Path, broken: bytes) -> None:
    write_contexts(tmp_path / "in.jsonl")
    neighbour = tmp_path / "out_rank8.run"
    neighbour.mkdir()
    (neighbour / "run.json").write_bytes(broken)
    assert infer(tmp_path, "in.jsonl").returncode == 0
    own = tmp_path / "out.run" / "run.json"
    own.write_bytes(broken.replace(b"a/b", b"out.jsonl"))
    assert "Traceback" not in infer(tmp_path, "in.jsonl").stderr


def test_after_removed_shards_nothing_is_claimed_that_is_not_there(tmp_path: Path) -> None:
    write_contexts(tmp_path / "in.jsonl")
    assert infer(tmp_path, "in.jsonl", "--remove_shards").returncode == 0
    assert infer(tmp_path, "in.jsonl", "--remove_shards").returncode == 0
    done = infer(tmp_path, "in.jsonl", "--remove_shards", "--include_context")
    assert done.returncode == 2
    assert "its shards removed" in done.stderr


def test_two_first_starts_with_other_settings_are_not_one_run(tmp_path: Path) -> None:
    write_contexts(tmp_path / "in.jsonl", 3000)
    starts = [
        subprocess.Popen(
            command("in.jsonl", "--max_new_tokens", number),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ("10", "20")
    ]
    said = [start.communicate(timeout=60)[1] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 2], said
    assert any("max_new_tokens" in text or "is being written by" in text for text in said)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"engine": "echoo"}, "must be one of"),
        ({"schedule": "Static"}, "must be one of"),
        ({"failed_contexts": "DROP"}, "must be one of"),
        ({"temperature": "0.2"}, "--temperature is '0.2'; it must be a number"),
        ({"max_new_tokens": "64"}, "--max_new_tokens is '64'; it must be a number"),
        # Not two strings of one character, at which answers would end.
        ({"stop": "Q:"}, "--stop is 'Q:'; it must be a list of strings"),
    ],
)
def test_settings_made_in_python_are_checked(setting: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunConfig(contexts_file="in", output_file="out", **{"engine": "echo", **setting})  # type: ignore[arg-type]
