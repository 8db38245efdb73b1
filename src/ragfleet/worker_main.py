"""The worker process from its first instruction to its exit code.

    python -m ragfleet.worker_main LAUNCH_DIR RANK INCARNATION NUM_GPUS NUM_THREADS PARENT_PID
    EVENTS_FD

Started by `launchers.supervisor`, in a process group of its own, with its GPUs already set.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from ragfleet.engines.group_guard import GroupGuard
from ragfleet.errors import RagfleetError, RunError, UsageError
from ragfleet.events import EventPipe
from ragfleet.launch import LaunchPaths, read_launch
from ragfleet.plain_text import PlainFormatter

EXIT_FATAL: Final = 70
"""The whole run cannot go on; a `fatal` event said why. All else but 0 is this worker's death."""

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, even while C code holds the GIL.

    prctl(2) clears nothing for grandchildren; the launcher kills the group of a worker it reaps.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def main(argv: list[str]) -> int:
    launch_dir, *numbers = argv
    rank, incarnation, num_gpus, num_threads, parent_pid, events_fd = map(int, numbers)
    die_with_parent(parent_pid)
    # Without the launcher nobody kills this group; what an engine or a user's class starts in it
    # would go on holding a GPU.
    guard = GroupGuard()
    faulthandler.enable()
    # Written by C code, so it works while other C code holds the GIL; SIGUSR1 is Slurm's.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.set_inheritable(events_fd, False)
    events = EventPipe(events_fd, rank)
    try:
        paths = LaunchPaths(Path(launch_dir))
        launch = read_launch(paths)
        handler = logging.StreamHandler()
        handler.setFormatter(
            PlainFormatter(
                f"%(asctime)s worker {rank}.{incarnation} %(levelname)s %(name)s: %(message)s"
            )
        )
        logging.basicConfig(
            level=logging.DEBUG if launch.verbose else logging.INFO, handlers=[handler]
        )
        # Imported here: what a user's class or a library does at import belongs to the fatal
        # report.
        from ragfleet.engines.make import make_engine
        from ragfleet.worker import Worker

        def say(text: str) -> None:
            logging.getLogger(__name__).warning("%s", text)
            events.send("note", text)

        def degrade(text: str) -> None:
            say(text)
            worker.counters.degrade(text)

        spec = launch.engine_spec(num_gpus, num_threads, rank, paths.directory)
        spec = dataclasses.replace(spec, say=say, degrade=degrade)
        engine = make_engine(spec, launch.engine, launch.inference_class)
        worker = Worker(paths, launch, rank, incarnation, engine, events)

        def drain(signum: int, frame: FrameType | None) -> None:
            worker.draining = True
            worker.counters.state = "draining"

        signal.signal(signal.SIGTERM, drain)
        worker.run()
    except (UsageError, RunError) as error:
        events.send("fatal", str(error), error=type(error).__name__)
        return EXIT_FATAL
    except RagfleetError as error:
        events.send("note", str(error))
        raise
    finally:
        guard.close()
    return 0


def _exit(code: int) -> NoReturn:
    """At once: a thread that an engine or a user's class left running must not keep a dead worker
    from being replaced."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a log on a full disk
        os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except Exception:  # nobody is above: the log gets all of it, and the launcher exit code 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _exit(1)
    if exit_code:
        _exit(exit_code)
