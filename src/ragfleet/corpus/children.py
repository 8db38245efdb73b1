"""Processes that help this one: they leave signals to it and never outlive it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Final

_SAFE_PATH: Final = "PYTHONSAFEPATH"


@contextlib.contextmanager
def away_from_here() -> Iterator[None]:
    """Children that are started meanwhile take no module from the working directory.

    They begin as `python -c`, which looks there first: a `queue.py` of the user's would be taken
    for Python's own.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SAFE_PATH)
        if before is not None:
            os.environ[_SAFE_PATH] = before


def begin_child(cleans_up: bool = False) -> None:
    """To be called first in a child.

    A terminal sends SIGINT to parent and children alike; what it means is the parent's business.

    Args:
        cleans_up: SIGTERM raises SystemExit, so that temporary folders are removed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handler = (lambda number, frame: sys.exit(128 + number)) if cleans_up else signal.SIG_DFL
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def end_children() -> None:
    """Ask all children to end; to be called when this process gives up."""
    for child in multiprocessing.active_children():
        child.terminate()
