"""--private, and hostile text in everything that is printed or logged."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

HOSTILE = "\x1b]0;owned\x07\x1b[2J\nFINISHED: 1 of 1"


def ragfleet(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ragfleet", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        umask=0o022,
    )


def on_a_terminal(folder: Path, *arguments: str) -> str:
    """What a command prints where its output is a terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ragfleet", *arguments]
    with open(master, "rb", buffering=0) as terminal:
        subprocess.run(command, cwd=folder, stdout=slave, stderr=slave, timeout=60, check=False)
        os.close(slave)
        said = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := terminal.read(1 << 16):
                said += part
    return said.decode().replace("\r\n", "\n")


def infer(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    files = ("--contexts_file", "in.jsonl", "--output_file", "out.jsonl")
    return ragfleet(folder, "infer", *files, "--engine", "echo", "--temperature", "0", *flags)


def write_input(folder: Path, count: int = 4) -> None:
    records = [{"id": f"r{n}", "query": f"q{n}", "context": "c"} for n in range(count)]
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def readable_by_others(folder: Path) -> list[str]:
    """What others can get at; what is inside a closed folder they can't."""
    found = []
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink():
                found.append(str(path.relative_to(folder)))
        folders[:] = [name for name in folders if Path(place, name).stat().st_mode & 0o077]
    return sorted(found)


def test_a_private_run_is_its_owners_alone(tmp_path: Path) -> None:
    write_input(tmp_path)
    done = infer(tmp_path, "--private", "--num_workers", "2")
    assert done.returncode == 0, done.stderr
    assert readable_by_others(tmp_path) == ["in.jsonl"]
    assert (tmp_path / "out.run").stat().st_mode & 0o777 == 0o700
    for shard in tmp_path.glob("out_rank*.jsonl"):
        assert shard.stat().st_mode & 0o777 == 0o600
    # A resume and a merge keep to it without being told.
    write_input(tmp_path, 8)
    assert infer(tmp_path).returncode == 0
    assert ragfleet(tmp_path, "merge", "--output_file", "out.jsonl", "--partial").returncode == 0
    assert (tmp_path / "out.partial.jsonl").exists()
    assert readable_by_others(tmp_path) == ["in.jsonl"]
    assert infer(tmp_path, "--overwrite").returncode == 0
    assert readable_by_others(tmp_path) == ["in.jsonl"]


def test_a_run_becomes_private_with_all_it_has_written(tmp_path: Path) -> None:
    write_input(tmp_path)
    assert infer(tmp_path).returncode == 0
    assert len(readable_by_others(tmp_path)) > 4
    assert infer(tmp_path, "--private").returncode == 0
    assert readable_by_others(tmp_path) == ["in.jsonl"]
    assert not [path for path in (tmp_path / "out.run").rglob("*") if path.stat().st_mode & 0o077]


CLASS = """
from ragfleet import QueryBasedInference

class Mine(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        if query.startswith("bad"):
            raise ValueError(f"no answer to {query}")
        return query
"""


def test_hostile_text_reaches_no_terminal_and_no_log(tmp_path: Path) -> None:
    """In ids, queries, errors and shards: printed and logged without what a terminal obeys."""
    (tmp_path / "mine.py").write_text(CLASS)
    records = [
        {"id": f"{HOSTILE}{n}", "query": f"{word} {HOSTILE}", "context": HOSTILE}
        for n, word in enumerate(["good", "bad", "good", "worse"])
    ]
    lines = [json.dumps(record) for record in records] + [f'{{"id": "{HOSTILE}"']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    done = infer(tmp_path, "--inference_class", "mine.py:Mine", "--verbose")
    assert done.returncode == 0, done.stderr
    outputs = {"infer": done.stderr + done.stdout}
    for name, *arguments in (
        ("verify", "in.jsonl", "out.jsonl"),
        ("status", "--output_file", "out.jsonl"),
        ("merge", "--output_file", "out.jsonl", "--partial"),
        ("plan", "--contexts_file", "in.jsonl", "--engine", "echo"),
    ):
        result = ragfleet(tmp_path, name, *arguments)
        outputs[name] = result.stdout + result.stderr
    outputs["failures"] = on_a_terminal(tmp_path, "failures", "out.jsonl")
    assert '"id": ' in outputs["failures"]
    show = ("show", f"{HOSTILE}0", "--contexts_file", "in.jsonl", "--engine", "echo")
    outputs["show"] = on_a_terminal(tmp_path, *show)
    assert "owned" in outputs["show"]
    # Elsewhere than on a terminal both are exact.
    piped = ragfleet(tmp_path, "failures", "out.jsonl").stdout.splitlines()
    assert piped == [lines[1], *lines[4].splitlines()]
    outputs["log"] = (tmp_path / "out.run" / "logs" / "worker_0.log").read_text()
    assert "no answer to bad" in outputs["infer"]
    assert "no answer to bad" in outputs["log"]
    assert "NOT VERIFIED" not in outputs["verify"]
    # Now with a row to be named.
    output = tmp_path / "out.jsonl"
    output.write_text(output.read_text().replace("good", "evil"))
    result = ragfleet(tmp_path, "verify", "in.jsonl", "out.jsonl")
    outputs["verify of another answer"] = result.stdout + result.stderr
    assert "NOT VERIFIED" in outputs["verify of another answer"]
    for name, text in outputs.items():
        raw = [char for char in text if not char.isprintable() and char not in "\n\t"]
        assert not raw, (name, raw)
    said = [line for line in outputs["infer"].splitlines() if line.startswith("FINISHED:")]
    assert said == []
