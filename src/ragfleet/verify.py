"""Proof that a results file is what its contexts and shards say, and the way out for what failed.

`verify` makes every row again from the input and the shards and compares it with the one on disk:
so there is one row per selected line, in order, each with the metadata of its line and the answer
of its current key. Without shards (--remove_shards) answers can't be proved, and it says so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import msgspec

from ragfleet.earlier_files import lacks_shards
from ragfleet.errors import InputError, OutputError
from ragfleet.identity import RunFile
from ragfleet.index import Kind
from ragfleet.inspection import run_of
from ragfleet.merge import UNFINISHED, merged_rows
from ragfleet.plain_text import one_line
from ragfleet.planning import Indexed, find_finished, index_contexts
from ragfleet.records import decode_any, parse_fields
from ragfleet.shards import list_shards
from ragfleet.summary import MergeStatistics

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_SHOWN: Final = 10
_MISSING: Final = object()
_FROM_SHARDS: Final = (
    "answer",
    "inference_time",
    "total_time",
    "worker_rank",
    "success",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "reasoning",
    "truncated_tokens",
    "error",
    "error_type",
)


@dataclass
class Verification:
    """What was found; `problems` names the first rows that fall short."""

    rows: int = 0
    succeeded: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    answers_proved: bool = True

    def add(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(one_line(problem))

    def lines(self, results: Path) -> list[str]:
        kinds = ", ".join(
            f"{one_line(name)} {count:,}" for name, count in self.errors.most_common()
        )
        failed = f" ({kinds})" if kinds else ""
        lines = [
            f"{results}: {self.rows:,} rows, {self.succeeded:,} succeeded,"
            f" {self.failed:,} failed{failed}."
        ]
        if not self.answers_proved:
            lines.append("The shards are gone, so only rows, order and metadata were compared.")
        if not self.num_problems:
            proved = "answers" if self.answers_proved else "metadata"
            return [*lines, f"VERIFIED: one row per selected line, in order, {proved} of its key."]
        lines += self.problems
        return [*lines, f"NOT VERIFIED: {self.num_problems:,} rows fall short."]


def verify(contexts: Path, results: Path) -> Verification:
    """Compare a results file with its contexts and shards, streaming both.

    Raises:
        InputError: another contexts file than the run's.
        OutputError: no run, or no results file.
    """
    paths, run_file = run_of(results)
    indexed = _index_of(contexts, run_file)
    _check_exists(results)
    finished = find_finished(indexed, paths.output_file)
    has_shards = bool(list_shards(paths.output_file)) and not lacks_shards(
        run_file, indexed, finished
    )
    found = Verification(answers_proved=has_shards or not indexed.requests.any())
    expected = merged_rows(
        indexed.merge_job(finished.winners, mark_unfinished=True), MergeStatistics()
    )
    with open(results, "rb") as file:
        for number, (row, wanted) in enumerate(zip_longest(file, expected), 1):
            if row is None:
                assert wanted is not None
                found.add(f"row {number}: missing (record {_id(wanted)})")
            elif wanted is None:
                found.rows += 1
                found.add(f"row {number}: one too many")
            else:
                found.rows += 1
                _compare(number, row, wanted, found)
    return found


def _check_exists(results: Path) -> None:
    if results.is_dir():
        raise OutputError(f"{results} is a folder; name the results file.")
    if not results.exists():
        raise OutputError(
            f"There is no {results} yet: its run is not finished, or not merged. Run infer again;"
            f" ragfleet status --output_file {results} says what remains."
        )


def _index_of(contexts: Path, run_file: RunFile) -> Indexed:
    assert run_file.selection is not None
    if not contexts.exists():
        raise InputError(f"There is no contexts file {contexts}.")
    selection = msgspec.structs.replace(run_file.selection, contexts_file=str(contexts.absolute()))
    return index_contexts(selection, bytes.fromhex(run_file.run_key))


def _compare(number: int, row: bytes, wanted: bytes, found: Verification) -> None:
    try:
        have = _fields(row)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found.add(f"row {number}: not a JSON object")
        return
    if have.get("success") is True:
        found.succeeded += 1
    else:
        found.failed += 1
        found.errors[str(have.get("error_type"))] += 1
    if row == wanted:
        return
    want = _fields(wanted)
    if want.get("error_type") == UNFINISHED and found.answers_proved:
        found.add(f"row {number} ({want['id']}): its current record has no answer in the shards")
        return
    skipped = () if found.answers_proved else _FROM_SHARDS
    names = [n for n in want if n not in skipped and have.get(n, _MISSING) != want[n]]
    names += [n for n in have if n not in skipped and n not in want]
    if names:
        found.add(f"row {number} ({want['id']}): differs in {', '.join(names)}")


def failed_inputs(results: Path) -> Iterator[bytes]:
    """The input lines whose row in a results file failed, as they stand in the contexts file.

    Raises:
        OutputError: no run, no results, or results of another selection.
    """
    _, run_file = run_of(results)
    assert run_file.selection is not None
    indexed = index_contexts(run_file.selection, bytes.fromhex(run_file.run_key))
    _check_exists(results)
    changed = f"{results} is not of the current selection; run infer again."
    if run_file.merged is not None and run_file.merged["digest"] != indexed.digest():
        raise OutputError(changed)  # its rows are other lines', even if they are as many
    dropped = run_file.selection.drop_failed_contexts
    records = indexed.index.records
    rows = [row for part in indexed.selected for row in part]
    kept = [row for row in rows if not (dropped and records["kind"][row] == Kind.FAILED_CONTEXT)]
    with open(results, "rb") as file, open(run_file.selection.contexts_file, "rb") as contexts:
        for row, line in zip_longest(kept, file):
            if row is None or line is None:
                raise OutputError(changed)
            if msgspec.json.decode(line, type=_Success).success:
                continue
            contexts.seek(int(records["offset"][row]))
            yield contexts.read(int(records["length"][row])).rstrip(b"\r\n") + b"\n"


class _Success(msgspec.Struct):
    success: bool = False


def _id(row: bytes) -> Any:
    return _fields(row).get("id")


def _fields(row: bytes) -> dict[str, Any]:
    """A row's values; one with a number that Python can't hold stays as it is written."""
    with contextlib.suppress(msgspec.DecodeError):
        return _decode(row)
    values: dict[str, Any] = {}
    for name, raw in parse_fields(row).items():
        try:
            values[name] = decode_any(raw)
        except msgspec.DecodeError:
            values[name] = bytes(raw)
    return values
