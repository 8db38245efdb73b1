"""From ranked documents to one context within a token budget.

A document keeps whole sections or loses them in a fixed order; what still doesn't fit is cut at a
line, or inside one that alone is longer than half of the room; and a document that gets no room is
skipped: a shorter one after it may fit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ragfleet.contexts.store import Corpus

MAX_DOCUMENT_TOKENS: Final = 800
CHARS_PER_TOKEN: Final = 3.0
"""API documentation has 3.1 characters a token; the usual four underestimate it by a fifth."""
_DROPPED: Final = ("references", "notes", "see also", "examples")
_UNDERLINE: Final = re.compile(r"^[-=~]{3,}\s*$")
_SEPARATOR: Final = "\n\n"
_LEAST_TOKENS: Final = 40
_MOST_CHARS_PER_TOKEN: Final = 16
_LONGEST_WORD: Final = 40


class TokenCounter:
    """Counts with a model's tokenizer, or estimates and says so in `description`."""

    def __init__(self, model_path: str | None) -> None:
        self._tokenizer: Any = None
        self.description = f"estimated at {CHARS_PER_TOKEN:g} characters a token"
        if model_path is not None:
            from ragfleet.tokens import load_tokenizer

            self._tokenizer = load_tokenizer(Path(model_path).expanduser())
            self.description = f"counted by the tokenizer of {Path(model_path).name}"
        self.count = lru_cache(maxsize=20_000)(self._count)

    @property
    def is_exact(self) -> bool:
        return self._tokenizer is not None

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            wide = sum(ord(char) >= 0x2E80 for char in text)  # CJK: about a token a character
            return int((len(text) - wide) / CHARS_PER_TOKEN) + wide + 1
        return len(self._tokenizer.encode(text, False))


@dataclass(frozen=True)
class Piece:
    """One document as it stands in a context."""

    text: str
    tokens: int
    is_shortened: bool


@dataclass
class Context:
    text: str = ""
    tokens: int = 0
    documents: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0
    """Documents that didn't fit."""


class Assembler:
    def __init__(self, counter: TokenCounter, max_documents: int, max_tokens: int) -> None:
        self._counter, self._max_documents, self._max_tokens = counter, max_documents, max_tokens
        self._pieces: dict[tuple[str, int, str, int], Piece] = {}

    def assemble(self, hits: Iterable[tuple[Corpus, int, str]], is_alone: bool = False) -> Context:
        """Join documents in the order given.

        Args:
            hits: (corpus, document number, the name to head it with).
            is_alone: only one document is wanted, so it may use the whole budget.
        """
        context = Context()
        cap = self._max_tokens if is_alone else min(MAX_DOCUMENT_TOKENS, self._max_tokens)
        seen: set[tuple[str, str]] = set()
        parts: list[str] = []
        for corpus, number, name in hits:
            document = corpus.documents[number]
            key = (corpus.package, document.defined_in)
            if key in seen:
                continue
            seen.add(key)
            piece = self._piece(corpus, number, name, cap)
            tokens = piece.tokens + (self._counter.count(_SEPARATOR) if parts else 0)
            if context.tokens + tokens > self._max_tokens:
                context.num_skipped += 1
                continue
            parts.append(piece.text)
            context.tokens += tokens
            context.documents.append(
                {
                    "path": document.path,
                    "package": corpus.package,
                    "version": corpus.version,
                    "doc_sha1": document.doc_sha1,
                    "tokens": piece.tokens,
                    "shortened": piece.is_shortened,
                }
            )
            if len(parts) == self._max_documents or self._max_tokens - context.tokens < 8:
                break
        context.text = _SEPARATOR.join(parts)
        return context

    def _piece(self, corpus: Corpus, number: int, name: str, cap: int) -> Piece:
        key = (corpus.sha256, number, name, cap)
        piece = self._pieces.get(key)
        if piece is None:
            document = corpus.documents[number]
            head = f"### {name} ({corpus.package}=={corpus.version})\n"
            doc = document.doc.strip()
            signature = document.signature
            if signature and not doc.startswith(signature):
                head += signature + ("\n\n" if doc else "")
            piece = self._pieces[key] = self._fit(head, doc, cap)
        return piece

    def _fit(self, head: str, doc: str, cap: int) -> Piece:
        count = self._counter.count
        tokens = count(head + doc)
        if tokens <= cap:
            return Piece(head + doc, tokens, False)
        sections = split_sections(doc)
        for name in _DROPPED:
            sections = [section for section in sections if section[0] != name]
            text = head + "\n\n".join(section[1] for section in sections)
            tokens = count(text)
            if tokens <= cap:
                return Piece(text, tokens, True)
        lines = text.split("\n")
        low, high = 1, len(lines)
        while low < high:  # the most lines that fit
            middle = (low + high + 1) // 2
            if count("\n".join(lines[:middle]) + "\n[...]") <= cap:
                low = middle
            else:
                high = middle - 1
        text = "\n".join(lines[:low]).rstrip() + "\n[...]"
        tokens = count(text)
        if tokens * 2 < cap:  # a paragraph that is one line, as in texts of people's own
            text = self._with_begin_of("\n".join(lines[:low]) + "\n", lines[low], cap)
            tokens = count(text)
        while tokens > cap and len(text) > _LEAST_TOKENS:  # one endless line
            text = text[: len(text) * 3 // 4]
            tokens = count(text)
        return Piece(text, tokens, True)

    def _with_begin_of(self, text: str, line: str, cap: int) -> str:
        """`text` and as much of the next line as there is room for, to a space if one is near."""
        low, high = 0, min(len(line), cap * _MOST_CHARS_PER_TOKEN)
        while low < high:
            middle = (low + high + 1) // 2
            if self._counter.count(f"{text}{line[:middle]} [...]") <= cap:
                low = middle
            else:
                high = middle - 1
        begin = line[:low]
        if not line[low : low + 1].isspace():
            before, _, word = begin.rpartition(" ")
            if before and len(word) <= _LONGEST_WORD:
                begin = before
        return f"{text}{begin} [...]"


def split_sections(doc: str) -> list[tuple[str, str]]:
    """(heading in lower case, text) of a numpydoc docstring; the first one has no heading."""
    lines = doc.split("\n")
    starts = [
        number
        for number in range(len(lines) - 1)
        if lines[number].strip() and _UNDERLINE.match(lines[number + 1].strip())
    ]
    bounds = [0, *[start for start in starts if start > 0], len(lines)]
    sections = []
    for begin, end in itertools.pairwise(bounds):
        heading = lines[begin].strip().lower() if begin in starts else ""
        sections.append((heading, "\n".join(lines[begin:end]).strip()))
    return [section for section in sections if section[1]]
