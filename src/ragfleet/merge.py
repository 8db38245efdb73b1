"""Shards ⋈ input order → results: one row per selected record, whatever order answers came in.

A pure function of the input, the shards and the selection: run it twice, or over shards in another
order, and the same bytes come out. Metadata come from the input line, only the answer and its
figures from the shard; where a shard's row proves to be made from this very line, that is a copy.
Nothing replaces the output before every row is written and synced.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash
from msgspec import Raw
from numpy.typing import NDArray

from ragfleet.errors import InputChanged, StorageError
from ragfleet.index import Kind, read_lines
from ragfleet.nesting import is_too_deep
from ragfleet.records import Head, parse_fields, parse_head
from ragfleet.rows import (
    Answered,
    ShardRow,
    failed,
    from_shard,
    parse_shard_row,
    place_of,
    result_row,
    unsealed,
)
from ragfleet.shards import Winners, fsync_directory, rank_of
from ragfleet.summary import MergeStatistics, WorkerStatistics

UNFINISHED: Final = "unfinished"
"""error_type of the rows that `mark_unfinished` makes."""
_OTHER_FILES: Final = 64
_BLOCK: Final = 1 << 15
_PROGRESS_EVERY: Final = 1 << 14
_BUFFER_BYTES: Final = 1 << 20
_NULL: Final = Raw(b"null")
_EMPTY: Final = Raw(b'""')
_LENGTH: Final = Raw(b'"length"')


@dataclass(frozen=True)
class MergeJob:
    """What to merge.

    Attributes:
        contexts_bytes: size of the contexts file when it was indexed.
        records: [num_records] of index.RECORD with leaders and final keys.
        selected: row ranges of the output, ascending.
        mark_unfinished: give records without an outcome a row of their own, else leave them out.
    """

    contexts_file: Path
    contexts_bytes: int
    records: NDArray[Any]
    selected: Sequence[range]
    winners: Winners
    include_context: bool = False
    drop_failed_contexts: bool = False
    mark_unfinished: bool = False


def write_results(
    job: MergeJob,
    output_file: Path,
    before_replace: Callable[[MergeStatistics, str], None] | None = None,
    *,
    private: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> MergeStatistics:
    """Write the output whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Args:
        before_replace: called with the new statistics, and the hash of the new output, before the
            old one is replaced.
        private: only the owner may read the output.
        on_progress: called now and then with the rows so far.

    Raises:
        InputChanged: a line is not the one that was indexed.
        StorageError: no room, no permission; the old output is untouched.
    """
    temporary = output_file.with_name(f".{output_file.name}.{os.getpid()}.tmp")
    statistics, digest = MergeStatistics(), xxhash.xxh3_128()
    try:
        mode = 0o600 if private else 0o666
        with open(
            temporary,
            "wb",
            buffering=_BUFFER_BYTES,
            opener=lambda path, flags: os.open(path, flags, mode),
        ) as file:
            for number, row in enumerate(merged_rows(job, statistics), 1):
                file.write(row)
                digest.update(row)
                if on_progress is not None and number % _PROGRESS_EVERY == 0:
                    on_progress(number)
            file.flush()
            os.fsync(file.fileno())
        if before_replace is not None:
            before_replace(statistics, digest.hexdigest())
        os.replace(temporary, output_file)
        fsync_directory(output_file.parent)
    except OSError as error:
        raise StorageError(f"Can't write {output_file}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return statistics


def merged_rows(job: MergeJob, statistics: MergeStatistics) -> Iterator[bytes]:
    """The output's lines in input order, counted into `statistics` as they come."""
    by_shard = _workers(job.winners.paths, statistics)
    with contextlib.ExitStack() as stack:
        used = set(np.unique(job.winners.answers["shard"]).tolist())
        allow_open_files(len(used))
        shards = [
            stack.enter_context(open(path, "rb", buffering=0)).fileno() if number in used else -1
            for number, path in enumerate(job.winners.paths)
        ]
        contexts = stack.enter_context(open(job.contexts_file, "rb", buffering=0)).fileno()
        for part in job.selected:
            for start in range(part.start, part.stop, _BLOCK):
                rows = slice(start, min(start + _BLOCK, part.stop))
                yield from _block(job, rows, contexts, shards, by_shard, statistics)
        # Each line was compared with what was indexed, but for those that are new.
        grown = os.fstat(contexts).st_size - job.contexts_bytes
        if grown:
            change = f"grew by {grown:,} bytes" if grown > 0 else f"lost {-grown:,} bytes"
            raise InputChanged(
                f"{job.contexts_file} {change} since it was read. What is finished is safe; run the"
                " same command again, and it goes on with the rest."
            )


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files as far as needed and allowed: a shard each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _workers(paths: Sequence[Path], statistics: MergeStatistics) -> list[WorkerStatistics]:
    by_shard = []
    for path in paths:
        worker = statistics.workers.setdefault(rank_of(path), WorkerStatistics(rank_of(path)))
        worker.shards.append(path.name)
        by_shard.append(worker)
    return by_shard


