"""Cut the example corpus and its queries out of corpora that `ragfleet corpus build` made.

    python tools/make_example_corpus.py CORPUS_FOLDER

Keeps what the example questions need and its neighbours, so that searches have something to choose
from, and stays small enough to be part of the repository.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"numpy": "1.16.6", "scipy": "1.4.1", "requests": "2.31.0"}
MOST = {"numpy": 420, "scipy": 420, "requests": 220}
MAX_DOC_CHARS = 3500


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    needed = set()
    for line in (ROOT / "benchmarks" / "questions.jsonl").read_text("utf-8").splitlines():
        needed |= set(json.loads(line)["expected"])
    for line in (ROOT / "tests" / "contexts" / "api_names.txt").read_text("utf-8").splitlines():
        needed.add(line.split()[0])
    for package, version in VERSIONS.items():
        source = Path(sys.argv[1]) / package / f"{version}.jsonl"
        rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
        wanted = [row for row in rows if {row["path"], *row["aliases"]} & needed]
        classes = {name for row in wanted for name in (row["instance_of"], *row["mro"]) if name}
        rest = [row for row in rows if row not in wanted and row["doc"]]
        rest.sort(key=lambda row: (row["path"] not in classes, row["path"].count("."), row["kind"]))
        members = [row for row in rest if row["path"].rpartition(".")[0] in classes]
        chosen = [*wanted, *members[:60], *rest][: MOST[package]]
        unique = {row["path"]: row for row in chosen}
        target = ROOT / "examples" / "corpus" / package / f"{version}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for path in sorted(unique):
            row = unique[path]
            row["aliases"] = [name for name in row["aliases"] if name.count(".") < 4][:6]
            if len(row["doc"]) > MAX_DOC_CHARS:
                row["doc"] = row["doc"][:MAX_DOC_CHARS].rpartition("\n\n")[0]
                row["doc_sha1"] = ""
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        target.write_text("".join(lines), encoding="utf-8")
        print(f"{target.relative_to(ROOT)}: {len(lines)} documents, {target.stat().st_size:,} B")
    return 0


if __name__ == "__main__":
    sys.exit(main())
