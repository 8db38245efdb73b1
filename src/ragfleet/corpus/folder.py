"""A folder of corpora: which package==version is in which file.

    <folder>/<package>/<version>.jsonl             documentation
    <folder>/<package>/<version>.srccodes.jsonl    source code
    <folder>/<package>==<version>.jsonl            the flat form, for files of a user's own

Package names are compared as package indexes do: `Scikit_Learn` is `scikit-learn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ragfleet.corpus.document import BadLine, CorpusType, read_documents
from ragfleet.corpus.download import normal_name
from ragfleet.errors import InputError

_SOURCES: Final = ".srccodes.jsonl"


@dataclass(frozen=True)
class CorpusFile:
    package: str
    version: str
    corpus_type: CorpusType
    path: Path


def corpus_file(folder: Path, package: str, version: str, corpus_type: CorpusType) -> Path:
    suffix = ".jsonl" if corpus_type == "docstring" else _SOURCES
    return folder / normal_name(package) / f"{version}{suffix}"


def list_corpora(folder: Path) -> list[CorpusFile]:
    """Every corpus in `folder`. Raises InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(
            f"There is no corpus folder {folder}. Make one: ragfleet corpus build PACKAGE==VERSION"
            f" --corpus_path {folder}; or put your own files there as <package>/<version>.jsonl."
        )
    found = []
    for path in sorted(folder.glob("*/*.jsonl")) + sorted(folder.glob("*==*.jsonl")):
        if path.name.startswith("."):
            continue
        corpus_type: CorpusType = "srccodes" if path.name.endswith(_SOURCES) else "docstring"
        stem = path.name.removesuffix(_SOURCES).removesuffix(".jsonl")
        package, version = path.parent.name, stem
        if "==" in stem:
            package, _, version = stem.partition("==")
        found.append(CorpusFile(normal_name(package), version, corpus_type, path))
    return found


@dataclass
class CheckReport:
    """What `ragfleet corpus check` tells of one file."""

    file: CorpusFile
    num_documents: int = 0
    num_aliases: int = 0
    duplicates: int = 0
    without_doc: int = 0
    bad: list[BadLine] | None = None

    def lines(self) -> list[str]:
        bad = self.bad or []
        text = (
            f"{self.file.package}=={self.file.version} ({self.file.corpus_type}):"
            f" {self.num_documents:,} documents, {self.num_aliases:,} aliases"
        )
        if self.without_doc:
            text += f", {self.without_doc:,} with a signature only"
        if self.duplicates:
            text += f", {self.duplicates:,} paths given twice (the first counts)"
        if bad:
            text += f", {len(bad):,} lines not usable"
        if not self.num_documents:
            text += ". WARNING: without documents, questions about it get failure rows"
        shown = [f"  {self.file.path}:{line.line_no}: {line.reason}" for line in bad[:5]]
        if len(bad) > 5:
            shown.append(f"  … and {len(bad) - 5:,} more")
        return [text, *shown]


def check_file(file: CorpusFile) -> CheckReport:
    report = CheckReport(file, bad=[])
    seen = set()
    for document in read_documents(file.path, file.package, file.version):
        if isinstance(document, BadLine):
            assert report.bad is not None
            report.bad.append(document)
            continue
        report.num_documents += 1
        report.num_aliases += len(document.aliases)
        report.without_doc += not document.doc.strip()
        report.duplicates += document.path in seen
        seen.add(document.path)
    return report


def check_folder(folder: Path) -> tuple[list[str], bool]:
    """Lines to print, and whether there is a usable document at all."""
    files = list_corpora(folder)
    if not files:
        odd = [path.name for path in sorted(folder.glob("*.jsonl"))][:3]
        hint = f" (found {', '.join(odd)}: which package and version is that?)" if odd else ""
        raise InputError(
            f"{folder} holds no corpus{hint}. Name files <package>/<version>.jsonl or"
            " <package>==<version>.jsonl; each line an object with `path` and `doc`."
        )
    reports = [check_file(file) for file in files]
    lines = [line for report in reports for line in report.lines()]
    return lines, any(report.num_documents for report in reports)
