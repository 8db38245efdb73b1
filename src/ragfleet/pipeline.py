"""Corpora (where missing) → contexts → answers, in one go; each stage resumes by itself.

What ties them together is in the data: a context that comes out byte for byte as before has the
same request key, so only what a change touched is answered again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ragfleet.config import RunConfig, path_of
from ragfleet.context_room import context_room
from ragfleet.contexts import generate
from ragfleet.contexts.generate import check_packages, generate_contexts
from ragfleet.contexts.options import MAX_TOKENS, ContextsOptions, EmbeddingSource
from ragfleet.contexts.queries import check_queries, read_queries
from ragfleet.contexts.store import CorpusStore, NoCorpus
from ragfleet.contexts.summary import ContextsSummary
from ragfleet.corpus.build import BuildOptions, build_all
from ragfleet.corpus.document import CorpusType
from ragfleet.corpus.download import normal_name
from ragfleet.corpus.folder import list_corpora
from ragfleet.corpus.manifest import manifest_path
from ragfleet.earlier_files import check_output
from ragfleet.errors import ConfigError, InputError, OutputError
from ragfleet.events import OnEvent
from ragfleet.launch import RunPaths
from ragfleet.launchers import torchrun
from ragfleet.preparation import Preparation, prepare
from ragfleet.run_lock import check_free
from ragfleet.runner import run
from ragfleet.shards import choose, list_shards, scan_shards
from ragfleet.summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Queries in, answers out: make the corpora that are missing, generate contexts, answer them.

    Every option of `ragfleet infer` may be given too; --output_file is the results file.
    """

    queries_file: Path
    """JSON or JSONL file of queries."""
    corpus_path: Path = Path("data/corpus")
    """Folder of corpora; what queries need and it lacks is built into it."""
    contexts_file: Path | None = None
    """JSONL file of contexts to write (empty: <output_file's name>.contexts.jsonl)."""
    build_corpora: Literal["missing", "never"] = "missing"
    """missing: ask the package index for corpora that are not there; never: stay offline."""
    cache_path: Path = Path("~/.cache/ragfleet")
    """Where fetched archives are kept."""
    corpus_type: CorpusType = "docstring"
    """What contexts are made of: documentation, or source code."""
    embedding_source: EmbeddingSource | None = None
    """Search by meaning too: a local model, or Together's API (empty: by words alone)."""
    embedding_model: str | None = None
    """Folder or name of the embedding model (empty: all-MiniLM-L6-v2, from a package)."""
    max_documents: int = 10
    """Most documents in one context."""
    max_tokens: int | None = None
    """Most tokens in one context (empty: 4000, or what the model has room for beside question and
    answer)."""
    enable_str_match: bool = False
    """Also accept a target that only ends like one documented path (rag_string_match)."""
    nearest_version: bool = False
    """Where a version has no corpus, take the nearest one; the record says which."""
    start_index: int = 0
    """Skip the first so many queries."""
    max_samples: int | None = None
    """Take so many queries at most (empty: all)."""
    context_workers: int = 1
    """Worker processes that generate contexts (--num_workers is for answering)."""

    def __post_init__(self) -> None:
        for name in ("queries_file", "corpus_path", "contexts_file"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, path_of(name, getattr(self, name)))

    def contexts_file_for(self, output_file: Path) -> Path:
        if self.contexts_file is not None:
            return self.contexts_file
        return output_file.with_name(f"{output_file.stem}.contexts.jsonl")

    def contexts_options(
        self, config: RunConfig, tokenizer: Path | None, max_tokens: int
    ) -> ContextsOptions:
        """Tokens are counted by the `tokenizer` of the model that will answer, where it is here."""
        return ContextsOptions(
            queries_file=self.queries_file,
            corpus_path=self.corpus_path,
            output_file=config.contexts_file,
            corpus_type=self.corpus_type,
            embedding_source=self.embedding_source,
            embedding_model=self.embedding_model,
            max_documents=self.max_documents,
            max_tokens=max_tokens,
            model_path=None if tokenizer is None else str(tokenizer),
            enable_str_match=self.enable_str_match,
            nearest_version=self.nearest_version,
            start_index=self.start_index,
            max_samples=self.max_samples,
            num_workers=self.context_workers,
            verbose=config.verbose,
        )


@dataclass(frozen=True)
class PipelineSummary:
    contexts: ContextsSummary
    inference: RunSummary


