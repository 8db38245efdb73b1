"""The shell scripts and the entry point beside them, without a model.

A stub stands in for Python and prints what it was given, so these tests see the command that the
scripts really exec.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "utils" / "RAGutils" / "queryResultByInfer"
RUN = SCRIPTS / "run_multi_worker_inference.sh"
PIPELINE = SCRIPTS / "run_complete_pipeline.sh"
ENTRY = SCRIPTS / "multi_worker_inference.py"
STUB = """#!/bin/sh
echo "pid $$"
for argument; do echo "argument $argument"; done
exit 7
"""


class Scripts:
    """Runs the scripts in a clean environment, from `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stub = directory / "stub"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)
        self.model = directory / "model"
        self.model.mkdir()

    def run(self, *flags: str, script: Path = RUN, cwd: Path = ROOT, **environment: str) -> Shown:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        settings = {"MODEL_PATH": str(self.model), "PYTHON": str(self.stub)} | environment
        process = subprocess.Popen(
            ["bash", str(script), *flags],
            cwd=cwd,
            env=kept | {name: value for name, value in settings.items() if value != "UNSET"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stdout, stderr = process.communicate(timeout=20)
        return Shown(process.pid, process.returncode, stdout, stderr)

    def config(self, text: str) -> str:
        path = self.directory / "my.env"
        path.write_bytes(text.encode())
        return str(path)


class Shown:
    """What one run printed: the settings with their origins, and the arguments of the stub."""

    def __init__(self, pid: int, exit_code: int, stdout: str, stderr: str) -> None:
        self.pid, self.exit_code, self.stdout, self.stderr = pid, exit_code, stdout, stderr
        rows = re.findall(r"^  ([A-Z_]+) +(.+?)  +(\S.*)$", stdout, re.MULTILINE)
        self.settings = {name: (value, origin) for name, value, origin in rows}
        self.arguments = re.findall(r"^argument (.*)$", stdout, re.MULTILINE)

    def flag(self, name: str) -> str | None:
        if name not in self.arguments:
            return None
        assert self.arguments.count(name) == 1
        return self.arguments[self.arguments.index(name) + 1]


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def test_defaults_of_the_script(scripts: Scripts) -> None:
    shown = scripts.run()
    assert shown.exit_code == 7, shown.stderr
    assert shown.arguments[0] == str(ENTRY.relative_to(ROOT))
    assert shown.settings["NUM_WORKERS"] == ("2", "script")
    assert shown.flag("--num_workers") == "2"
    assert shown.flag("--contexts_file") == "examples/contexts.jsonl"
    # Empty means: left to ragfleet.
    assert shown.settings["MAX_SAMPLES_PER_WORKER"] == ("-", "script")
    assert shown.flag("--max_samples_per_worker") is None
    assert "--python" not in shown.arguments


def test_python_replaces_the_shell_so_signals_arrive(scripts: Scripts) -> None:
    shown = scripts.run()
    assert f"pid {shown.pid}\n" in shown.stdout


@pytest.mark.parametrize(
    ("config", "environment", "flags", "effective"),
    [
        ("", {}, [], "0.2 script"),
        ("TEMPERATURE=0.5", {}, [], "0.5 my.env"),
        ("TEMPERATURE=0.5", {"TEMPERATURE": "0.6"}, [], "0.6 environment"),
        ("TEMPERATURE=0.5", {"TEMPERATURE": "0.6"}, ["--temperature", "0.7"], "0.7 flag"),
        ("TEMPERATURE=0.5", {}, ["--temperature=0.7"], "0.7 flag"),
    ],
)
def test_precedence(
    scripts: Scripts, config: str, environment: dict[str, str], flags: list[str], effective: str
) -> None:
    shown = scripts.run(*flags, CONFIG=scripts.config(config), **environment)
    value, origin = shown.settings["TEMPERATURE"]
    assert f"{value} {Path(origin).name}" == effective
    given = [argument for argument in shown.arguments if "temperature" in argument]
    assert len(given) == 1
    assert shown.flag("--temperature") == value or given == [f"--temperature={value}"]


def test_an_empty_environment_variable_clears_a_setting(scripts: Scripts) -> None:
    shown = scripts.run(
        CONFIG=scripts.config("MAX_SAMPLES_PER_WORKER=9"), MAX_SAMPLES_PER_WORKER=""
    )
    assert shown.settings["MAX_SAMPLES_PER_WORKER"] == ("-", "environment")
    assert shown.flag("--max_samples_per_worker") is None


def test_flags_are_passed_on_as_they_are(scripts: Scripts) -> None:
    flags = ["--max-new-tokens", "9", "--stop", "a b", "*", "", "--verbose"]
    shown = scripts.run(*flags)
    assert shown.arguments[-len(flags) :] == flags
    assert shown.settings["MAX_NEW_TOKENS"] == ("9", "flag")
    assert shown.flag("--max_new_tokens") is None


def test_config_file_syntax(scripts: Scripts) -> None:
    text = (
        "# a comment\r\n\n"
        "NUM_WORKERS=4   # four\r\n"
        "export SEED=7\n"
        "  MODEL_PATH='/models/a $b' # single quotes are literal\n"
        'CONTEXTS_FILE="my contexts.jsonl"\n'
        "OUTPUT_FILE=a#b\n"
        "TOP_P="
    )
    shown = scripts.run(CONFIG=scripts.config(text), MODEL_PATH="UNSET")
    assert shown.exit_code == 7, shown.stderr
    assert shown.flag("--num_workers") == "4"
    assert shown.flag("--seed") == "7"
    assert shown.flag("--model_path") == "/models/a $b"
    assert shown.flag("--contexts_file") == "my contexts.jsonl"
    assert shown.flag("--output_file") == "a#b"
    assert shown.flag("--top_p") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("NUM_WORKER=3", "no setting NUM_WORKER; the nearest is NUM_WORKERS."),
        ("temperature=1", "the nearest is TEMPERATURE."),
        ("SCHEDULE=static", "Other flags of ragfleet go on the command line."),
        ("NUM_WORKERS 3", "not a KEY=VALUE line"),
        ("MODEL_PATH=a b", "put the value in quotes"),
        ("MODEL_PATH=$HOME/model", "not expanded"),
        ("MODEL_PATH=~/model", "not expanded"),
        ('MODEL_PATH="$(touch ran)"', "not expanded"),
        ("MODEL_PATH=`touch ran`", "put the value in quotes"),
        ("a[$(touch ran)]=1", "not a KEY=VALUE line"),
        ("touch ran", "not a KEY=VALUE line"),
    ],
)
def test_config_mistakes_are_named_and_nothing_runs(
    scripts: Scripts, line: str, message: str
) -> None:
    config = scripts.config("NUM_WORKERS=2\n" + line + "\n")
    shown = scripts.run(CONFIG=config, cwd=scripts.directory)
    assert shown.exit_code == 2
    assert f"{config}:2: " in shown.stderr
    assert message in shown.stderr
    assert shown.stdout == ""
    assert not (scripts.directory / "ran").exists()


def test_config_that_is_not_there(scripts: Scripts) -> None:
    shown = scripts.run(CONFIG="nowhere.env")
    assert shown.exit_code == 2
    assert "CONFIG=nowhere.env: no such file" in shown.stderr


def test_paths_from_another_directory(scripts: Scripts) -> None:
    shown = scripts.run("--output_file", "mine.jsonl", cwd=scripts.directory, SEED="1")
    assert shown.arguments[0] == str(ENTRY)
    # The script's own paths start at the project, the caller's where the caller is.
    assert shown.flag("--contexts_file") == str(ROOT / "examples" / "contexts.jsonl")
    assert shown.flag("--output_file") == "mine.jsonl"


@pytest.mark.parametrize("script", [RUN, PIPELINE])
@pytest.mark.parametrize("links_folder", [False, True])
def test_started_through_a_link(scripts: Scripts, script: Path, links_folder: bool) -> None:
    link = scripts.directory / "link"
    link.symlink_to(script.parent if links_folder else script)
    started = link / script.name if links_folder else link
    shown = scripts.run(script=started, cwd=scripts.directory)
    assert shown.exit_code == 7, shown.stderr
    assert Path(shown.arguments[0]).parent == SCRIPTS
    assert (shown.flag("--output_file") or "").startswith(f"{ROOT}/results/")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_config_that_begins_with_a_byte_order_mark(scripts: Scripts, locale: str) -> None:
    shown = scripts.run(CONFIG=scripts.config("\ufeffSEED=7\r\nTOP_P=1\r\n"), LC_ALL=locale)
    assert shown.exit_code == 7, shown.stderr
    assert (shown.flag("--seed"), shown.flag("--top_p")) == ("7", "1")


def test_a_toml_file_outweighs_the_defaults_only(scripts: Scripts) -> None:
    shown = scripts.run("--config", "run.toml", TOP_P="0.5")
    assert shown.settings["NUM_WORKERS"] == ("-", "left to run.toml")
    assert shown.flag("--num_workers") is None
    assert shown.flag("--top_p") == "0.5"
    assert shown.flag("--model_path") == str(scripts.model)


def test_dry_run_prints_the_command(scripts: Scripts) -> None:
    shown = scripts.run("--stop", "a b", DRY_RUN="1", MODEL_PATH="UNSET")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-1].rstrip().endswith(r"--stop a\ b")
    assert shown.arguments == []


def test_the_default_model_is_the_demo_model(scripts: Scripts) -> None:
    shown = scripts.run(MODEL_PATH="UNSET", cwd=scripts.directory)
    assert shown.flag("--model_path") == "pocket"
    shown = scripts.run(MODEL_PATH="UNSET", INFERENCE_TYPE="huggingface")
    assert shown.exit_code == 2
    assert "id of a Hub model" in shown.stderr


def test_started_with_sh(scripts: Scripts) -> None:
    done = subprocess.run(
        ["sh", str(RUN)],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": str(scripts.stub)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--num_workers 2" in done.stdout


def test_the_pipeline_has_settings_of_both(scripts: Scripts) -> None:
    shown = scripts.run("--seed", "3", script=PIPELINE, CONTEXTS_FILE="mine.jsonl", MAX_TOKENS="9")
    assert shown.exit_code == 7, shown.stderr
    assert shown.arguments[0].endswith("/complete_pipeline.py")
    assert shown.settings["CONTEXTS_FILE"] == ("mine.jsonl", "environment")
    assert shown.settings["QUERIES_FILE"] == ("examples/queries.jsonl", "script")
    assert shown.flag("--max_tokens") == "9"
    assert "--enable_str_match" in shown.arguments
    off = scripts.run("--max_documents", "3", script=PIPELINE, ENABLE_STR_MATCH="false")
    assert "--no_enable_str_match" in off.arguments
    assert off.flag("--max_documents") == "3"
    assert scripts.run(script=PIPELINE, ENABLE_STR_MATCH="perhaps").exit_code == 2
    assert shown.flag("--contexts_file") == "mine.jsonl"
    assert shown.arguments[-2:] == ["--seed", "3"]
    assert f"pid {shown.pid}\n" in shown.stdout


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_entry_point_on_an_old_python() -> None:
    pretend = f"import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({str(ENTRY)!r})"
    done = run_python("-c", pretend)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "3.8.1" in done.stderr


def test_entry_point_without_dependencies() -> None:
    done = run_python("-S", str(ENTRY), "--output_file", "o")  # -S: no site-packages
    assert done.returncode == 2
    assert "-m pip install -e" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["multi_worker_inference.py", "complete_pipeline.py"])
def test_entry_point_through_a_link_finds_its_package(tmp_path: Path, name: str) -> None:
    """Links to the whole folder's files, as a tool that deploys by links makes them."""
    for file in SCRIPTS.glob("*.py"):
        (tmp_path / file.name).symlink_to(file)
    done = run_python("-S", str(tmp_path / name), "--output_file", "o")  # -S: no site-packages
    assert done.returncode == 2
    assert f'-m pip install -e "{ROOT}"' in done.stderr
    assert "Traceback" not in done.stderr


def test_entry_point_runs_this_tree() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from multi_worker_inference import QueryBasedInference\n"
        "import ragfleet\n"
        "assert QueryBasedInference is ragfleet.QueryBasedInference\n"
        "print(ragfleet.__file__)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(ROOT / "src")


@pytest.mark.parametrize(
    "flags", [["--skip-inference"], pytest.param([], marks=pytest.mark.slow)], ids=str
)
def test_the_documented_check_passes(flags: list[str]) -> None:
    done = run_python(str(SCRIPTS / "test_multi_worker_inference.py"), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("All as expected.\n")


def test_print_answers_is_safe_on_a_terminal(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "query": "q", "answer": None, "success": False},
        {"id": "b", "query": "什么？", "answer": "red \x1b[31m\nnext", "success": True},
        {"id": "c", "query": "q", "answer": "x" * 1000, "success": True},
        {"id": "d", "query": "q", "answer": "not shown", "success": True},
    ]
    results = tmp_path / "results.jsonl"
    results.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    done = run_python(str(ROOT / "tools" / "print_answers.py"), str(results), "2")
    assert done.returncode == 0, done.stderr
    assert "b: 什么？\n  -> red \\x1b[31m next\n" in done.stdout
    assert "\x1b" not in done.stdout
    assert "x" * 400 + "…" in done.stdout
    assert "not shown" not in done.stdout
    assert str(results) in done.stdout


def test_print_answers_of_ids_with_their_source(tmp_path: Path) -> None:
    context = "### m.g (m==1)\ng(b=1)\n\n### m.f (m==1)\nf(b=1)"
    rows = [
        {"id": n, "query": "q", "answer": a, "target_api": "m.f", "success": True}
        for n, a in (("a", "b=1"), ("b", "no"))
    ]
    results, contexts = tmp_path / "results.jsonl", tmp_path / "contexts.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contexts.write_text("".join(json.dumps({**row, "context": context}) + "\n" for row in rows))
    command = [str(ROOT / "tools" / "print_answers.py"), str(results), "--contexts", str(contexts)]
    done = run_python(*command, "--ids", "b", "a")
    assert done.returncode == 0, done.stderr
    assert "b: q\n  -> no\n     not word for word in the documentation\n" in done.stdout
    assert done.stdout.index("b: q") < done.stdout.index("a: q")
    assert "documentation, line 5: f(b=1)\n" in done.stdout
    done = run_python(*command, "--ids", "c")
    assert done.returncode == 1
    assert "no answer for c" in done.stderr


def test_make_names_the_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["make", "test", "PYTHON=false"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed, and false is not that" in done.stderr
    assert not (tmp_path / ".venv").exists()
