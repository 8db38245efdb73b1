"""`ragfleet export` and `import`: a run's requests as OpenAI batch files, and their replies back.

Somebody else does the work in between: `vllm run-batch`, a provider's web page, another machine.
The requests are the same as those of --api_mode batch; the replies become lines of a shard, so all
else of a run (resume, merge, verification of the input) works as ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ragfleet.config import RunConfig
from ragfleet.earlier_files import finished_before, lacks_shards, move_away
from ragfleet.engines.protocol import Failure, Request, SamplingParams
from ragfleet.errors import ConfigError, InputError, StorageError, UsageError
from ragfleet.identity import RunFile, write_run_file
from ragfleet.index import read_lines
from ragfleet.inspection import MergeOptions, merge_now, run_of
from ragfleet.launch import RunPaths
from ragfleet.outcomes import record_seed
from ragfleet.planning import find_finished, index_contexts, selection_of
from ragfleet.preparation import Preparation, check_paths, prepare
from ragfleet.privacy import is_private, make_private
from ragfleet.records import LazyRecord, parse_sent
from ragfleet.remote.asking import common_body
from ragfleet.remote.asking import prepare as prepare_body
from ragfleet.remote.batch_lines import lines_of, read_line, request_line
from ragfleet.remote.replies import Answer, Fault
from ragfleet.rows import Answered, encode_value, failed, result_row
from ragfleet.run_lock import RunLock
from ragfleet.shards import ShardWriter, is_own_name


def export_requests(config: RunConfig, target: Path) -> list[str]:
    """Write what is not finished; returns the lines to print.

    More than a provider takes in one file goes into `-0002.jsonl` and so on. The run is written
    down, so that `import` and later starts know it.
    """
    check_paths(config)
    paths = RunPaths(config.output_file.absolute())
    private = config.private or is_private(paths)
    with RunLock(paths, private=private) as lock:
        try:
            # Under the lock: a start that is just ending writes down what it merged and removed.
            preparation = prepare(config, os.environ, None, needs_key=False)
            if preparation.remote is None:
                raise ConfigError("ragfleet export is for --inference_type openai or togetherai.")
            _check_target(target, preparation)
            selection = selection_of(config, preparation.num_workers, preparation.key_fields)
            indexed = index_contexts(selection, preparation.identity.run_key)
            if config.overwrite:
                to_do = indexed.requests
            else:
                finished = find_finished(indexed, paths.output_file)
                to_do = indexed.requests & ~finished_before(preparation, indexed, finished)
        except UsageError:
            lock.discard_new()
            raise
        if not to_do.any():
            return [
                f"Nothing to export: all {int(indexed.requests.sum()):,} requests are finished."
            ]
        if config.overwrite:
            move_away(paths, private)
        before = preparation.run_file
        write_run_file(
            paths,
            RunFile(
                run_key=preparation.identity.run_key.hex(),
                parts=dict(preparation.identity.parts),
                clock=preparation.clock,
                output_name=paths.output_file.name,
                starts=before.starts if before is not None else 0,
                truncation=[config.truncate_context, config.max_model_len],
                class_hash=preparation.class_hash,
                selection=selection,
                merged=before.merged if before is not None else None,
                written=before.written if before is not None else [],
            ),
        )
        if private:
            make_private(paths)
        return _write_files(preparation, indexed.index.records[to_do], target)


def _check_target(target: Path, preparation: Preparation) -> None:
    """Raises ConfigError where the requests would take another file's place."""
    output = preparation.paths.output_file
    if target.resolve() == output.resolve() or is_own_name(target, output):
        raise ConfigError(
            f"{target} is the output itself, or a name that it uses for its own files; the requests"
            " need a file of their own."
        )
    for path in (target, _numbered(target, 2)):
        if path.exists():
            raise ConfigError(f"{path} exists already; name another file.")


def _numbered(target: Path, number: int) -> Path:
    return target if number == 1 else target.with_stem(f"{target.stem}-{number:04}")


def _write_files(preparation: Preparation, records: Any, target: Path) -> list[str]:
    remote = preparation.remote
    assert remote is not None
    limits = (remote.batch_requests, remote.batch_bytes)
    said: list[str] = []
    chunk: list[bytes] = []
    size = skipped = 0

    def write() -> None:
        path = _numbered(target, len(said) + 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(chunk))
        except OSError as error:
            raise StorageError(f"Can't write {path}: {error.strerror}.") from error
        said.append(f"{len(chunk):,} requests, {size:,} bytes → {path}")

    for line in _request_lines(preparation, records):
        if line is None:
            skipped += 1
            continue
        if chunk and (len(chunk) >= limits[0] or (limits[1] and size + len(line) > limits[1])):
            write()
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        write()
    if skipped:
        said.append(f"{skipped:,} requests can't be made; `ragfleet infer` gives them failure rows")
    output = preparation.paths.output_file
    return [*said, f"Then: ragfleet import REPLIES --output_file {output}"]


