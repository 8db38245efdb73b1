"""From `package==version` to a corpus file and its manifest.

Archives are fetched, unpacked safely, parsed and linked; nothing of the package is executed. Each
package is built in a process of its own, so one that breaks the parser costs itself alone. A corpus
whose manifest matches is not built again, and one that is not ours is never replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ragfleet.config import path_of
from ragfleet.corpus.archives import ArchiveError, extract
from ragfleet.corpus.children import away_from_here, begin_child, end_children
from ragfleet.corpus.document import CorpusType, Document
from ragfleet.corpus.download import (
    Archive,
    DownloadError,
    Requirement,
    fetch_archives,
    parse_requirement,
)
from ragfleet.corpus.folder import corpus_file
from ragfleet.corpus.manifest import Extractor, Manifest, keep, not_ours, read_manifest
from ragfleet.errors import ConfigError, InputError, OutputError, RagfleetError

if TYPE_CHECKING:
    from ragfleet.corpus.modules import Package

EXTRACTOR_VERSION: Final = 2
"""Raise it when the same archives give other documents: corpora are then built anew."""
_RECURSION: Final = 20_000
_BUILD_LIMIT_S: Final = 3600.0
_EXIT_S: Final = 10.0
_LEFTOVER_S: Final = 86_400.0


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
        object.__setattr__(self, "corpus_path", path_of("corpus_path", self.corpus_path))
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
    _remove_leftovers(options.cache_path)
    results = []
    with away_from_here(), ThreadPoolExecutor(options.num_workers) as threads:
        futures = [threads.submit(_build_apart, requirement, options) for requirement in wanted]
        try:
            for future in as_completed(futures):
                results.append(future.result())
                on_built(results[-1])
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise
    return results


def _build_apart(requirement: Requirement, options: BuildOptions) -> Built:
    """`build_one` in a process of its own; how that ends is a result, whatever happens in it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build_and_send, args=(sender, requirement, options))
    process.start()
    sender.close()
    problem = f"it took longer than {_BUILD_LIMIT_S / 60:.0f} minutes"
    try:
        if receiver.poll(_BUILD_LIMIT_S):
            built: Built = receiver.recv()
            process.join(_EXIT_S)  # ended while it exits, it would show a traceback
            return built
    except EOFError:
        process.join()
        problem = f"its process died ({_how_it_ended(process.exitcode)})"
    finally:
        process.terminate()
        process.join()
        receiver.close()
    return Built(requirement, _target(requirement, options), None, problem)


def _build_and_send(sender: Connection, requirement: Requirement, options: BuildOptions) -> None:
    begin_child(cleans_up=True)
    sender.send(build_one(requirement, options))


def _how_it_ended(code: int | None) -> str:
    return "out of memory, or killed" if code == -9 else f"exit code {code}"


def _remove_leftovers(cache: Path) -> None:
    """What a build that was killed had unpacked."""
    for folder in cache.glob("unpacked-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _LEFTOVER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _target(requirement: Requirement, options: BuildOptions) -> Path:
    return corpus_file(
        options.corpus_path, requirement.name, requirement.version, options.corpus_type
    )


def build_one(requirement: Requirement, options: BuildOptions) -> Built:
    """Runs in a process of its own. Never raises for what an archive holds."""
    started_s = time.monotonic()
    target = _target(requirement, options)
    if target.exists() and not options.rebuild:
        there = read_manifest(target)
        if there is not None and _is_current(there, options):
            return Built(requirement, target, there, was_there=True)
        reason = not_ours(target, there)
        if reason is not None:
            return Built(requirement, target, None, reason)
    sys.setrecursionlimit(max(_RECURSION, sys.getrecursionlimit()))
    try:
        archives, problems = fetch_archives(requirement, options.cache_path / "archives")
        manifest = make_corpus(requirement, archives, target, options, problems)
    except (RagfleetError, OSError, RecursionError, MemoryError) as error:
        text = str(error) or type(error).__name__
        return Built(requirement, target, None, text, time.monotonic() - started_s)
    return Built(requirement, target, manifest, None, time.monotonic() - started_s)


def _is_current(manifest: Manifest, options: BuildOptions) -> bool:
    return (
        manifest.extractor_version == EXTRACTOR_VERSION
        and manifest.extractor == options.extractor
        and manifest.corpus_type == options.corpus_type
        and not manifest.incomplete
    )


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
    notes: list[str] = [f"incomplete: {problem}" for problem in problems]
    options.cache_path.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="unpacked-", dir=options.cache_path)
    try:
        package, read, refused = _read_archives(archives, Path(temporary), notes)
        if not package.modules:
            raise DownloadError(
                f"{requirement}: its archives hold no Python package that can be read"
                f" ({len(package.failures)} files failed)."
            )
        documents = _documents(requirement, package, options, notes)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    manifest = Manifest(
        requirement=str(requirement),
        corpus_type=options.corpus_type,
        extractor=options.extractor,
        extractor_version=EXTRACTOR_VERSION,
        archives=[
            {"name": archive.path.name, "kind": archive.kind, "sha256": archive.sha256}
            for archive in read
        ],
        import_roots=package.roots,
        num_files=len(package.modules),
        num_documents=len(documents),
        kinds=dict(sorted(Counter(document.kind for document in documents).items())),
        sources=dict(sorted(Counter(document.source for document in documents).items())),
        parse_failures=dict(sorted(package.failures.items())),
        refused_members=refused[:100],
        incomplete=bool(problems),
        notes=notes,
    )
    keep(target, documents, manifest)
    return manifest


def _read_archives(
    archives: Sequence[Archive], folder: Path, notes: list[str]
) -> tuple[Package, list[Archive], list[str]]:
    """The modules in them, which archives could be read, and which members were refused."""
    from ragfleet.corpus.modules import ModuleReader

    reader = ModuleReader()
    read: list[Archive] = []
    refused: list[str] = []
    for archive in sorted(archives, key=lambda archive: archive.kind != "wheel"):
        try:
            unpacked = extract(archive.path, folder / archive.kind)
        except ArchiveError as error:
            notes.append(str(error))
            continue
        add = reader.add_wheel if archive.kind == "wheel" else reader.add_sdist
        add(unpacked.folder, unpacked.files, unpacked.names)
        refused += unpacked.refused
        read.append(archive)
    if not read:
        raise ArchiveError(" ".join(notes))
    return reader.package, read, refused


def _documents(
    requirement: Requirement, package: Package, options: BuildOptions, notes: list[str]
) -> list[Document]:
    from ragfleet.corpus.added_docs import collect_added
    from ragfleet.corpus.constants import Constants
    from ragfleet.corpus.docs import Docs
    from ragfleet.corpus.emit import Emitter
    from ragfleet.corpus.generated import add_generated
    from ragfleet.corpus.linker import Linker
    from ragfleet.corpus.scalar_types import link_scalar_types

    linker = Linker(package)
    constants = Constants(linker)
    collect_added(package, linker, constants)
    link_scalar_types(linker)
    add_generated(package, linker, constants)
    emitter = Emitter(package, linker, Docs(linker, constants))
    documents = list(emitter.documents(requirement.name, requirement.version, options.corpus_type))
    if options.extractor == "dynamic":
        from ragfleet.corpus.dynamic import merge_dynamic

        documents, note = merge_dynamic(requirement, package.roots, documents, options)
        notes.append(note)
    return documents
