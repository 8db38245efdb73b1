"""Who may read a run: with --private its owner alone.

A run is private when its directory is: so a later merge or resume keeps to it without being told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ragfleet.errors import OutputError
from ragfleet.launch import RunPaths
from ragfleet.shards import list_shards, partial_path

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def is_private(paths: RunPaths) -> bool:
    try:
        return not paths.directory.stat().st_mode & _OTHERS
    except OSError:
        return False


def make_private(paths: RunPaths) -> None:
    """Take everybody else's permissions from what earlier starts wrote.

    Raises OutputError where that is impossible: another owner, or a file system that keeps none.
    """
    output = paths.output_file
    own = [output, partial_path(output), *list_shards(output)]
    for path in [paths.directory, *_inside(paths.directory), *(p for p in own if p.exists())]:
        try:
            before = path.lstat().st_mode
            if before & _OTHERS and not stat.S_ISLNK(before):
                path.chmod(stat.S_IMODE(before) & ~_OTHERS)
                if path.stat().st_mode & _OTHERS:
                    raise OutputError(
                        f"--private: the file system of {path} keeps no permissions; take another"
                        " place for the output."
                    )
        except OSError as error:
            raise OutputError(f"--private: can't change {path}: {error.strerror}.") from None


def _inside(directory: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(directory):
        yield from (Path(folder, name) for name in (*folders, *files))
