"""The corpus format: one API, or one document of a user's, per JSON line.

Owns the fields, what makes a line usable, and a document's hash. A user's record needs only `path`
and `doc`; everything else has a default. It knows nothing of archives, indexes or queries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

CorpusType = Literal["docstring", "srccodes"]
Source = Literal["py", "c-ext", "pyx", "pyi", "dynamic", "user"]


class Document(msgspec.Struct, omit_defaults=False):
    """One API of one package version.

    Attributes:
        path: the shortest public dotted path. aliases: its other public paths.
        defined_in: where it is defined, which two paths of one thing share.
        instance_of: for an instance or accessor, the path of its class.
        mro: paths of a class's bases (or of the instance's class), nearest first.
        source: what it was read from. doc_sha1: of signature and doc, as UTF-8.
    """

    path: str
    doc: str
    aliases: list[str] = []
    name: str = ""
    kind: str = "document"
    package: str = ""
    version: str = ""
    import_root: str = ""
    signature: str = ""
    summary: str = ""
    defined_in: str = ""
    instance_of: str | None = None
    mro: list[str] = []
    source: Source = "user"
    doc_sha1: str = ""

    def complete(self, package: str, version: str) -> Document:
        """Fill what a user's record may leave out; a hash is always that of the text."""
        self.name = self.name or self.path.rpartition(".")[2]
        self.package = self.package or package
        self.version = self.version or version
        self.import_root = self.import_root or self.path.partition(".")[0]
        self.summary = self.summary or first_sentence(self.doc)
        self.defined_in = self.defined_in or self.path
        self.doc_sha1 = hashlib.sha1(
            f"{self.signature}\n{self.doc}".encode("utf-8", "replace"), usedforsecurity=False
        ).hexdigest()
        return self


_decode = msgspec.json.Decoder(Document).decode
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class BadLine:
    line_no: int
    reason: str


def parse_document(line: bytes) -> Document | str:
    """The document, or why the line is none."""
    try:
        document = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"not a JSON object with `path` and `doc` as strings ({error})"
    if not document.path.strip():
        return "`path` is blank"
    if not document.doc.strip() and not document.signature.strip():
        return "`doc` is blank"
    return document


def read_documents(path: Path, package: str, version: str) -> Iterator[Document | BadLine]:
    with open(path, "rb") as file:
        for line_no, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if line_no == 1 else line
            if text.isspace():
                continue
            document = parse_document(text)
            if isinstance(document, str):
                yield BadLine(line_no, document)
            else:
                yield document.complete(package, version)


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for document in documents:
            file.write(_encode(document) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def first_sentence(doc: str) -> str:
    """The first paragraph that is prose, on one line: C functions begin with their signature."""
    paragraphs = [" ".join(part.split()) for part in doc.split("\n\n")]
    for paragraph in paragraphs:
        if paragraph and not _looks_like_signature(paragraph):
            return paragraph[:300]
    return paragraphs[0][:300] if paragraphs else ""


def _looks_like_signature(text: str) -> bool:
    head, bracket, _ = text.partition("(")
    return bool(bracket) and " " not in head.strip() and text.rstrip().endswith(")")
