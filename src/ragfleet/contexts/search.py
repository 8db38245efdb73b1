"""Ranking documents for a question: by words, by meaning, and by the weighted sum of both.

Packages are merged by rank: scores of separate indexes don't compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final

import numpy as np

from ragfleet.contexts.dense import DenseIndex, Embedder, Vectors
from ragfleet.contexts.lexical import MAX_RANKED, LexicalIndex, Scores, best_first, query_text
from ragfleet.contexts.store import Corpus

DENSE_WEIGHT: Final = 0.6
"""Chosen on questions of which none is among those that quality is reported on:
`benchmarks/retrieval.py --tune`."""


def fuse(lexical: Scores, dense: Scores, dense_weight: float = DENSE_WEIGHT) -> Scores:
    """The weighted sum of both, each spread over 0 to 1 (Bruch, Gai and Ingber 2023).

    Ranks alone forget by how much the first one leads; where no document shares a word with the
    question, meaning decides alone.
    """
    return (1.0 - dense_weight) * _spread(lexical) + dense_weight * _spread(dense)


def _spread(scores: Scores) -> Scores:
    if not len(scores):
        return scores
    least, most = scores.min(), scores.max()
    return (scores - least) / (most - least) if most > least else np.zeros_like(scores)


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
            scores = self.lexical(corpus).scores(text)
            if self._embedder is None or vector is None:
                found = best_first(scores, MAX_RANKED)
            else:
                scores = fuse(scores, self.dense(corpus, self._embedder).scores(vector))
                found = best_first(scores, MAX_RANKED, least=-1.0)
            rankings.append([(corpus, number) for number in found])
        for row in zip_longest(*rankings):
            yield from (hit for hit in row if hit is not None)
