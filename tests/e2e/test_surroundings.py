"""What surrounds a run: names, the locale, streams closed or full, a folder that is gone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ragfleet.cli import main

ECHO = "--engine echo --temperature 0"
INFER = f"infer --contexts_file in.jsonl --output_file out.jsonl {ECHO}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"r{n}", "query": f"q{n}", "context": "c"}) for n in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which $R is the command line of ragfleet."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "R": f"{sys.executable} -m ragfleet", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize("flag", ["--contexts_file", "--output_file"])
def test_a_name_that_is_not_utf8_is_refused(folder: Path, flag: str) -> None:
    done = shell(folder, f"cp in.jsonl $'in\\xff.jsonl'; $R {INFER} {flag} $'in\\xff.jsonl'")
    assert done.returncode == 2
    assert f"{flag} {folder}/in\\udcff.jsonl is not UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out.run").exists()
    assert len(list(folder.iterdir())) == 2


def test_a_locale_that_knows_ascii_alone_is_named(folder: Path) -> None:
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = f"$R infer --contexts_file in.jsonl --output_file 结果.jsonl {ECHO}"
    done = shell(folder, command, **ascii_alone)
    (folder / "run.toml").write_text('output_file = "结果.jsonl"\n', encoding="utf-8")
    other = f"$R infer --contexts_file in.jsonl --config run.toml {ECHO}"
    for refused in (done, shell(folder, other, **ascii_alone)):
        assert refused.returncode == 2
        assert "can't be told in this locale" in refused.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "run.toml"]
    assert shell(folder, command, **{**ascii_alone, "PYTHONUTF8": "1"}).returncode == 0
    assert (folder / "结果.jsonl").exists()


def test_a_record_is_shown_whatever_the_locale_knows(folder: Path) -> None:
    record = {"id": "问题一", "query": "What is it?", "context": "A text."}
    (folder / "in.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
    command = "$R show 问题一 --contexts_file in.jsonl --engine echo"
    for utf8 in ("0", "1"):
        done = shell(folder, command, LC_ALL="POSIX", PYTHONUTF8=utf8, PYTHONCOERCECLOCALE="0")
        assert done.returncode == 0, done.stderr
        assert "What is it?" in done.stdout


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_a_run_needs_no_console(folder: Path, closed: str) -> None:
    done = shell(folder, f"$R {INFER} {closed}")
    assert done.returncode == 0, done.stderr
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 3
    assert "FINISHED: 3 of 3" in done.stdout or ">&-" in closed.split()


def test_a_full_disk_for_what_is_printed(folder: Path) -> None:
    done = shell(folder, f"$R {INFER} >/dev/full")
    assert done.returncode == 0, "the results are whole"
    assert "Can't write the output: No space left on device. The results are comp" in done.stderr
    assert "Traceback" not in done.stderr
    assert len((folder / "out.jsonl").read_bytes().splitlines()) == 3
    for command in ("verify in.jsonl out.jsonl", "--version", "status --output_file out.jsonl"):
        done = shell(folder, f"$R {command} >/dev/full")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "No space left on device" in done.stderr
    assert shell(folder, f"$R {INFER} 2>/dev/full").returncode == 0


def test_a_working_directory_that_is_gone(folder: Path) -> None:
    gone = "mkdir gone; cd gone; rmdir ../gone; "
    for command in (INFER, INFER.replace("in.jsonl", f"{folder}/in.jsonl"), "verify a b"):
        done = shell(folder, f"{gone} $R {command}")
        assert done.returncode == 2
        assert done.stderr == "ragfleet: The working directory is gone: cd into one that exists.\n"
    done = shell(
        folder,
        f"{gone} $R {INFER}".replace("in.jsonl", f"{folder}/in.jsonl").replace(
            "out.jsonl", f"{folder}/out.jsonl"
        ),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"), [(os.ST_RDONLY, "is on a read-only file system"), (0, "no permission")]
)
def test_why_nothing_can_be_written(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: int,
    says: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("ragfleet.preparation.os.access", lambda path, mode: False)
    monkeypatch.setattr(
        "ragfleet.preparation.os.statvfs", lambda path: SimpleNamespace(f_flag=flags)
    )
    assert main(INFER.split()) == 2
    assert says in capsys.readouterr().err


def test_a_missing_package_is_told_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "openai" else find(name)
    )
    flags = "--inference_type openai --api_model_name m --base_url http://127.0.0.1:9/v1"
    files = "--contexts_file in.jsonl --output_file out.jsonl"
    assert main(f"infer {files} {flags}".split()) == 2
    assert "needs the openai package: pip install" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]
