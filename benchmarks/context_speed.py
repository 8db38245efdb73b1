"""How fast contexts are found: exact names, searches by words, searches by meaning.

    python benchmarks/context_speed.py CORPUS_FOLDER [--queries 10000] [--dense 1000]

One process, as a worker of `ragfleet contexts`: batches of 64 queries, matched or searched, and
assembled. Queries are API paths, and summaries of documents with a number behind each, so that none
is asked twice. By meaning (`--dense`) with the local model, one torch thread; its index is made
before the clock runs. Wall time wants an idle machine; CPU time is given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragfleet.contexts.dense import Embedder, LocalEmbedder
from ragfleet.contexts.generate import BATCH
from ragfleet.contexts.lexical import LexicalIndex
from ragfleet.contexts.matching import match
from ragfleet.contexts.options import ContextsOptions
from ragfleet.contexts.queries import Query
from ragfleet.contexts.retrieve import INDEX_FOLDER, Retriever
from ragfleet.contexts.store import Corpus, CorpusStore

STRIDE = 7919
"""Prime, so that taking every so-many-th visits all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    store = CorpusStore(arguments.corpus, "docstring")
    corpora = {name: store.load(name, store.versions(name)[0]) for name in store.packages}
    report: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "documents": sum(len(corpus.documents) for corpus in corpora.values()),
        "packages": len(corpora),
    }
    report |= without_model(arguments.corpus, corpora, arguments.queries)
    report["MiB of this process"] = mebibytes()
    if arguments.dense:
        report["by meaning"] = with_model(arguments.corpus, corpora, arguments.dense)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def exact_queries(corpora: dict[str, Corpus], count: int) -> list[Query]:
    paths = [(name, path) for name, corpus in corpora.items() for path in corpus.paths]
    chosen = (paths[i * STRIDE % len(paths)] for i in range(count))
    return [
        Query(i, i, 0, "What does it do?", path, {name: (corpora[name].version,)})
        for i, (name, path) in enumerate(chosen)
    ]


def questions(corpora: dict[str, Corpus], count: int) -> list[Query]:
    summaries = [
        (name, document.summary)
        for name, corpus in corpora.items()
        for document in corpus.documents
        if len(document.summary.split()) >= 6
    ]
    chosen = (summaries[i * STRIDE % len(summaries)] for i in range(count))
    return [
        Query(i, i, 0, f"{summary} {i}", None, {name: (corpora[name].version,)})
        for i, (name, summary) in enumerate(chosen)
    ]


def without_model(folder: Path, corpora: dict[str, Corpus], count: int) -> dict[str, Any]:
    retriever = retriever_of(folder, None)
    searches = questions(corpora, count)
    report = {"queries": count}
    report |= timed("exact contexts/s", retriever, exact_queries(corpora, count))
    report |= timed("searched contexts/s", retriever, searches)
    started = time.perf_counter()
    index = {
        name: LexicalIndex.open(corpus, folder / INDEX_FOLDER, print)
        for name, corpus in corpora.items()
    }
    report["cached indexes opened in s"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    for query in searches:
        index[next(iter(query.dependencies))].rank(query.query)
    report["ranking alone/s (wall)"] = round(count / (time.perf_counter() - started))
    started = time.perf_counter()
    for query in exact_queries(corpora, count):
        match([corpora[next(iter(query.dependencies))]], query.target_api or "", False)
    report["matching alone/s (wall)"] = round(count / (time.perf_counter() - started))
    return report


def with_model(folder: Path, corpora: dict[str, Corpus], count: int) -> dict[str, Any]:
    import torch

    embedder = LocalEmbedder(None)
    retriever = retriever_of(folder, embedder)
    for corpus in corpora.values():
        retriever.searcher.prepare(corpus)
    asked = questions(corpora, count)
    report = {"queries": count, "torch threads": torch.get_num_threads()}
    report |= timed("searched contexts/s", retriever, asked)
    texts = [query.query for query in asked]
    started = time.perf_counter()
    for start in range(0, count, BATCH):
        embedder.embed(texts[start : start + BATCH])
    report["questions embedded/s (wall)"] = round(count / (time.perf_counter() - started), 1)
    documents = [document for corpus in corpora.values() for document in corpus.documents]
    from ragfleet.contexts.dense import text_of

    some = [text_of(documents[i * STRIDE % len(documents)]) for i in range(128)]
    started = time.perf_counter()
    embedder.embed(some)
    report["documents embedded/s (wall)"] = round(128 / (time.perf_counter() - started), 1)
    report["MiB of this process"] = mebibytes()
    return report


def retriever_of(folder: Path, embedder: Embedder | None) -> Retriever:
    options = ContextsOptions(
        queries_file=Path("-"), corpus_path=folder, output_file=Path("benchmark.jsonl")
    )
    return Retriever(options, embedder)


def timed(name: str, retriever: Retriever, queries: Sequence[Query]) -> dict[str, float]:
    retriever.rows(queries[: 4 * BATCH])  # loads corpora, opens their indexes
    cpu, wall = time.process_time(), time.perf_counter()
    for start in range(0, len(queries), BATCH):
        retriever.rows(queries[start : start + BATCH])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        f"{name} (wall)": round(len(queries) / wall, 1),
        f"{name} (CPU)": round(len(queries) / cpu, 1),
    }


def mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main()
