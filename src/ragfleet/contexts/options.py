"""The settings of `ragfleet contexts`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ragfleet.config import path_of
from ragfleet.corpus.document import CorpusType
from ragfleet.errors import ConfigError

MAX_TOKENS: Final = 4000
EmbeddingSource = Literal["local", "togetherai"]


@dataclass(frozen=True, kw_only=True)
class ContextsOptions:
    """Generate a context for every query, from the corpora of exactly its dependencies."""

    queries_file: Path
    """JSON or JSONL file of queries: `query`, and `target_api` and `dependencies` where known."""
    corpus_path: Path = Path("data/corpus")
    """Folder of corpora: <package>/<version>.jsonl."""
    output_file: Path = Path("contexts.jsonl")
    """JSONL file of contexts to write, one row per query, in query order."""
    corpus_type: CorpusType = "docstring"
    """What contexts are made of: documentation, or source code."""
    embedding_source: EmbeddingSource | None = None
    """Search by meaning too, and weigh both: a local model, or Together's embeddings API
    (empty: by words alone)."""
    embedding_model: str | None = None
    """Folder or name of the embedding model (empty: all-MiniLM-L6-v2, English, from a package)."""
    max_documents: int = 10
    """Most documents in one context."""
    max_tokens: int = MAX_TOKENS
    """Most tokens in one context."""
    model_path: str | None = None
    """Folder of the model that will read the contexts: its tokenizer counts (empty: estimated)."""
    enable_str_match: bool = False
    """Also accept a target that only ends like one documented path (rag_string_match)."""
    nearest_version: bool = False
    """Where a version has no corpus, take the nearest one; the record says which."""
    start_index: int = 0
    """Skip the first so many queries."""
    max_samples: int | None = None
    """Take so many queries at most (empty: all)."""
    num_workers: int = 1
    """Worker processes."""
    verbose: bool = False
    """Tell how each kind of match was distributed, and memory per worker."""

    @property
    def log_folder(self) -> Path:
        """Where a run keeps its rows, beside its output."""
        return self.output_file.with_name(f"{self.output_file.stem}.contexts")

    def __post_init__(self) -> None:
        for name in ("queries_file", "corpus_path", "output_file"):
            object.__setattr__(self, name, path_of(name, getattr(self, name)))
        for name, least in (
            ("max_documents", 1),
            ("max_tokens", 1),
            ("start_index", 0),
            ("max_samples", 1),
            ("num_workers", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}; it must be at least {least}.")
        if self.embedding_model is not None and self.embedding_source is None:
            raise ConfigError(
                "--embedding_model is given without --embedding_source; add"
                " --embedding_source local (or togetherai), or leave it out."
            )
