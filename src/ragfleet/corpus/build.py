"""From `package==version` to a corpus file and its manifest.

Archives are fetched, unpacked safely, parsed and linked; nothing of the package is executed. Each
package is built in a process of its own, so one that breaks the parser costs itself alone. A corpus
whose manifest matches is not built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from ragfleet.corpus.archives import ArchiveError, extract
from ragfleet.corpus.document import CorpusType, Document, write_documents
from ragfleet.corpus.download import (
    Archive,
    DownloadError,
    Requirement,
    fetch_archives,
    parse_requirement,
)
from ragfleet.corpus.folder import corpus_file
from ragfleet.errors import ConfigError, InputError, OutputError, RagfleetError

EXTRACTOR_VERSION: Final = 1
"""Raise it when the same archives give other documents: corpora are then built anew."""
Extractor = Literal["static", "dynamic"]
_RECURSION: Final = 20_000


class Manifest(msgspec.Struct):
    """What a corpus was made from; written after the corpus, so it also says: complete."""

    requirement: str
    corpus_type: CorpusType
    extractor: Extractor
    extractor_version: int
    archives: list[dict[str, str]]
    import_roots: list[str]
    num_files: int
    num_documents: int
    kinds: dict[str, int]
    sources: dict[str, int]
    parse_failures: dict[str, str]
    refused_members: list[str]
    corpus_sha256: str
    incomplete: bool = False
    notes: list[str] = []


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Make corpora of API documentation from the package index; no package code is executed."""

    corpus_path: Path = Path("data/corpus")
    """Folder to write `<package>/<version>.jsonl` to."""
    corpus_type: CorpusType = "docstring"
    """docstring: signature and documentation of each API; srccodes: its source code."""
    extractor: Extractor = "static"
    """static: parse only. dynamic: also import the package, without network, and merge."""
    python: str | None = None
    """Interpreter for --extractor dynamic: old versions need an old one (empty: this one)."""
    cache_path: Path = Path("~/.cache/ragfleet")
    """Where fetched archives are kept."""
    num_workers: int = 1
    """Packages built at the same time."""
    rebuild: bool = False
    """Build again what is there already."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_path", self.cache_path.expanduser())
        if self.num_workers < 1:
            raise ConfigError(f"--num_workers is {self.num_workers}; it must be at least 1.")
        if self.python is not None and self.extractor != "dynamic":
            raise ConfigError("--python is for --extractor dynamic; leave one of the two out.")


@dataclass(frozen=True)
class Built:
    requirement: Requirement
    path: Path
    manifest: Manifest | None
    error: str | None = None
    seconds: float = 0.0
    was_there: bool = False

    def line(self) -> str:
        if self.manifest is None:
            return f"{self.requirement}: failed: {self.error}"
        failures = len(self.manifest.parse_failures)
        text = f"{self.requirement}: {self.manifest.num_documents:,} documents"
        if failures:
            text += f", {failures} of {self.manifest.num_files + failures} files could not be read"
        if self.manifest.refused_members:
            text += f", {len(self.manifest.refused_members)} archive members refused"
        if self.was_there:
            return f"{text}; was there"
        notes = "".join(f"\n  {note}" for note in self.manifest.notes)
        return f"{text} in {self.seconds:.1f} s{notes}"


def build_all(
    requirements: Sequence[str], options: BuildOptions, on_built: Callable[[Built], None]
) -> list[Built]:
    """Build every one that isn't there; a failure of one does not stop the others.

    Raises:
        InputError: a requirement that is not `package==version`.
        OutputError: the folder can't be written.
    """
    wanted = list(dict.fromkeys(parse_requirement(text) for text in requirements))
    if not wanted:
        raise InputError("Name at least one package==version to build a corpus of.")
    try:
        options.corpus_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Can't create {options.corpus_path}: {error.strerror}.") from None
    results = []
    with ProcessPoolExecutor(
        max_workers=options.num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
    ) as pool:
        futures: dict[Future[Built], Requirement] = {
            pool.submit(build_one, requirement, options): requirement for requirement in wanted
        }
        for future in as_completed(futures):
            try:
                built = future.result()
            except BrokenProcessPool:
                requirement = futures[future]
                path = _target(requirement, options)
                built = Built(requirement, path, None, "its process died (out of memory?)")
            results.append(built)
            on_built(built)
    return results


def _target(requirement: Requirement, options: BuildOptions) -> Path:
    return corpus_file(
        options.corpus_path, requirement.name, requirement.version, options.corpus_type
    )


def manifest_path(corpus: Path) -> Path:
    return corpus.with_name(corpus.name.removesuffix(".jsonl") + ".manifest.json")


def build_one(requirement: Requirement, options: BuildOptions) -> Built:
    """Runs in a process of its own. Never raises for what an archive holds."""
    started_s = time.monotonic()
    target = _target(requirement, options)
    there = None if options.rebuild else _still_valid(target, options)
    if there is not None:
        return Built(requirement, target, there, was_there=True)
    sys.setrecursionlimit(max(_RECURSION, sys.getrecursionlimit()))
    try:
        archives, problems = fetch_archives(requirement, options.cache_path / "archives")
        manifest = make_corpus(requirement, archives, target, options, problems)
    except (RagfleetError, OSError, RecursionError, MemoryError) as error:
        text = str(error) or type(error).__name__
        return Built(requirement, target, None, text, time.monotonic() - started_s)
    return Built(requirement, target, manifest, None, time.monotonic() - started_s)


def _still_valid(target: Path, options: BuildOptions) -> Manifest | None:
    try:
        manifest = msgspec.json.decode(manifest_path(target).read_bytes(), type=Manifest)
        same = (
            manifest.extractor_version == EXTRACTOR_VERSION
            and manifest.extractor == options.extractor
            and manifest.corpus_type == options.corpus_type
            and not manifest.incomplete
        )
        return manifest if same and target.exists() else None
    except (OSError, msgspec.DecodeError):
        return None


def make_corpus(
    requirement: Requirement,
    archives: Sequence[Archive],
    target: Path,
    options: BuildOptions,
    problems: Sequence[str] = (),
) -> Manifest:
    """Archives → documents → `target` and its manifest.

    `problems` says which archive could not be fetched: such a corpus is made, says so, and is made
    again next time.

    Raises ArchiveError when none of the archives can be read, DownloadError when they hold no
    Python package.
    """
    from ragfleet.corpus.modules import ModuleReader

    reader = ModuleReader()
    refused: list[str] = []
    notes: list[str] = [f"incomplete: {problem}" for problem in problems]
    options.cache_path.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="unpacked-", dir=options.cache_path)
    try:
        read: list[Archive] = []
        for archive in sorted(archives, key=lambda archive: archive.kind != "wheel"):
            try:
                unpacked = extract(archive.path, Path(temporary) / archive.kind)
            except ArchiveError as error:
                notes.append(str(error))
                continue
            add = reader.add_wheel if archive.kind == "wheel" else reader.add_sdist
            add(unpacked.folder, unpacked.files, unpacked.names)
            refused += unpacked.refused
            read.append(archive)
        if not read:
            raise ArchiveError(" ".join(notes))
        if not reader.package.modules:
            raise DownloadError(
                f"{requirement}: its archives hold no Python package that can be read"
                f" ({len(reader.package.failures)} files failed)."
            )
        documents = _documents(requirement, reader.package, options, notes)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_documents(target, documents)
    manifest = Manifest(
        requirement=str(requirement),
        corpus_type=options.corpus_type,
        extractor=options.extractor,
        extractor_version=EXTRACTOR_VERSION,
        archives=[
            {"name": archive.path.name, "kind": archive.kind, "sha256": archive.sha256}
            for archive in read
        ],
        import_roots=reader.package.roots,
        num_files=len(reader.package.modules),
        num_documents=len(documents),
        kinds=dict(sorted(Counter(document.kind for document in documents).items())),
        sources=dict(sorted(Counter(document.source for document in documents).items())),
        parse_failures=dict(sorted(reader.package.failures.items())),
        refused_members=refused[:100],
        corpus_sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
        incomplete=bool(problems),
        notes=notes,
    )
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    temporary_file = manifest_path(target).with_suffix(".tmp")
    with contextlib.closing(open(temporary_file, "wb")) as file:
        file.write(text + b"\n")
    temporary_file.replace(manifest_path(target))
    return manifest


def _documents(
    requirement: Requirement, package: Any, options: BuildOptions, notes: list[str]
) -> list[Document]:
    from ragfleet.corpus.added_docs import collect_added
    from ragfleet.corpus.constants import Constants
    from ragfleet.corpus.docs import Docs
    from ragfleet.corpus.emit import Emitter
    from ragfleet.corpus.linker import Linker

    linker = Linker(package)
    constants = Constants(linker)
    collect_added(package, linker, constants)
    emitter = Emitter(package, linker, Docs(linker, constants))
    documents = list(emitter.documents(requirement.name, requirement.version, options.corpus_type))
    if options.extractor == "dynamic":
        from ragfleet.corpus.dynamic import merge_dynamic

        documents, note = merge_dynamic(requirement, package.roots, documents, options)
        notes.append(note)
    return documents
