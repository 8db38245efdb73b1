"""How well contexts are found.

    python benchmarks/retrieval.py CORPUS_FOLDER [--dense] [--questions 300]
    python benchmarks/retrieval.py CORPUS_FOLDER --tune

Quality, on two sets: `hand`, natural questions written by hand that don't name the API
(benchmarks/questions.jsonl), and `auto`, an API's own summary as the question, with that summary
removed from the indexed copy. Each ranking is compared side by side: by words, by meaning, fused as
shipped, fused with a weight chosen on the other four fifths of the same questions, and fused by
reciprocal rank. Intervals are 95 % bootstrap percentiles; `fused minus` takes the better one of the
two by each figure. `--tune` prints what each weight gives on 300 summaries of other documents: the
shipped weight comes from there. How fast: context_speed.py.

Make the folder with: ragfleet corpus build numpy==1.16.6 scipy==1.4.1 requests==2.31.0
matplotlib==2.0.2 pandas==0.25.3 --corpus_path CORPUS_FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ragfleet.contexts.dense import DenseIndex, Embedder, LocalEmbedder, text_of
from ragfleet.contexts.lexical import MAX_RANKED, LexicalIndex, Scores, best_first
from ragfleet.contexts.matching import match
from ragfleet.contexts.search import DENSE_WEIGHT, fuse
from ragfleet.contexts.store import Corpus, CorpusStore
from ragfleet.corpus.document import Document

HERE = Path(__file__).resolve().parent
INDEX = ".index"
RESAMPLES = 2000
FOLDS = 5
WEIGHTS = [tenth / 10 for tenth in range(1, 10)]


@dataclasses.dataclass
class Case:
    query: str
    package: str
    expected: frozenset[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    store = CorpusStore(arguments.corpus, "docstring")
    corpora = {name: store.load(name, store.versions(name)[0]) for name in store.packages}
    report: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "documents": {str(name): len(corpus.documents) for name, corpus in corpora.items()},
    }
    embedder = LocalEmbedder(None) if arguments.dense or arguments.tune else None
    if embedder is not None and arguments.tune:
        changed, cases = auto_cases(corpora, arguments.questions, arguments.questions)
        ranked = ranks_of(changed, cases, embedder, arguments.corpus / INDEX, corpora)
        report["weights"] = {
            f"{weight:.1f}": {name: mean(ranks, score) for name, score in SCORES.items()}
            for weight, ranks in ranked.by_weight.items()
        }
        print(json.dumps(report, indent=2))
        return
    report["hand"] = quality(corpora, hand_cases(corpora), embedder, arguments.corpus / INDEX)
    changed, cases = auto_cases(corpora, arguments.questions)
    report["auto"] = quality(changed, cases, embedder, arguments.corpus / INDEX, corpora)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


# ---- cases


def hand_cases(corpora: dict[str, Corpus]) -> list[Case]:
    cases = []
    for line in (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (package,) = row["dependencies"]
        if package in corpora:
            found = {match([corpora[package]], name, False) for name in row["expected"]}
            numbers = frozenset(hit.number for hit in found if hit is not None)
            if not numbers:
                print(f"no document for {row['expected']}: {row['query']}")
            cases.append(Case(row["query"], package, numbers))
    return cases


def auto_cases(
    corpora: dict[str, Corpus], count: int, start: int = 0
) -> tuple[dict[str, Corpus], list[Case]]:
    """Corpora in which the chosen documents lost their summaries, and the questions.

    Ranges of `start` that don't overlap have no document in common.
    """
    random = np.random.default_rng(0)
    candidates = [
        (name, number)
        for name, corpus in corpora.items()
        for number, document in enumerate(corpus.documents)
        if len(document.summary.split()) >= 6 and len(document.doc) > 300
    ]
    chosen = [candidates[int(i)] for i in random.permutation(len(candidates))]
    chosen = chosen[start : start + count]
    cases, changed = [], {}
    for name, corpus in corpora.items():
        documents = list(corpus.documents)
        for package, number in chosen:
            if package == name:
                document = documents[number]
                cases.append(Case(document.summary, name, frozenset({number})))
                documents[number] = without_summary(document)
        digest = f"auto-{start}-{count}-{corpus.sha256}"
        changed[name] = Corpus(name, corpus.version, corpus.file, documents, digest)
    return changed, cases


def without_summary(document: Document) -> Document:
    paragraphs = document.doc.split("\n\n")
    kept = [text for text in paragraphs if " ".join(text.split())[:300] != document.summary]
    copy = msgspec.structs.replace(document, doc="\n\n".join(kept))
    copy.summary = ""
    return copy


# ---- quality


@dataclasses.dataclass
class Ranked:
    """The rank of the right document for each question: by method, and for each weight."""

    by_method: dict[str, list[int]]
    by_weight: dict[float, list[int]]


def ranks_of(
    corpora: dict[str, Corpus],
    cases: Sequence[Case],
    embedder: Embedder | None,
    folder: Path,
    originals: dict[str, Corpus] | None,
) -> Ranked:
    lexical = {
        name: LexicalIndex.open(corpus, None if originals else folder, print)
        for name, corpus in corpora.items()
    }
    words = [lexical[case.package].scores(case.query) for case in cases]
    found = {"lexical": [rank_in(scores, case) for scores, case in zip(words, cases, strict=True)]}
    if embedder is None:
        return Ranked(found, {})
    vectors = embedder.embed([case.query for case in cases])
    dense = {
        name: dense_index(corpus, embedder, folder, originals) for name, corpus in corpora.items()
    }
    meaning = [
        dense[case.package].scores(vector) for case, vector in zip(cases, vectors, strict=True)
    ]
    triples = list(zip(words, meaning, cases, strict=True))
    by_weight = {
        weight: [rank_in(fuse(one, two, weight), case) for one, two, case in triples]
        for weight in WEIGHTS
    }
    found["dense"] = [rank_in(two, case, -2.0) for _, two, case in triples]
    found["fused"] = by_weight[DENSE_WEIGHT]
    found["fused, weight cross-validated"] = cross_validated(by_weight)
    found["fused by reciprocal rank"] = [
        rank_in(reciprocal(one, two), case) for one, two, case in triples
    ]
    return Ranked(found, by_weight)


def quality(
    corpora: dict[str, Corpus],
    cases: Sequence[Case],
    embedder: Embedder | None,
    folder: Path,
    originals: dict[str, Corpus] | None = None,
) -> dict[str, Any]:
    ranked = ranks_of(corpora, cases, embedder, folder, originals)
    found = ranked.by_method
    report: dict[str, Any] = {"questions": len(cases)}
    for how, ranks in found.items():
        report[how] = {name: interval(ranks, score) for name, score in SCORES.items()}
    for how in found:
        if how.startswith("fused"):
            report[f"{how} minus"] = {
                f"{name} of {better}": difference(found[how], found[better], score)
                for name, score in SCORES.items()
                for better in [max(("dense", "lexical"), key=lambda k: mean(found[k], score))]
            }
    return report


def cross_validated(by_weight: dict[float, list[int]]) -> list[int]:
    """Each fifth ranked with the weight that is best by MRR on the four others."""
    count = len(next(iter(by_weight.values())))
    order = np.random.default_rng(2).permutation(count)
    ranks = [0] * count
    for fold in np.array_split(order, FOLDS):
        others = sorted(set(range(count)) - {int(i) for i in fold})
        scores = {
            weight: mean([found[i] for i in others], SCORES["MRR"])
            for weight, found in by_weight.items()
        }
        best = max(scores, key=lambda weight: scores[weight])
        for i in fold:
            ranks[int(i)] = by_weight[best][int(i)]
    return ranks


def reciprocal(lexical: Scores, dense: Scores, k: int = 60) -> Scores:
    """For comparison: the first 50 of each, by the sum of 1 / (k + rank)."""
    scores = np.zeros(len(lexical), np.float32)
    for ranking in (best_first(lexical, MAX_RANKED), best_first(dense, MAX_RANKED, -2.0)):
        for rank, number in enumerate(ranking, 1):
            scores[number] += 1.0 / (k + rank)
    return scores


def dense_index(
    corpus: Corpus, embedder: Embedder, folder: Path, originals: dict[str, Corpus] | None
) -> DenseIndex:
    if originals is None:
        return DenseIndex.open(corpus, embedder, folder, print)
    original = originals[corpus.package]
    DenseIndex.open(original, embedder, folder, print)
    (path,) = original.index_folder(folder).glob(
        f"dense-{embedder.name}-*-{original.sha256[:16]}.npy"
    )
    vectors = np.load(path)
    changed = [
        number
        for number, (new, old) in enumerate(zip(corpus.documents, original.documents, strict=True))
        if new is not old
    ]
    if changed:
        texts = [text_of(corpus.documents[number]) for number in changed]
        vectors[changed] = embedder.embed(texts)
    return DenseIndex(vectors)


def rank_in(scores: Scores, case: Case, least: float = 0.0) -> int:
    """1-based; 0 where the document is not among the ranked."""
    ranking = best_first(scores, MAX_RANKED, least)
    return next((rank for rank, number in enumerate(ranking, 1) if number in case.expected), 0)


SCORES: dict[str, Callable[[int], float]] = {
    "R@1": lambda rank: float(rank == 1),
    "R@10": lambda rank: float(0 < rank <= 10),
    "R@50": lambda rank: float(0 < rank <= 50),
    "MRR": lambda rank: 1.0 / rank if rank else 0.0,
}


def interval(ranks: Sequence[int], score: Callable[[int], float]) -> list[float]:
    """[mean, low, high]"""
    values = np.array([score(rank) for rank in ranks])
    means = resampled(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(number), 3) for number in (values.mean(), low, high)]


def mean(ranks: Sequence[int], score: Callable[[int], float]) -> float:
    return round(sum(score(rank) for rank in ranks) / len(ranks), 4)


def difference(
    ranks: Sequence[int], others: Sequence[int], score: Callable[[int], float]
) -> list[float]:
    """[mean, low, high], paired: the same questions are drawn for both."""
    values = np.array([score(a) - score(b) for a, b in zip(ranks, others, strict=True)])
    low, high = np.percentile(resampled(values), [2.5, 97.5])
    return [round(float(number), 3) for number in (values.mean(), low, high)]


def resampled(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(1)
    return values[random.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)


if __name__ == "__main__":
    main()
