"""Files of earlier starts: what is refused, what is removed, what is moved out of the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from ragfleet.claims import Board, ClaimStore
from ragfleet.errors import OutputError
from ragfleet.identity import RunFile, check_same_run, check_truncation, write_run_file
from ragfleet.launch import LaunchPaths, RunPaths
from ragfleet.planning import Finished, Indexed
from ragfleet.preparation import Preparation
from ragfleet.shards import list_shards, partial_path
from ragfleet.summary import MergeStatistics

_Key = tuple[int, int]
_MOST_CARRIED: Final = 2
"""Deaths that make a suspect; poison takes one more."""


def check_output(preparation: Preparation, num_answers: int) -> None:
    """Refuse an output that belongs to something else; `num_answers` stand in its shards."""
    paths, run_file, config = preparation.paths, preparation.run_file, preparation.config
    if run_file is None:
        if paths.output_file.exists() and not num_answers:
            raise OutputError(
                f"{paths.output_file} exists, and no run of ragfleet made it. Take another"
                " --output_file, or --overwrite, which moves it to"
                f" {paths.output_file.stem}.bak-<time>."
            )
        return
    if run_file.output_name not in ("", paths.output_file.name):
        raise OutputError(
            f"{paths.directory} belongs to {run_file.output_name}; two outputs whose names"
            " differ only in their ending can't share it. Take another --output_file."
        )
    if not num_answers:
        if run_file.merged is None:
            return  # nothing depends on the earlier start's settings
        num_answers = run_file.merged["statistics"]["succeeded"]  # their shards were removed
    check_same_run(run_file, preparation.identity, paths.output_file, num_answers)
    truncation = [config.truncate_context, config.max_model_len]
    check_truncation(run_file, truncation, paths.output_file)


def merged_without_shards(
    preparation: Preparation, indexed: Indexed, retry_failed: bool
) -> dict[str, Any] | None:
    """What is known of the merge of a run that is complete and whose shards were removed then, else
    None. Raises OutputError where it would have to be extended."""
    merged = preparation.run_file.merged if preparation.run_file else None
    if not merged or not merged.get("shards_removed"):
        return None
    output = preparation.paths.output_file
    if (
        merged["digest"] != indexed.digest()
        or not output.exists()
        or (retry_failed and merged["statistics"]["failed"])
    ):
        raise OutputError(extending_refused(output))
    return merged


def extending_refused(output: Path) -> str:
    return (
        f"{output} was merged and its shards removed (--remove_shards), so it can't be"
        " extended. Take another --output_file, or --overwrite."
    )


def lacks_shards(run_file: RunFile, indexed: Indexed, finished: Finished) -> bool:
    """Whether a run is merged as it is now, and its shards were removed then: all, or those that a
    kill left time for. Not where a copy of them was put back."""
    merged = run_file.merged
    if not merged or not merged["shards_removed"] or merged["digest"] != indexed.digest():
        return False
    return not finished.shards or bool((indexed.requests & ~finished.mask(indexed)).any())


def finished_before(
    preparation: Preparation, indexed: Indexed, finished: Finished
) -> NDArray[np.bool_]:
    """[num_records] Which requests need not be answered. Raises OutputError as `check_output` and
    `merged_without_shards`."""
    retry_failed = preparation.config.retry_failed
    check_output(preparation, len(finished.winners.answers))
    if merged_without_shards(preparation, indexed, retry_failed):
        return indexed.requests.copy()
    return finished.mask(indexed, retry_failed)


def remove_shards(finished: Finished) -> None:
    """Of a run that is merged; but not if they hold answers that are nowhere else."""
    if not finished.num_unasked_answers:
        for shard in finished.shards:
            shard.unlink()


def remove_old_launches(paths: RunPaths, indexed: Indexed) -> dict[str, tuple[int, ...]]:
    """Nothing of an earlier start runs any more: the lock says so. Returns the deaths that the next
    one has to know of, as rows of this index by owner."""
    deaths = _earlier_deaths(paths, indexed)
    for torn in paths.output_file.parent.glob(f".{paths.output_file.name}.*.tmp"):
        torn.unlink(missing_ok=True)
    shutil.rmtree(paths.launches, ignore_errors=True)
    paths.launches.mkdir(parents=True, exist_ok=True)
    return deaths


def _earlier_deaths(paths: RunPaths, indexed: Indexed) -> dict[str, tuple[int, ...]]:
    """What was in flight when workers died. Else a start that is given up for records that kill
    would meet them all anew, and so would each after it.

    No row is in more than two, the narrowest: that makes a suspect, which is tried once more.
    """
    sets = [found for folder in paths.launches.glob("*") for found in _death_sets(folder)]
    row_of = _rows_of({key for _, keys in sets for key in keys}, indexed)
    carried: dict[str, tuple[int, ...]] = {}
    times: Counter[int] = Counter()
    for rank, keys in sorted(sets, key=lambda found: len(found[1])):
        rows = [row_of[key] for key in keys if key in row_of]
        if rows and len(rows) == len(keys) and all(times[row] < _MOST_CARRIED for row in rows):
            times.update(rows)
            carried[f"{rank}.earlier{len(carried)}"] = tuple(rows)
    return carried


def _death_sets(launch: Path) -> list[tuple[str, list[_Key]]]:
    """(rank, keys that were in flight) of each death; none where files are gone."""
    paths, board = LaunchPaths(launch), Board(slices=(), costs=())
    try:
        ClaimStore(paths.claims).refresh(board)
        records = np.load(paths.array("records"), mmap_mode="r", allow_pickle=False)
        return [
            (owner.partition(".")[0], records[["key_hi", "key_lo"]][list(rows)].tolist())
            for owner, rows in board.deaths.items()
        ]
    except (OSError, ValueError, EOFError, IndexError):
        return []


def _rows_of(keys: set[_Key], indexed: Indexed) -> dict[_Key, int]:
    if not keys:
        return {}
    rows = np.flatnonzero(indexed.requests)
    records = indexed.index.records[rows]
    wanted = np.array([key_hi for key_hi, _ in keys], dtype="<u8")
    here = np.isin(records["key_hi"], wanted)
    found = records[["key_hi", "key_lo"]][here].tolist()
    return {key: row for key, row in zip(found, rows[here].tolist(), strict=True) if key in keys}


def move_away(paths: RunPaths, private: bool) -> None:
    """--overwrite: everything of the earlier run into one folder, so that one `mv` undoes it."""
    output = paths.output_file
    old = [output, partial_path(output), *list_shards(output)]
    old = [path for path in old if path.exists()]
    inside = [path for path in paths.directory.iterdir() if path != paths.lock]
    if not old and not inside:
        return
    backup = backup_names(output)[1]
    backup.mkdir(mode=0o700 if private else 0o777)
    (backup / paths.directory.name).mkdir()
    for path in old:
        path.rename(backup / path.name)
    for path in inside:
        path.rename(backup / paths.directory.name / path.name)


def before_replacing(
    paths: RunPaths, run_file: RunFile, statistics: MergeStatistics, content: str
) -> str | None:
    """What a merge does before it replaces an output: keep the old one if it holds what the new one
    will not, and write down the new one's `content`, its hash. Returns the note to show.

    The old one may have more answers, or be as no merge left it: labels that somebody wrote into it
    are nowhere else.
    """
    output, old = paths.output_file, None
    with contextlib.suppress(FileNotFoundError):
        old = _content_of(output)
    before = (run_file.merged or {}).get("statistics", {}).get("succeeded", 0)
    why = None
    if old is not None and before > statistics.succeeded:
        why = f"had {before:,} answers and gets {statistics.succeeded:,}: the old file"
    elif old is not None and old not in run_file.written:
        why = "is not what a merge wrote: that file"
    note = None
    if why is not None:
        backup = backup_names(output)[0]
        _keep(output, backup)
        note = f"{output.name} {why} is kept as {backup.name}"
    # Before the new one is there: a kill in between leaves the old one, and both are ours.
    run_file.written = [known for known in run_file.written if known == old] + [content]
    write_run_file(paths, run_file)
    return note


def _content_of(output: Path) -> str:
    """Hash of a file: sizes of an edit may be equal, and times are not kept by every copy."""
    digest = xxhash.xxh3_128()
    with open(output, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _keep(output: Path, backup: Path) -> None:
    """Under a second name, for the first one gets another file; a copy where there are no links."""
    try:
        os.link(os.path.realpath(output), backup)
    except OSError:
        os.close(os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        shutil.copyfile(output, backup)
        shutil.copystat(output, backup)


def backup_names(output: Path) -> tuple[Path, Path]:
    """Free names for a backup of the output alone, and for a folder of all of its run's files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while True:
        stem = f"{output.stem}.bak-{stamp}" + (f"-{number}" if number else "")
        file, folder = output.with_name(f"{stem}{output.suffix}"), output.with_name(stem)
        if not file.exists() and not folder.exists():
            return file, folder
        number += 1
