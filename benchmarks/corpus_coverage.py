"""How much of what an import documents do static corpora hold? Prints the misses.

    python benchmarks/corpus_coverage.py CORPUS_FOLDER PACKAGE==VERSION=INTERPRETER …

INTERPRETER is a Python that has exactly that version installed: old versions need an old one
(numpy 1.16.6, scipy 1.4.1 and pandas 0.25.3 run on 3.7; matplotlib 2.0.2 on 3.6). Where there is
none, leave the package out: it is then not measured, and the report says so. The import happens
without network where `unshare -rn` works.

Two shares per package, of public paths of at most three components: `all`, with what classes
inherit; and `own`, what each class or module defines itself. `same text`: of those found, how many
begin with the same 60 characters as at run time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from ragfleet.contexts.matching import match
from ragfleet.contexts.store import Corpus, CorpusStore

WALK = Path(__file__).with_name("reference_walk.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE==VERSION=INTERPRETER")
    parser.add_argument("--misses", type=int, default=40, help="how many to print a package")
    arguments = parser.parse_args()
    store = CorpusStore(arguments.corpus, "docstring")
    report = {}
    for text in arguments.packages:
        requirement, _, interpreter = text.rpartition("=")
        package, _, version = requirement.partition("==")
        rows = reference(interpreter, package, version)
        report[requirement] = measure(store.load(package, version), rows, arguments.misses)
    measured = {text.partition("==")[0] for text in report}
    report["not measured"] = sorted(set(store.packages) - measured)
    print(json.dumps(report, indent=2))


def reference(interpreter: str, package: str, version: str) -> list[dict[str, Any]]:
    shut_in = ["unshare", "-rn"] if shutil.which("unshare") else []
    found = subprocess.run(
        [interpreter, "-c", f"import {package}; print({package}.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if found != version:
        raise SystemExit(f"{interpreter} has {package} {found}, not {version}.")
    done = subprocess.run(
        [*shut_in, interpreter, str(WALK), package], capture_output=True, text=True, check=True
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith('{"path"')]
    return [json.loads(line) for line in rows]


def measure(corpus: Corpus, rows: list[dict[str, Any]], num_misses: int) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    misses = []
    for row in rows:
        counts["all"] += 1
        counts["own"] += row["own"]
        found = match([corpus], row["path"], False)
        document = None if found is None else corpus.documents[found.number]
        if document is None or not document.doc or found is None or found.kind[0] == "c":
            misses.append(row)
            continue
        counts["all found"] += 1
        counts["own found"] += row["own"]
        counts["same"] += shortened(document.doc) == shortened(row["doc"])
    step = max(1, len(misses) // max(num_misses, 1))
    where = Counter(row["path"].rpartition(".")[0] for row in misses)
    return {
        "all": f"{counts['all found']} of {counts['all']} = {share(counts, 'all'):.1%}",
        "own": f"{counts['own found']} of {counts['own']} = {share(counts, 'own'):.1%}",
        "same text": f"{counts['same'] / max(counts['all found'], 1):.1%}",
        "misses are in": dict(where.most_common(15)),
        "some misses": [row["path"] for row in misses][::step][:num_misses],
    }


def share(counts: Counter[str], name: str) -> float:
    return counts[f"{name} found"] / max(counts[name], 1)


def shortened(text: str) -> str:
    return " ".join(text.split())[:60]


if __name__ == "__main__":
    main()
