"""A whole run: queries in, contexts out, in query order, resumable at any moment.

Distinct questions are retrieved once, in batches, by this process or by several; rows go to an
append-only log as they come. The output is written from the log at the end, in one rename, so the
same log always gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ragfleet.contexts.dense import DENSE_VERSION, check_embedder
from ragfleet.contexts.lexical import INDEX_VERSION
from ragfleet.contexts.options import ContextsOptions
from ragfleet.contexts.queries import Query, check_queries, read_queries
from ragfleet.contexts.retrieve import ACCOUNT_NAME, Retriever
from ragfleet.contexts.rowlog import Freshness, RowLog, row_key
from ragfleet.contexts.search import DENSE_WEIGHT
from ragfleet.contexts.store import CorpusStore, NoCorpus
from ragfleet.contexts.summary import ContextsSummary
from ragfleet.corpus.children import away_from_here, begin_child, end_children
from ragfleet.corpus.download import normal_name
from ragfleet.errors import ConfigError, InputChanged, OutputError, StorageError, WorkersFailed

BATCH: Final = 64
LOG_NAME: Final = "rows.jsonl"
_SAY_EVERY_S: Final = 5.0
_BATCHES_AHEAD: Final = 4

OnText = Callable[[str], None]
Batch = list[tuple[str, Query]]


@dataclass
class Done:
    """What became of a batch: (key, hashes of the corpora's sets of documents, row) each."""

    rows: list[tuple[str, dict[str, str], dict[str, Any]]]
    worker_bytes: int
    tokens: str
    notes: list[str]


def generate_contexts(
    options: ContextsOptions,
    say: OnText | None = None,
    until: contextlib.ExitStack | None = None,
) -> ContextsSummary:
    """Raises a UsageError before anything is spent; StorageError or WorkersFailed later on.

    Args:
        until: nobody else makes these contexts until this ends (without it: until they are made).
    """
    say = say or (lambda text: None)
    started_s = time.monotonic()
    check_packages()
    store = CorpusStore(options.corpus_path, options.corpus_type)
    settings = run_settings(options)
    check_queries(options.queries_file, options.start_index)
    if options.embedding_source is not None:
        check_embedder(options.embedding_source, options.embedding_model)
    folder = options.log_folder
    check_output(options)
    summary = ContextsSummary(options.output_file)
    with contextlib.ExitStack() as made:
        (until or made).enter_context(_locked(folder))
        (folder / ACCOUNT_NAME).unlink(missing_ok=True)
        log = RowLog(folder / LOG_NAME)
        try:
            log.load(Freshness(store, options.nearest_version))
            stale = log.stale
            used = _retrieve_missing(options, settings, log, summary, say)
            summary.stale = len(stale & used)
            _write(options, settings, log, summary, store)
        finally:
            log.close()
    summary.seconds = time.monotonic() - started_s
    return summary


def check_packages() -> None:
    import importlib.util

    missing = [name for name in ("bm25s", "packaging") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"contexts need {' and '.join(missing)}: pip install 'ragfleet[contexts]'."
        )


def run_settings(options: ContextsOptions) -> dict[str, Any]:
    """What decides a row besides the query and the corpora. No paths: folders move."""
    tokenizer = None
    if options.model_path is not None:
        folder = Path(options.model_path).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"--model_path {options.model_path}: there is no such folder, and tokens are"
                " counted with its tokenizer; leave it out to have them estimated."
            )
        digest = hashlib.sha256()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            digest.update(path.read_bytes() if path.exists() else b"-")
        tokenizer = digest.hexdigest()[:16]
    model = options.embedding_model
    embedding = [options.embedding_source, Path(model).name if model else None]
    if options.embedding_source is not None:
        embedding.append(f"weight {DENSE_WEIGHT:g}")
    return {
        "index": [INDEX_VERSION, DENSE_VERSION],
        "corpus_type": options.corpus_type,
        "embedding": embedding,
        "max_documents": options.max_documents,
        "max_tokens": options.max_tokens,
        "tokenizer": tokenizer,
        "enable_str_match": options.enable_str_match,
        "nearest_version": options.nearest_version,
    }


def check_output(options: ContextsOptions, flag: str = "--output_file") -> None:
    """Raises OutputError where `flag` names something that is not this command's to replace."""
    output, log = options.output_file, options.log_folder / LOG_NAME
    if output.is_dir():
        raise OutputError(f"{flag} {output} is a folder; name a file in it.")
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{flag} {output} is a link to nothing; name the file itself.")
    if output.exists() and output.samefile(options.queries_file):
        raise OutputError(f"{flag} is the queries file itself; name another file.")
    if output.exists() and not log.exists():
        raise OutputError(
            f"{output} is there and was not made by this command ({log} is missing);"
            " name another file, or move it away."
        )


def _selected(options: ContextsOptions) -> Iterator[Query]:
    last = None if options.max_samples is None else options.start_index + options.max_samples
    return itertools.islice(read_queries(options.queries_file), options.start_index, last)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"Can't write to {folder}: {error.strerror}.") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"Another ragfleet is making or answering these contexts ({folder}); wait for it"
                " or stop it. Once they are made, ragfleet infer answers them beside it, with"
                " another model too."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


# ---- retrieving


