"""Print answers of a results file: the first ones, or those of some ids.

    python tools/print_answers.py RESULTS [COUNT]
    python tools/print_answers.py RESULTS --ids ID ... [--contexts CONTEXTS]

With the contexts file an answer is followed by the line of the documentation that holds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

MAX_CHARS = 400


def printable(text: str) -> str:
    """One line that a terminal shows as it is: a model may have written escape sequences."""
    text = " ".join(text.split())
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS] + "…"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def answered(path: Path) -> Iterator[dict[str, Any]]:
    return (row for row in rows_of(path) if row["success"])


def source_line(context: str, api: str, answer: str) -> tuple[int, str] | None:
    """The line that holds the answer's first line in the block of `api`, from 1; None: nowhere."""
    wanted = answer.strip().split("\n", 1)[0]
    inside = False
    for number, line in enumerate(context.splitlines(), 1):
        if line.startswith("### "):
            inside = line.startswith(f"### {api} ")
        elif inside and wanted and wanted in line:
            return number, line.strip()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("count", type=int, nargs="?", default=3)
    parser.add_argument("--ids", nargs="+", metavar="ID", help="print these, in this order")
    parser.add_argument("--contexts", type=Path, help="the contexts file, to show where it stands")
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    if args.ids:
        found = {str(row["id"]): row for row in answered(args.results)}
        missing = [name for name in args.ids if name not in found]
        if missing:
            print(f"{args.results} has no answer for {', '.join(missing)}", file=sys.stderr)
            return 1
        chosen = [found[name] for name in args.ids]
    else:
        chosen = list(islice(answered(args.results), args.count))
    contexts = {}
    if args.contexts is not None:
        wanted = {row["id"] for row in chosen}
        contexts = {r["id"]: r["context"] for r in rows_of(args.contexts) if r["id"] in wanted}
    for row in chosen:
        print(f"\n{printable(str(row['id']))}: {printable(row['query'])}")
        print(f"  -> {printable(row['answer'])}")
        if row["id"] in contexts:
            held = source_line(contexts[row["id"]], row["target_api"], row["answer"])
            print(
                "     not word for word in the documentation"
                if held is None
                else f"     documentation, line {held[0]}: {printable(held[1])}"
            )
    print(f"\nAll results, one line per context: {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
