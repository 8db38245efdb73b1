"""From an API's name to the one document that is about it. Never by substring.

Order: path → alias → parent with its class and bases → unique case-insensitive → unique dotted
suffix. The kind says which; what comes after that is a search, and is called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ragfleet.contexts.store import Corpus

MatchKind = Literal["path", "alias", "member", "case_insensitive", "suffix"]
_MAX_PARENTS = 6


@dataclass(frozen=True)
class Match:
    """`name` is what was asked for, in the corpus's spelling: the heading of the document."""

    corpus: Corpus
    number: int
    kind: MatchKind
    name: str


def match(corpora: Sequence[Corpus], name: str, enable_str_match: bool) -> Match | None:
    """`corpora` with the target's own package first."""
    if not name:
        return None
    for corpus in corpora:
        number = corpus.paths.get(name)
        if number is not None:
            return Match(corpus, number, "path", name)
    for corpus in corpora:
        number = corpus.aliases.get(name)
        if number is not None:
            return Match(corpus, number, "alias", name)
    for corpus in corpora:
        number = find_member(corpus, name)
        if number is not None:
            return Match(corpus, number, "member", name)
    folded = _unique([(corpus, corpus.folded.get(name.casefold(), -1)) for corpus in corpora])
    if folded is not None:
        corpus, number = folded
        return Match(corpus, number, "case_insensitive", corpus.documents[number].path)
    if enable_str_match:
        suffix = _unique([(corpus, corpus.suffixes.get(name, -1)) for corpus in corpora])
        if suffix is not None:
            corpus, number = suffix
            return Match(corpus, number, "suffix", corpus.documents[number].path)
    return None


def find_member(corpus: Corpus, name: str, depth: int = 0) -> int | None:
    """A member through its parent: what the parent is an instance of, and its bases in order."""
    parent_name, _, last = name.rpartition(".")
    if not parent_name or depth > _MAX_PARENTS:
        return None
    parent = corpus.paths.get(parent_name, corpus.aliases.get(parent_name))
    if parent is None:
        parent = find_member(corpus, parent_name, depth + 1)
    if parent is None:
        return None
    document = corpus.documents[parent]
    classes = [document.path, *([document.instance_of] if document.instance_of else [])]
    for cls in [*classes, *document.mro]:
        member = f"{cls}.{last}"
        number = corpus.paths.get(member, corpus.aliases.get(member))
        if number is not None:
            return number
    return None


def _unique(found: list[tuple[Corpus, int | None]]) -> tuple[Corpus, int] | None:
    """The one hit: None where there is none, or where it means several (None in a corpus)."""
    hits = [(corpus, number) for corpus, number in found if number is None or number >= 0]
    if len(hits) != 1 or hits[0][1] is None:
        return None
    return hits[0][0], hits[0][1]