def run_pipeline(
    options: PipelineOptions, config: RunConfig, say: Callable[[str], None], on_event: OnEvent
) -> PipelineSummary | None:
    """`config.contexts_file` is what the second stage writes and the third reads.

    Raises what the stages raise; whatever can be told beforehand is told before the first one.
    """
    check_packages()
    if torchrun.detect(os.environ) is not None:
        raise ConfigError(
            "ragfleet pipeline is one process that starts its workers; under torchrun, run it"
            " without torchrun, or make the contexts first and start `ragfleet infer`."
        )
    # A wrong model path or output is said now: not after an hour of contexts, and not when those of
    # a finished run are replaced already.
    _check_files(options, config)
    check_free(RunPaths(config.output_file.absolute()))
    preparation = prepare(config, os.environ)
    _check_earlier_answers(preparation)
    max_tokens, note = _most_tokens(options, preparation)
    contexts_options = options.contexts_options(config, _tokenizer(preparation), max_tokens)
    generate.check_output(contexts_options, "--contexts_file")
    missing = missing_corpora(options)
    if missing and options.build_corpora == "missing":
        say(f"Stage 1 of 3, corpora: {len(missing)} to make: {', '.join(missing[:10])}")
        build_all(
            missing,
            BuildOptions(
                corpus_path=options.corpus_path,
                corpus_type=options.corpus_type,
                cache_path=options.cache_path,
            ),
            lambda built: say(f"  {built.line()}"),
        )
    elif missing:
        names = ", ".join(missing[:10])
        say(f"Stage 1 of 3, corpora: {len(missing)} missing, and --build_corpora never: {names}")
    else:
        say("Stage 1 of 3, corpora: all there")
    say("Stage 2 of 3, contexts")
    if note is not None:
        say(f"  {note}")
    with contextlib.ExitStack() as answered:  # other contexts would stop who reads these
        contexts = generate_contexts(contexts_options, lambda text: say(f"  {text}"), answered)
        for line in contexts.lines():
            say(f"  {line}")
        say("Stage 3 of 3, answers")
        summary = run(config, on_event)
    return None if summary is None else PipelineSummary(contexts, summary)


def _check_files(options: PipelineOptions, config: RunConfig) -> None:
    """Raises InputError and OutputError where one stage would write over another's file."""
    check_queries(options.queries_file, options.start_index)
    output = config.output_file.resolve()
    if output == options.queries_file.resolve():
        raise OutputError("--output_file is the queries file itself; name another file.")
    if output == config.contexts_file.resolve():
        raise OutputError("--output_file is the contexts file itself; name another file.")


def _check_earlier_answers(preparation: Preparation) -> None:
    """Raises OutputError where the results file belongs to something else than this run."""
    if not preparation.config.overwrite:
        shards = list_shards(preparation.paths.output_file)
        check_output(preparation, len(choose(scan_shards(shards)).answers))


def _tokenizer(preparation: Preparation) -> Path | None:
    """Where contexts' tokens can be counted without code from the Hub."""
    folder, config = preparation.model_dir, preparation.config
    if folder is None or config.inference_type == "local" or (folder / "tokenizer.json").is_file():
        return folder
    return None


def _most_tokens(options: PipelineOptions, preparation: Preparation) -> tuple[int, str | None]:
    """Most tokens of a context, and the line about what the model has room for.

    Raises ConfigError where it has room for none.
    """
    room = context_room(
        preparation,
        (
            {"id": query.id, "target_api": query.target_api, **query.extra, "query": query.query}
            for query in read_queries(options.queries_file)
            if query.error is None
        ),
    )
    asked = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    if room is None or asked <= room.tokens:
        return asked, None
    if options.max_tokens is not None:
        side = preparation.config.truncate_context
        end = "get failure rows" if side == "error" else f"lose the {side} of their context"
        return asked, (
            f"Warning: --max_tokens is {asked:,}, and the model has room for"
            f" {max(room.tokens, 0):,}: {room.sum}. Prompts that are too long {end}."
        )
    if room.tokens < 1:
        raise ConfigError(
            f"There is no room for contexts: {room.sum}. Use a smaller --max_new_tokens."
        )
    return room.tokens, f"Contexts have at most {room.tokens:,} tokens: {room.sum}."


def missing_corpora(options: PipelineOptions) -> list[str]:
    """`package==version` that queries name and the folder lacks.

    A package that the folder holds as a user's own (no manifest) is never asked for elsewhere: a
    private name is nobody else's business, and a stranger's package of that name is no answer.
    """
    store, own = None, set()
    if options.corpus_path.is_dir():
        for file in list_corpora(options.corpus_path):
            if not manifest_path(file.path).exists():
                own.add(file.package)
        try:
            store = CorpusStore(options.corpus_path, options.corpus_type)
        except InputError:
            store = None  # a folder without corpora of this type yet
    missing: dict[str, None] = {}
    for query in read_queries(options.queries_file):
        for package, versions in query.dependencies.items():
            if not versions or normal_name(package) in own or not _is_version(versions[0]):
                continue
            try:
                if store is None:
                    raise NoCorpus
                store.resolve(package, versions, options.nearest_version)
            except NoCorpus:
                missing[f"{normal_name(package)}=={versions[0]}"] = None
    return list(missing)


def _is_version(text: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        Version(text)
    except InvalidVersion:
        return False
    return True
