"""Small corpora and archives, made where they are needed; nothing here asks a package index."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragfleet.corpus.build import BuildOptions, make_corpus
from ragfleet.corpus.document import CorpusType, Document, read_documents
from ragfleet.corpus.download import Archive, parse_requirement
from ragfleet.corpus.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def write_wheel(path: Path, files: Mapping[str, str]) -> Archive:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return Archive(path, "wheel", "0" * 64)


def write_sdist(path: Path, files: Mapping[str, str]) -> Archive:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            data = text.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Archive(path, "sdist", "0" * 64)


class Made:
    """A corpus made from sources given as text."""

    def __init__(self, documents: dict[str, Document], manifest: Manifest, path: Path) -> None:
        self.documents, self.manifest, self.path = documents, manifest, path

    def names(self, path: str) -> list[str]:
        return [path, *self.documents[path].aliases]

    def doc(self, name: str) -> str:
        for document in self.documents.values():
            if name in (document.path, *document.aliases):
                return document.doc
        raise KeyError(name)


class Maker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        wheel: Mapping[str, str] | None = None,
        sdist: Mapping[str, str] | None = None,
        corpus_type: CorpusType = "docstring",
    ) -> Made:
        archives = []
        if wheel is not None:
            archives.append(write_wheel(self.folder / "pkg-1.0-py3-none-any.whl", wheel))
        if sdist is not None:
            archives.append(write_sdist(self.folder / "pkg-1.0.tar.gz", sdist))
        target = self.folder / "corpus" / "pkg" / "1.0.jsonl"
        options = BuildOptions(
            corpus_path=self.folder / "corpus",
            cache_path=self.folder / "cache",
            corpus_type=corpus_type,
        )
        manifest = make_corpus(parse_requirement("pkg==1.0"), archives, target, options)
        documents = {
            document.path: document
            for document in read_documents(target, "pkg", "1.0")
            if isinstance(document, Document)
        }
        return Made(documents, manifest, target)


def write_corpus(folder: Path, package: str, version: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / package / f"{version}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
