"""Ranking documents for a question: by words, by meaning, and both fused by reciprocal rank.

Packages are merged by rank too: scores of separate indexes don't compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final

from ragfleet.contexts.dense import DenseIndex, Embedder, Vectors
from ragfleet.contexts.lexical import LexicalIndex, query_text
from ragfleet.contexts.store import Corpus

RRF_K: Final = 60
"""Cormack, Clarke and Büttcher 2009."""


def fuse(rankings: Sequence[Sequence[int]], k: int = RRF_K) -> list[int]:
    """Reciprocal rank fusion; equal scores in the order in which they first appear."""
    if len(rankings) == 1:
        return list(rankings[0])
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, number in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0.0) + 1.0 / (k + rank)
    return sorted(scores, key=lambda number: -scores[number])


class Searcher:
    """Search over the corpora of one query's dependencies. Indexes are opened once a process."""

    def __init__(self, index_folder: Path | None, embedder: Embedder | None = None) -> None:
        self._folder, self._embedder = index_folder, embedder
        self._lexical: dict[str, LexicalIndex] = {}
        self._dense: dict[str, DenseIndex] = {}
        self.notes: list[str] = []
        """What degraded: an index that could not be read or kept."""

    def prepare(self, corpus: Corpus) -> None:
        """Open (or make) the indexes of a corpus."""
        self.lexical(corpus)
        if self._embedder is not None:
            self.dense(corpus, self._embedder)

    def lexical(self, corpus: Corpus) -> LexicalIndex:
        index = self._lexical.get(corpus.sha256)
        if index is None:
            index = self._lexical[corpus.sha256] = LexicalIndex.open(
                corpus, self._folder, self.notes.append
            )
        return index

    def dense(self, corpus: Corpus, embedder: Embedder) -> DenseIndex:
        index = self._dense.get(corpus.sha256)
        if index is None:
            index = self._dense[corpus.sha256] = DenseIndex.open(
                corpus, embedder, self._folder, self.notes.append
            )
        return index

    def embed(self, texts: Sequence[str]) -> list[Vectors] | None:
        """Vectors of many questions at once; None when search is by words alone."""
        if self._embedder is None or not texts:
            return None
        return list(self._embedder.embed(texts))

    def search(
        self, corpora: Sequence[Corpus], query: str, target_api: str | None, vector: Vectors | None
    ) -> Iterator[tuple[Corpus, int]]:
        """Documents best first, the packages' n-th best ones side by side, `corpora`'s first one
        (the target's own package) before the others."""
        text = query_text(query, target_api)
        rankings = []
        for corpus in corpora:
            found = [self.lexical(corpus).rank(text)]
            if self._embedder is not None and vector is not None:
                found.append(self.dense(corpus, self._embedder).rank(vector))
            rankings.append([(corpus, number) for number in fuse(found)])
        for row in zip_longest(*rankings):
            yield from (hit for hit in row if hit is not None)