def _retrieve_missing(
    options: ContextsOptions,
    settings: dict[str, Any],
    log: RowLog,
    summary: ContextsSummary,
    say: OnText,
) -> set[str]:
    """Fill the log; the keys of all selected queries."""
    failed = 0
    used: set[str] = set()
    noted: set[str] = set()
    missing = _missing(options, settings, log, used)
    batches = iter(lambda: list(itertools.islice(missing, BATCH)), [])
    told_s = time.monotonic()
    for done in _in_order(options, batches, say):
        for key, names, row in done.rows:
            log.append(key, names, row)
        log.flush()
        succeeded = sum(row["success"] for _, _, row in done.rows)
        summary.retrieved += succeeded
        failed += len(done.rows) - succeeded
        summary.worker_bytes = max(summary.worker_bytes, done.worker_bytes)
        summary.tokens = done.tokens
        for note in done.notes:
            if note not in noted:
                noted.add(note)
                say(note)
        if options.verbose or time.monotonic() - told_s > _SAY_EVERY_S:
            told_s = time.monotonic()
            say(
                f"{summary.retrieved:,} distinct questions retrieved, {failed:,} failed;"
                f" {done.worker_bytes >> 20:,} MiB in this worker"
            )
    summary.num_distinct = len(used)
    summary.kept = len(used) - summary.retrieved - failed
    if not summary.tokens:
        from ragfleet.contexts.assembly import TokenCounter

        summary.tokens = TokenCounter(options.model_path).description
        summary.worker_bytes = _own_bytes()
    return used


def _missing(
    options: ContextsOptions, settings: dict[str, Any], log: RowLog, used: set[str]
) -> Iterator[tuple[str, Query]]:
    for query in _selected(options):
        key = row_key(query, settings)
        if key not in used:
            used.add(key)
            if key not in log:
                yield key, query


def _in_order(options: ContextsOptions, batches: Iterator[Batch], say: OnText) -> Iterator[Done]:
    """Rows of each batch, in order, computed here or by workers; few batches wait at a time."""
    first = next(batches, None)
    if first is None:
        return
    batches = itertools.chain([first], batches)
    if options.embedding_source is not None:
        say(
            "Documents that have no embedding yet are embedded first"
            + (" (locally some eight a second)." if options.embedding_source == "local" else ".")
        )
    # A local embedding model stays out of this process, which may go on to supervise inference.
    if options.num_workers == 1 and options.embedding_source != "local":
        try:
            _PROCESS["retriever"] = Retriever(options)
            for batch in batches:
                yield _rows_of(batch)
        finally:
            _PROCESS.clear()
        return
    with (
        away_from_here(),
        ProcessPoolExecutor(
            options.num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_process,
            initargs=(options,),
        ) as pool,
    ):
        waiting: deque[Future[Done]] = deque()
        try:
            # One worker makes the indexes that are not there; the others find them.
            pool.submit(_prepare, _needed(options)).result()
            for batch in batches:
                waiting.append(pool.submit(_rows_of, batch))
                if len(waiting) > options.num_workers * _BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkersFailed(
                "A worker died (out of memory?). What is retrieved is kept: run the same command"
                " again, with fewer workers."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children()
            raise


_PROCESS: Final[dict[str, Retriever]] = {}
"""The retriever of this process: a pool's workers have no other place for it."""


def _start_process(options: ContextsOptions) -> None:
    begin_child()
    _PROCESS["retriever"] = Retriever(options)


def _needed(options: ContextsOptions) -> list[tuple[str, str]]:
    """(package, version) of every corpus the queries lead to."""
    store = CorpusStore(options.corpus_path, options.corpus_type)
    needed: dict[tuple[str, str], None] = {}
    for query in _selected(options):
        for package, versions in query.dependencies.items():
            with contextlib.suppress(NoCorpus):
                version = store.resolve(package, versions, options.nearest_version)
                needed[normal_name(package), version] = None
    return list(needed)


def _prepare(corpora: list[tuple[str, str]]) -> None:
    retriever = _PROCESS["retriever"]
    for package, version in corpora:
        retriever.searcher.prepare(retriever.store.load(package, version))


def _rows_of(batch: Batch) -> Done:
    retriever = _PROCESS["retriever"]
    rows = retriever.rows([query for _, query in batch])
    done = Done([], 0, retriever.counter.description, [])
    for (key, _), row in zip(batch, rows, strict=True):
        names = {
            f"{package}=={version}": retriever.store.load(package, version).names_hash
            for package, version in row.get("resolved_versions", {}).items()
        }
        done.rows.append((key, names, row))
    done.worker_bytes, done.notes = (
        _own_bytes(),
        [*retriever.store.notes, *retriever.searcher.notes],
    )
    return done


def _own_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- writing


def _write(
    options: ContextsOptions,
    settings: dict[str, Any],
    log: RowLog,
    summary: ContextsSummary,
    store: CorpusStore,
) -> None:
    output = options.output_file
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    encode = msgspec.json.Encoder().encode
    try:
        with log.reader() as read, open(temporary, "wb") as file:
            for query in _selected(options):
                key = row_key(query, settings)
                if key not in log:
                    raise InputChanged(
                        f"{options.queries_file} was edited while it was read; run the same command"
                        " again."
                    )
                row = _as_asked(read(key), query)
                summary.count(row, query, store)
                file.write(encode(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    except OSError as error:
        raise StorageError(
            f"Can't write {output}: {error.strerror}. What is retrieved is kept in {log.path}."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _as_asked(row: dict[str, Any], query: Query) -> dict[str, Any]:
    """The row of an equal question, under this query's own ids and with its own fields."""
    row["id"] = query.id
    row["original_item_id"] = query.original_item_id
    row["query_index"] = query.query_index
    for name, value in query.extra.items():
        row.setdefault(name, value)
    return row
