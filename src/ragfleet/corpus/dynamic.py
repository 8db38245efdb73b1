"""`--extractor dynamic`: import the package too, shut in, and merge what only that can tell.

This executes the package's code. It is opt-in, happens in an environment of its own made of wheels
alone, in namespaces without network, and a document that came this way says `source: dynamic`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from ragfleet.corpus.document import Document
from ragfleet.corpus.download import DownloadError, Requirement

if TYPE_CHECKING:
    from ragfleet.corpus.build import BuildOptions

_SCRIPT: Final = Path(__file__).with_name("dynamic_script.py")
_INSTALL_S: Final = 900
_IMPORT_S: Final = 600
_MAX_OUTPUT_BYTES: Final = 256 << 20


class _Row(msgspec.Struct):
    path: str
    kind: str
    doc: str
    signature: str


def merge_dynamic(
    requirement: Requirement,
    roots: Sequence[str],
    documents: list[Document],
    options: BuildOptions,
) -> tuple[list[Document], str]:
    """Static documents, then those that only an import shows; and a line for the manifest.

    Raises DownloadError when the environment can't be made or shut in.
    """
    if shutil.which("unshare") is None or not _can_unshare():
        raise DownloadError(
            "--extractor dynamic imports the package, and this machine can't cut it off from the"
            " network (unshare -rn fails); use --extractor static."
        )
    python = options.python or sys.executable
    # Absolute, for the import's working directory is another one.
    cache = options.cache_path.absolute()
    with tempfile.TemporaryDirectory(prefix="dynamic-", dir=cache) as folder:
        interpreter = _environment(requirement, python, Path(folder))
        rows, failures = _import_all(interpreter, roots, Path(folder))
    if failures and not rows:
        raise DownloadError(
            f"{requirement} can't be imported by {python}: {'; '.join(failures)}. Name an"
            " interpreter it was made for: --python; or use --extractor static."
        )
    known = {name: document for document in documents for name in _names(document)}
    said = {(document.name, " ".join(document.doc.split())) for document in documents}
    added: dict[str, Document] = {}
    filled = 0
    for row in rows:
        document = known.get(row.path)
        if document is None:
            name = row.path.rpartition(".")[2]
            if (name, " ".join(row.doc.split())) in said:
                continue  # an inherited member, which look-ups find through its class
            added.setdefault(row.path, _document(requirement, row))
        elif not document.doc:
            document.doc, document.source = row.doc, "dynamic"
            document.complete(requirement.name, requirement.version)
            filled += 1
    merged = sorted([*documents, *added.values()], key=lambda document: document.path)
    note = f"dynamic: {len(added):,} documents added, {filled:,} filled ({python})"
    return merged, "; not imported: ".join([note, *failures])


def _names(document: Document) -> list[str]:
    return [document.path, *document.aliases]


def _document(requirement: Requirement, row: _Row) -> Document:
    document = Document(
        path=row.path, doc=row.doc, kind=row.kind, signature=row.signature, source="dynamic"
    )
    return document.complete(requirement.name, requirement.version)


def _can_unshare() -> bool:
    done = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    return done.returncode == 0


def _environment(requirement: Requirement, python: str, folder: Path) -> Path:
    """A venv with the package and its dependencies, from wheels: installing them runs nothing."""
    commands = [
        [python, "-m", "venv", str(folder / "venv")],
        [
            *(str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet"),
            *("--disable-pip-version-check", "--only-binary", ":all:", str(requirement)),
        ],
    ]
    for command in commands:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_INSTALL_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DownloadError(f"{command[0]}: {error}") from error
        if done.returncode:
            raise DownloadError(
                f"{requirement} can't be installed for {python} from wheels alone:"
                f" {done.stderr.strip()[-300:]} Name an interpreter it was made for: --python."
            )
    return folder / "venv/bin/python"


def _import_all(
    interpreter: Path, roots: Sequence[str], folder: Path
) -> tuple[list[_Row], list[str]]:
    """What the imports show, and the last words of those that failed."""
    rows: list[_Row] = []
    failures: list[str] = []
    for root in roots:
        found, last_words = _import(interpreter, root, folder)
        rows += found
        if last_words is not None:
            failures.append(f"{root} ({last_words})")
    return rows, failures


def _import(interpreter: Path, root: str, folder: Path) -> tuple[list[_Row], str | None]:
    """Run the script without network, without our environment's variables."""
    out, log = folder / f"{root}.jsonl", folder / f"{root}.log"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "MPLBACKEND": "Agg", "LANG": "C"}
    with open(out, "wb") as file, open(log, "wb") as errors:
        try:
            done = subprocess.run(
                ["unshare", "-rn", str(interpreter), "-I", str(_SCRIPT), root],
                stdout=file,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
                timeout=_IMPORT_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise DownloadError(f"importing {root} took more than {_IMPORT_S} s.") from error
    if os.path.getsize(out) > _MAX_OUTPUT_BYTES:
        raise DownloadError(f"importing {root} printed more than it can document.")
    rows = []
    for line in out.read_bytes().splitlines():
        try:
            rows.append(msgspec.json.decode(line, type=_Row))
        except msgspec.DecodeError:
            continue  # what the package itself prints when imported
    if rows or not done.returncode:
        return rows, None
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 4000))
        lines = file.read().decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return rows, said[-1][-300:] if said else f"exit code {done.returncode}"
