"""Looking at ragfleet must be instant: nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "vllm", "ray", "accelerate", "huggingface_hub"}
REPORT = (
    "import json, sys; print('\\n' + json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
)


def modules_of(code: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_loads_nothing_else() -> None:
    loaded = modules_of("import ragfleet")
    assert "ragfleet" in loaded
    assert not loaded & {*HEAVY, "numpy", "msgspec", "tyro", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["infer", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_of(f"from ragfleet.cli import main\nassert main({arguments!r}) == 0")
    assert "ragfleet" in loaded
    assert not loaded & HEAVY
    assert "numpy" not in loaded


@pytest.mark.parametrize("command", ["plan", "show"])
def test_planning_loads_nothing_heavy(command: str, tmp_path: Path) -> None:
    contexts = tmp_path / "contexts.jsonl"
    contexts.write_text('{"id": "a", "query": "How?", "context": "So."}\n')
    words = [command, *(["a"] if command == "show" else []), "--engine", "echo"]
    words += ["--contexts_file", str(contexts), "--output_file", str(tmp_path / "out.jsonl")]
    loaded = modules_of(f"from ragfleet.cli import main\nassert main({words!r}) == 0")
    assert not loaded & HEAVY


def test_a_worker_without_a_model_loads_nothing_heavy() -> None:
    loaded = modules_of("import ragfleet.worker_main, ragfleet.worker, ragfleet.engines.echo")
    assert not loaded & {*HEAVY, "tyro", "rich", "pynvml"}