def _block(
    job: MergeJob,
    rows: slice,
    contexts: int,
    shards: list[int],
    by_shard: list[WorkerStatistics],
    statistics: MergeStatistics,
) -> Iterator[bytes]:
    """The lines of some rows; `contexts` and `shards` are file descriptors."""
    records = job.records[rows]
    shard_of, readers = _answers(job, records, shards)
    line_hash = xxhash.xxh3_64_intdigest
    for row, line, hash_, line_no, leader, kind, shard in zip(
        range(rows.start, rows.stop),
        read_lines(contexts, records["offset"], records["length"]),
        records["line_hash"].tolist(),
        records["line_no"].tolist(),
        records["leader"].tolist(),
        records["kind"].tolist(),
        shard_of.tolist(),
        strict=True,
    ):
        if line_hash(line) != hash_:
            raise InputChanged(
                f"{job.contexts_file} was edited since it was read (line {line_no}). What is"
                " finished is safe; run the same command again."
            )
        if kind != Kind.SEND:
            failure = _not_sent(line, job.drop_failed_contexts, statistics)
            if failure is not None:
                yield _row(_readable_fields(line), line_no, failure, job.include_context)
        elif shard < 0:
            statistics.missing += 1
            if job.mark_unfinished:
                none = failed(UNFINISHED, "no answer yet")
                yield _row(parse_fields(line), line_no, none, job.include_context)
        else:
            shard_line = next(readers[shard])
            answer = parse_shard_row(shard_line)
            _count(statistics, answer, by_shard[shard] if leader == row else None)
            result = unsealed(shard_line, place_of(hash_, line_no, job.include_context))
            yield result or _row(
                parse_fields(line), line_no, from_shard(answer), job.include_context
            )


def _answers(
    job: MergeJob, records: NDArray[Any], shards: list[int]
) -> tuple[NDArray[Any], list[Iterator[bytes]]]:
    """(shard of each record's answer or -1, for each shard those answers' lines in turn)."""
    leaders = job.records[records["leader"]]
    found = job.winners.find(leaders["key_hi"], leaders["key_lo"])
    found[records["kind"] != Kind.SEND] = -1
    answers = job.winners.answers[found[found >= 0]]
    shard_of = np.full(len(records), -1)
    shard_of[found >= 0] = answers["shard"]
    readers = []
    for number, fd in enumerate(shards):
        here = answers[answers["shard"] == number]
        readers.append(read_lines(fd, here["offset"], here["length"]))
    return shard_of, readers


def _not_sent(line: bytes, drop_failed: bool, statistics: MergeStatistics) -> Answered | None:
    head = parse_head(line)
    if isinstance(head, Head):  # it is no request although it is sound: its context failed
        if drop_failed:
            statistics.dropped += 1
            return None
        error_type, reason = "context_failed", head.error or ""
    else:
        error_type, reason = "invalid_record", getattr(head, "reason", "")
    statistics.rows += 1
    statistics.failed += 1
    statistics.not_sent += 1
    statistics.errors[error_type] = statistics.errors.get(error_type, 0) + 1
    return failed(error_type, reason)


def _count(statistics: MergeStatistics, answer: ShardRow, worker: WorkerStatistics | None) -> None:
    """`worker` None: the row takes its leader's answer."""
    statistics.rows += 1
    if worker is None:
        statistics.duplicates += 1
    else:
        statistics.generated += 1
    if not answer.success:
        statistics.failed += 1
        error_type = answer.error_type or "unknown"
        statistics.errors[error_type] = statistics.errors.get(error_type, 0) + 1
        if worker is not None:
            worker.failed += 1
        return
    statistics.succeeded += 1
    statistics.cut_at_max_new_tokens += answer.finish_reason == _LENGTH
    statistics.empty_answers += answer.answer == _EMPTY
    if worker is not None:
        worker.succeeded += 1
        worker.inference_time_s += answer.inference_time
        if answer.prompt_tokens != _NULL:
            statistics.prompt_tokens += int(bytes(answer.prompt_tokens))
        if answer.completion_tokens != _NULL:
            statistics.completion_tokens += int(bytes(answer.completion_tokens))


def _readable_fields(line: bytes) -> dict[str, Raw] | None:
    """The fields of a line that may be anything; None where they can't be told."""
    try:
        fields = None if is_too_deep(line) else parse_fields(line)
        line.decode()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return fields


def _row(
    fields: dict[str, Raw] | None, line_no: int, answer: Answered, include_context: bool
) -> bytes:
    context_length = None
    if fields is not None and "context_length" not in fields and "context" in fields:
        context = msgspec.json.decode(fields["context"])
        context_length = len(context) if isinstance(context, str) else None
    return result_row(
        fields,
        f"line:{line_no}",
        answer,
        include_context=include_context,
        context_length=context_length,
    )
