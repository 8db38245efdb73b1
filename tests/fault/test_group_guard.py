"""What an engine started ends with its worker, also when nobody is left to end it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# A worker with a child that would run on for a minute, and a guard.
WORKER = """
import os, subprocess, sys, time
from ragfleet.engines.group_guard import GroupGuard
child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
guard = GroupGuard()
if "forks" in sys.argv and os.fork() == 0:  # it keeps the pipe that the guard listens to
    time.sleep(60)
print(child.pid, flush=True)
for line in sys.stdin:
    guard.close()
    print("closed", flush=True)
"""


@contextmanager
def worker(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A started worker and a pidfd of its child; the child is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        try:
            yield process, pidfd
        finally:
            if not has_ended(pidfd, 0):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def has_ended(pidfd: int, timeout_s: float) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


def test_a_killed_worker_takes_its_processes_with_it() -> None:
    with worker() as (process, child):
        process.kill()
        assert has_ended(child, 10)


def test_also_where_a_fork_of_it_lives_on() -> None:
    with worker("forks") as (process, child):
        process.kill()
        assert has_ended(child, 10)


def test_a_closed_guard_kills_nobody() -> None:
    with worker() as (process, child):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("close\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        process.kill()
        process.wait()
        assert not has_ended(child, 0.2)
