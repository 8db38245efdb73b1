"""Print the first answers of a results file: python tools/print_answers.py RESULTS [COUNT]."""

from __future__ import annotations

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


def answered(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["success"]:
                yield row


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) == 3 else 3
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for row in islice(answered(path), count):
        print(f"\n{printable(str(row['id']))}: {printable(row['query'])}")
        print(f"  -> {printable(row['answer'])}")
    print(f"\nAll results, one line per context: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