def _request_lines(preparation: Preparation, records: Any) -> Iterator[bytes | None]:
    config, remote = preparation.config, preparation.remote
    assert remote is not None
    sampling = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=config.stop,
    )
    common = common_body(remote, preparation.prompts, sampling)
    keys = np.column_stack((records["key_hi"], records["key_lo"])).astype("<u8").tobytes()
    fd = os.open(config.contexts_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = read_lines(fd, records["offset"], records["length"])
        for number, line in enumerate(lines):
            key = keys[16 * number : 16 * number + 16]
            _, query, context, method = parse_sent(line)
            request = Request(
                key=key,
                query=query,
                context=context,
                retrieval_method=method,
                record=LazyRecord(line),
                seed=record_seed(config.seed, key),
            )
            prepared = prepare_body(request, preparation.prompts, remote)
            if isinstance(prepared, Failure):
                yield None
            else:
                yield request_line(key, remote.path, {**common, **prepared.own})
    finally:
        os.close(fd)


def import_replies(output_file: Path, replies: Path) -> list[str]:
    """Append whole replies to a shard; merge when nothing is missing any more.

    Raises InputError for a file that holds none of this run's while some are missing.
    """
    if not replies.is_file():
        raise InputError(f"There is no file {replies}.")
    paths, _ = run_of(output_file)
    taken = failures = unknown = passing = 0
    with RunLock(paths):
        paths, run_file = run_of(output_file)
        assert run_file.selection is not None
        indexed = index_contexts(run_file.selection, bytes.fromhex(run_file.run_key))
        finished = find_finished(indexed, paths.output_file)
        to_do = indexed.requests & ~finished.mask(indexed)
        if lacks_shards(run_file, indexed, finished) and paths.output_file.exists():
            to_do[:] = False  # the answers are in the output
        rows = np.flatnonzero(to_do)
        records = indexed.index.records[rows]
        keys = np.column_stack((records["key_hi"], records["key_lo"])).astype("<u8").tobytes()
        place = {keys[16 * number : 16 * number + 16]: number for number in range(len(rows))}
        shard = ShardWriter(paths.output_file, 0)
        with open(run_file.selection.contexts_file, "rb") as contexts:
            for line in lines_of(replies):
                read = read_line(line)
                number = place.get(read[0]) if read is not None else None
                if read is None or number is None:
                    unknown += not line.isspace()
                    continue
                key, verdict = read
                if isinstance(verdict, Fault) and verdict.remedy != "fail":
                    passing += 1
                    continue
                del place[key]
                failures += isinstance(verdict, Fault)
                taken += 1
                contexts.seek(int(records["offset"][number]))
                source = contexts.read(int(records["length"][number]))
                shard.open()
                shard.append(
                    _row(
                        source,
                        int(records["line_no"][number]),
                        key,
                        verdict,
                        include_context=run_file.selection.include_context,
                    )
                )
        shard.close()
    left = len(rows) - taken
    if left and not taken + passing:
        raise InputError(
            f"None of the {unknown:,} lines of {replies} is a reply to an unfinished request of"
            f" {output_file} (their custom_id says to which); {left:,} requests remain."
        )
    said = [f"{taken:,} replies taken ({failures:,} of them failures)"]
    if passing:
        said.append(f"{passing:,} failed for a reason that may pass; they remain to do")
    if unknown:
        said.append(f"{unknown:,} lines are no replies to unfinished requests of this run")
    if left:
        return [*said, f"{left:,} requests remain: export again, or run `ragfleet infer`"]
    return [*said, merge_now(MergeOptions(output_file=output_file))]


def _row(
    line: bytes, line_no: int, key: bytes, verdict: Answer | Fault, include_context: bool
) -> bytes:
    """A finished line, as a worker writes it; the time it took is not known."""
    fields, _, context, _ = parse_sent(line)
    if isinstance(verdict, Fault):
        answered = failed(verdict.error_type, verdict.message, 0)
    else:
        own = [
            ("finish_reason", encode_value(verdict.finish_reason)),
            ("prompt_tokens", encode_value(verdict.prompt_tokens)),
            ("completion_tokens", encode_value(verdict.completion_tokens)),
        ]
        if verdict.reasoning is not None:
            own.append(("reasoning", encode_value(verdict.reasoning)))
        answered = Answered(encode_value(verdict.text), 0.0, 0, True, tuple(own))
    return result_row(
        fields,
        f"line:{line_no}",
        answered,
        include_context=include_context,
        context_length=len(context),
        extra=b',"request_key":"%b","finished_at_ns":%d' % (key.hex().encode(), time.time_ns()),
    )
