"""Search by words: BM25 over one index per package==version, kept on disk beside the corpora.

One index per package costs no leakage of word frequencies between packages and is eight times as
fast as one over all with a mask.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from ragfleet.contexts.store import Corpus
from ragfleet.corpus.document import Document

INDEX_VERSION: Final = 1
MAX_RANKED: Final = 50
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|\d+", re.ASCII)
_CAMEL: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_MAX_ALIASES: Final = 8
_MAX_DOC_CHARS: Final = 20_000
_STOP: Final = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "do",
        "does",
        "for",
        "from",
        "has",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "my",
        "of",
        "on",
        "or",
        "that",
        "the",
        "then",
        "there",
        "this",
        "to",
        "use",
        "used",
        "using",
        "was",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "why",
        "will",
        "with",
        "you",
        "your",
    ]
)


def words(text: str) -> list[str]:
    """Lower-case words; identifiers whole and in their parts. Other scripts have no words here."""
    found = []
    for match in _WORD.finditer(text):
        word = match[0]
        whole = word.lower()
        if whole not in _STOP:
            found.append(_stem(whole))
        if "_" in word or not (word.islower() or word.isupper() or word.isdigit()):
            parts = [part.lower() for part in _CAMEL.findall(word)]
            if len(parts) > 1:
                found += [_stem(part) for part in parts if part not in _STOP]
    return found


def _stem(word: str) -> str:
    """Plurals only: API words are not prose, and more stemming joins what differs."""
    if len(word) > 4 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def field(document: Document) -> str:
    """The one indexed text. Names count more by standing in it more often, not by boosts."""
    names = [document.path, *document.aliases[:_MAX_ALIASES]]
    parts = [document.path.replace(".", " "), *names, *names, document.signature]
    return "\n".join([*parts, document.doc[:_MAX_DOC_CHARS]])


class LexicalIndex:
    """BM25 over one corpus. `open` reads the cached index or makes it."""

    def __init__(self, retriever: Any, num_documents: int) -> None:
        self._retriever, self._num_documents = retriever, num_documents

    @classmethod
    def open(cls, corpus: Corpus, cache_folder: Path | None) -> LexicalIndex:
        import bm25s

        folder = None
        if cache_folder is not None:
            name = f"bm25s-{bm25s.__version__}-v{INDEX_VERSION}-{corpus.sha256[:16]}"
            folder = cache_folder / corpus.package / corpus.version / name
            if (folder / "complete").exists():
                retriever = bm25s.BM25.load(str(folder), load_corpus=False, load_vocab=True)
                return cls(retriever, len(corpus.documents))
        retriever = bm25s.BM25(method="lucene")
        tokens = [words(field(document)) or [""] for document in corpus.documents]
        retriever.index(tokens, show_progress=False)
        if folder is not None:
            _save(retriever, folder)
        return cls(retriever, len(corpus.documents))

    def rank(self, text: str, limit: int = MAX_RANKED) -> list[int]:
        """Documents that share a word with `text`, best first; ties in the corpus's order."""
        if self._num_documents == 0:
            return []
        tokens = list(dict.fromkeys(words(text)))
        ids = self._retriever.get_tokens_ids(tokens)
        if not ids:
            return []
        scores = np.asarray(self._retriever.get_scores_from_ids(ids))
        return best_first(scores, limit)


def best_first(scores: np.ndarray[Any, Any], limit: int, least: float = 0.0) -> list[int]:
    """Positions of the highest scores above `least`; equal ones in their order."""
    limit = min(limit, len(scores))
    if limit == 0:
        return []
    cut = np.partition(scores, -limit)[-limit]
    candidates = np.flatnonzero(scores >= cut)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:limit]
    return [int(number) for number in order if scores[number] > least]


def query_text(query: str, target_api: str | None) -> str:
    """What is searched for: the question, and the target's words twice."""
    if not target_api:
        return query
    return f"{query} {target_api} {target_api.replace('.', ' ')}"


def _save(retriever: Any, folder: Path) -> None:
    """Other processes see a whole index or none. An index that can't be kept is made again."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".index-", dir=folder.parent))
    except OSError:
        return  # a read-only corpus folder
    try:
        retriever.save(str(temporary))
        (temporary / "complete").touch()
        for old in folder.parent.glob("bm25s-*"):
            if old != folder:  # of an earlier state of the corpus
                shutil.rmtree(old, ignore_errors=True)
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
