"""The corpora of a folder, loaded as they are asked for, and the names in each."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from ragfleet.corpus.document import BadLine, CorpusType, Document, read_documents
from ragfleet.corpus.download import normal_name
from ragfleet.corpus.folder import CorpusFile, list_corpora
from ragfleet.errors import InputError, RagfleetError


class NoCorpus(RagfleetError):
    """A dependency that has no corpus; becomes a failure row."""


@dataclass(eq=False)
class Corpus:
    """The documents of one package==version. The first of several equal paths counts."""

    package: str
    version: str
    file: Path
    documents: list[Document]
    sha256: str
    paths: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, document in enumerate(self.documents):
            self.paths.setdefault(document.path, number)
        for number, document in enumerate(self.documents):
            for alias in document.aliases:
                self.aliases.setdefault(alias, number)

    def index_folder(self, folder: Path) -> Path:
        """Where its indexes are kept: those of source code apart from those of documentation."""
        return folder / self.package / self.file.name.removesuffix(".jsonl")

    @cached_property
    def import_roots(self) -> frozenset[str]:
        return frozenset(document.import_root for document in self.documents)

    @cached_property
    def names_hash(self) -> str:
        """Of which documents there are, under which names, whatever they say."""
        digest = hashlib.sha1(usedforsecurity=False)
        for document in self.documents:
            parts = [document.path, *document.aliases, document.instance_of or "", *document.mro]
            digest.update("\0".join(parts).encode("utf-8", "replace") + b"\n")
        return digest.hexdigest()[:16]

    @cached_property
    def folded(self) -> dict[str, int | None]:
        """Case-folded path or alias → its document; None where it means several."""
        found: dict[str, int | None] = {}
        for name, number in [*self.paths.items(), *self.aliases.items()]:
            folded = name.casefold()
            if found.setdefault(folded, number) != number:
                found[folded] = None
        return found

    @cached_property
    def suffixes(self) -> dict[str, int | None]:
        """Dotted suffix of a path or alias → its document; None where it means several."""
        found: dict[str, int | None] = {}
        for name, number in [*self.paths.items(), *self.aliases.items()]:
            parts = name.split(".")
            for start in range(1, len(parts)):
                suffix = ".".join(parts[start:])
                if found.setdefault(suffix, number) != number:
                    found[suffix] = None
        return found


class CorpusStore:
    """Finds and loads corpora. Raises InputError for a folder that holds none."""

    def __init__(self, folder: Path, corpus_type: CorpusType) -> None:
        self.folder, self.corpus_type = folder, corpus_type
        self._files: dict[str, dict[str, CorpusFile]] = {}
        files = [file for file in list_corpora(folder) if file.corpus_type == corpus_type]
        for file in files:
            self._files.setdefault(file.package, {})[file.version] = file
        if not files:
            raise InputError(
                f"{folder} holds no corpus of type {corpus_type}. Make one: ragfleet corpus build"
                f" PACKAGE==VERSION --corpus_path {folder} --corpus_type {corpus_type}; or look at"
                f" what is there: ragfleet corpus check {folder}"
            )
        self._loaded: dict[tuple[str, str], Corpus] = {}
        self.notes: list[str] = []
        """What is left out of the corpora that were loaded."""

    @property
    def packages(self) -> list[str]:
        return list(self._files)

    def versions(self, package: str) -> list[str]:
        return sorted(self._files.get(normal_name(package), {}), key=_version_order)

    def resolve(self, package: str, wanted: Sequence[str], nearest: bool) -> str:
        """The version whose corpus serves: the first of `wanted` there is. Raises NoCorpus."""
        there = self.versions(package)
        if not there:
            raise NoCorpus(
                f"there is no corpus of {package} in {self.folder} (there are:"
                f" {', '.join(self.packages[:20])}); make it:"
                f" {self._build_command(package, wanted)}"
            )
        for version in wanted:
            found = _same_version(version, there)
            if found is not None:
                return found
        if not wanted and len(there) == 1:
            return there[0]
        if nearest and wanted:
            return min(there, key=lambda version: _distance(version, wanted[0]))
        asked = " or ".join(wanted) if wanted else "an unnamed version"
        raise NoCorpus(
            f"there is no corpus of {package} {asked}; there are {', '.join(there)}. Make it:"
            f" {self._build_command(package, wanted)}; or take the nearest one: --nearest_version"
        )

    def _build_command(self, package: str, wanted: Sequence[str]) -> str:
        """What makes a corpus that this store would find."""
        is_one = bool(wanted) and _parsed(wanted[0]) is not None  # or a range, or none
        requirement = f"{package}=={wanted[0] if is_one else 'VERSION'}"
        words = ["ragfleet", "corpus", "build", requirement, "--corpus_path", str(self.folder)]
        if self.corpus_type != "docstring":
            words += ["--corpus_type", self.corpus_type]
        return shlex.join(words)

    def has(self, package: str, wanted: Sequence[str]) -> bool:
        """Whether one of exactly these versions is there."""
        there = self.versions(package)
        return any(_same_version(version, there) is not None for version in wanted)

    def load(self, package: str, version: str) -> Corpus:
        key = (normal_name(package), version)
        if key not in self._loaded:
            file = self._files[key[0]][version]
            documents, bad = [], []
            for document in read_documents(file.path, file.package, file.version):
                if isinstance(document, BadLine):
                    bad.append(document)
                else:
                    documents.append(document)
            if bad:
                lines = "1 line" if len(bad) == 1 else f"{len(bad):,} lines"
                self.notes.append(
                    f"{file.path}: {lines} not usable, the first is line {bad[0].line_no}:"
                    f" {bad[0].reason}"
                )
            with open(file.path, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self._loaded[key] = Corpus(key[0], version, file.path, documents, digest)
        return self._loaded[key]

    def load_usable(self, package: str, version: str) -> Corpus:
        """A corpus that has documents. Raises NoCorpus for one that has none."""
        corpus = self.load(package, version)
        if not corpus.documents:
            raise NoCorpus(
                f"the corpus of {corpus.package} {version} has no usable document ({corpus.file});"
                f" look at it: ragfleet corpus check {self.folder}"
            )
        return corpus


def _same_version(wanted: str, there: Sequence[str]) -> str | None:
    if wanted in there:
        return wanted
    try:
        asked = Version(wanted)
    except InvalidVersion:
        try:
            specifier = SpecifierSet(wanted)
        except InvalidSpecifier:
            return None
        fitting = [version for version in there if _fits(version, specifier)]
        return fitting[-1] if wanted and fitting else None  # a range: the newest that fits
    return next((version for version in there if _parsed(version) == asked), None)


def _fits(version: str, specifier: SpecifierSet) -> bool:
    parsed = _parsed(version)
    return parsed is not None and specifier.contains(parsed, prereleases=True)


def _parsed(version: str) -> Version | None:
    try:
        return Version(version)
    except InvalidVersion:
        return None


def _version_order(version: str) -> tuple[bool, Version | str, str]:
    parsed = _parsed(version)
    return (parsed is not None, parsed if parsed is not None else "", version)


def _distance(version: str, wanted: str) -> tuple[int, ...]:
    def numbers(text: str) -> list[int]:
        parsed = _parsed(text)
        release = list(parsed.release) if parsed is not None else []
        return [*release, 0, 0, 0, 0][:4]

    here, there = numbers(version), numbers(wanted)
    apart = [abs(a - b) for a, b in zip(here, there, strict=True)]
    return (*apart, int(here > there))  # the older one of two that are as near
