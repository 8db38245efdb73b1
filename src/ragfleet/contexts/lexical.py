"""Search by words: BM25 over one index per package==version, kept on disk beside the corpora.

One index per package costs no leakage of word frequencies between packages and is eight times as
fast as one over all with a mask.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ragfleet.contexts.store import Corpus
from ragfleet.corpus.document import Document

INDEX_VERSION: Final = 2
MAX_RANKED: Final = 50
_CJK_RANGES: Final = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CJK: Final = re.compile(f"[{_CJK_RANGES}]")
_RUN: Final = re.compile(rf"[{_CJK_RANGES}]+|[^\W{_CJK_RANGES}]+")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")
_CAMEL: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
Scores = np.ndarray[Any, np.dtype[np.float32]]
Note = Callable[[str], None]
"""Is told what degraded."""
_MAX_ALIASES: Final = 8
_MAX_DOC_CHARS: Final = 20_000
_STOP: Final = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by can do does for from has how i if in into is it its my of on or"
        " that the then there this to use used using was what when where which while who why will"
        " with you your",
    )
)


def words(text: str) -> list[str]:
    """Lower-case words; identifiers whole and in their parts; Chinese, Japanese and Korean text as
    pairs of neighbouring characters, for it has no spaces."""
    found = []
    for run in _RUN.findall(text):
        if run.isascii():
            for name in _NAME.findall(run):
                found += _parts(name)
        elif _CJK.match(run):
            found += _pairs(run)
        else:
            found.append(run.lower())
    return found


def _parts(name: str) -> list[str]:
    """A name whole, and its parts where it has several."""
    whole = name.lower()
    found = [] if whole in _STOP else [_stem(whole)]
    if "_" in name or not (name.islower() or name.isupper() or name.isdigit()):
        parts = [part.lower() for part in _CAMEL.findall(name)]
        if len(parts) > 1:
            found += [_stem(part) for part in parts if part not in _STOP]
    return found


def _pairs(word: str) -> list[str]:
    return [word[i : i + 2] for i in range(len(word) - 1)] or [word]


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
        """`retriever` is None where there are no documents: bm25s can't index nothing."""
        self._retriever, self._num_documents = retriever, num_documents

    @classmethod
    def open(cls, corpus: Corpus, cache_folder: Path | None, note: Note) -> LexicalIndex:
        """The kept index of the corpus, or a new one, kept where `cache_folder` allows it."""
        import bm25s

        if not corpus.documents:
            return cls(None, 0)
        folder = None
        if cache_folder is not None:
            name = f"bm25s-{bm25s.__version__}-v{INDEX_VERSION}-{corpus.sha256[:16]}"
            folder = corpus.index_folder(cache_folder) / name
            retriever = _load(folder, note)
            if retriever is not None:
                return cls(retriever, len(corpus.documents))
        retriever = bm25s.BM25(method="lucene")
        tokens = [words(field(document)) or [""] for document in corpus.documents]
        retriever.index(tokens, show_progress=False)
        if folder is not None:
            _save(retriever, folder, note)
        return cls(retriever, len(corpus.documents))

    def scores(self, text: str) -> Scores:
        """Of each document [num_documents]; 0 for those that share no word with `text`."""
        tokens = list(dict.fromkeys(words(text)))
        ids = self._retriever.get_tokens_ids(tokens) if self._num_documents else []
        if not ids:
            return np.zeros(self._num_documents, np.float32)
        return np.asarray(self._retriever.get_scores_from_ids(ids), np.float32)

    def rank(self, text: str, limit: int = MAX_RANKED) -> list[int]:
        """Documents that share a word with `text`, best first; ties in the corpus's order."""
        return best_first(self.scores(text), limit)


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


def _load(folder: Path, note: Note) -> Any:
    import bm25s

    if not (folder / "complete").exists():
        return None
    try:
        return bm25s.BM25.load(str(folder), load_corpus=False, load_vocab=True)
    except Exception as error:  # whatever a damaged file makes of its readers
        note(f"The index {folder} can't be read ({error}); it is made again.")
        return None


def _save(retriever: Any, folder: Path, note: Note) -> None:
    """Other processes see a whole index or none. An index that can't be kept is made again."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".index-", dir=folder.parent))
        retriever.save(str(temporary))
        (temporary / "complete").touch()
        for old in folder.parent.glob("bm25s-*"):  # of earlier states of the corpus
            shutil.rmtree(old, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not (folder / "complete").exists():  # another process was faster
            note(f"The index {folder} can't be kept ({error.strerror}): it is made each time.")
