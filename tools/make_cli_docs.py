"""Write docs/cli.md from the command line itself; `--check` fails when it is out of date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("infer", "plan", "show", "status", "merge", "verify", "failures"),
    *("corpus build", "contexts", "pipeline", "export", "import"),
)


def help_of(*arguments: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    output = subprocess.run(
        [sys.executable, "-m", "ragfleet", *arguments, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=ROOT,
    ).stdout
    return "\n".join(line.rstrip() for line in output.splitlines())


def page() -> str:
    parts = [
        "# Command line",
        "Made by `python tools/make_cli_docs.py` from `--help`; `make lint` checks it.",
        f"```\n{help_of()}\n```",
    ]
    for command in COMMANDS:
        parts += [f"## ragfleet {command}", f"```\n{help_of(*command.split())}\n```"]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    target = ROOT / "docs" / "cli.md"
    text = page()
    if "--check" in sys.argv[1:]:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            print("docs/cli.md is out of date: python tools/make_cli_docs.py", file=sys.stderr)
            return 1
        return 0
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
