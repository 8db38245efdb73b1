"""What a corpus was made from, beside it; and putting both in place.

A corpus without a manifest is a user's own, and one whose hash is another was edited: neither is
ever replaced unasked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from ragfleet.corpus.document import CorpusType, Document, write_documents

Extractor = Literal["static", "dynamic"]


class Manifest(msgspec.Struct):
    """What a corpus was made from. A corpus without one is a user's own."""

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
    corpus_sha256: str = ""
    incomplete: bool = False
    notes: list[str] = []


def manifest_path(corpus: Path) -> Path:
    return corpus.with_name(corpus.name.removesuffix(".jsonl") + ".manifest.json")


def read_manifest(target: Path) -> Manifest | None:
    try:
        return msgspec.json.decode(manifest_path(target).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def not_ours(target: Path, manifest: Manifest | None) -> str | None:
    """Why a corpus that is there must not be replaced unasked."""
    if manifest is None:
        reason = f"{target} has no manifest, so it is somebody's own"
    elif _sha256(target) != manifest.corpus_sha256:
        reason = f"{target} was edited since it was made"
    else:
        return None
    return f"{reason}; it is left alone (--rebuild replaces it)."


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep(target: Path, documents: Iterable[Document], manifest: Manifest) -> None:
    """Write both; `manifest` gets the hash of the corpus."""
    made = target.with_name(f".{target.name}.{os.getpid()}.new")
    new_manifest = made.with_suffix(".manifest")
    try:
        write_documents(made, documents)
        manifest.corpus_sha256 = _sha256(made)
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
        new_manifest.write_bytes(text + b"\n")
        # In this order, so that a corpus of ours is never without its manifest.
        target.unlink(missing_ok=True)
        new_manifest.replace(manifest_path(target))
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
        new_manifest.unlink(missing_ok=True)
