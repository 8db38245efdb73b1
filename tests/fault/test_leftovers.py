"""What a killed start leaves behind is ended by the next one; what lives is left alone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ragfleet.errors import OutputError
from ragfleet.launch import RunPaths
from ragfleet.leftovers import VARIABLE, Starter, end_tagged, tag
from ragfleet.run_lock import RunLock, check_free, holder_of


@pytest.fixture
def sleeper() -> Iterator[psutil.Popen]:
    """A process as a worker of launch `one` would leave it."""
    process = psutil.Popen(
        ["sleep", "60"], env={VARIABLE: tag("one", "0.1")}, start_new_session=True
    )
    while VARIABLE not in process.environ():
        time.sleep(0.01)  # the kernel has yet to put it there, a moment after the start
    yield process
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        process.wait()


@pytest.mark.parametrize("other", [tag("on"), tag("one", "0.10"), tag("one", "0"), tag("two")])
def test_only_the_tag_that_is_meant(sleeper: psutil.Popen, other: str) -> None:
    assert end_tagged(other) == []
    assert sleeper.is_running()


@pytest.mark.parametrize("whole", [tag("one"), tag("one", "0.1")])
def test_what_is_tagged_is_ended(sleeper: psutil.Popen, whole: str) -> None:
    assert end_tagged(whole) == [sleeper.pid]
    assert sleeper.wait(timeout=5) == -signal.SIGKILL


FAMILY = """
import os, subprocess, sys, time
for number in range(int(sys.argv[1])):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
time.sleep(60)
"""


def test_a_family_that_left_its_group_is_ended_whole() -> None:
    environment = {**os.environ, VARIABLE: tag("family", "0.0")}
    parent = subprocess.Popen([sys.executable, "-c", FAMILY, "5"], env=environment)
    try:
        while len(psutil.Process(parent.pid).children()) < 5:
            time.sleep(0.01)  # forks give no sign
        children = [child.pid for child in psutil.Process(parent.pid).children()]
        assert end_tagged(tag("family")) == sorted([parent.pid, *children])
        for child in children:
            assert not psutil.pid_exists(child) or (
                psutil.Process(child).status() == psutil.STATUS_ZOMBIE
            )
    finally:
        parent.kill()
        parent.wait()


# ---- the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from ragfleet.launch import RunPaths
from ragfleet.run_lock import RunLock

with RunLock(RunPaths(Path(sys.argv[1])), "the-launch") as lock:
    os.environ["RAGFLEET_WORKER"] = sys.argv[2]
    os.set_inheritable(lock.fd, True)
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "60"])
    print("held", flush=True)
    time.sleep(60)
"""


def hold(output: Path, variable: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that holds the lock, and one it started, which inherited it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output), variable], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.stdout.close()
    (child,) = psutil.Process(holder.pid).children()
    return holder, child.pid


def end(holder: subprocess.Popen[bytes], child: int) -> None:
    holder.kill()
    holder.wait()
    if psutil.pid_exists(child):
        os.kill(child, signal.SIGKILL)


def test_the_orphan_of_a_killed_start_does_not_refuse_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    holder, child = hold(output, tag("the-launch", "0.0"))
    try:
        holder.kill()
        holder.wait()
        check_free(RunPaths(output))
        with RunLock(RunPaths(output), "next") as lock:
            assert lock.ended == [child]
        with RunLock(RunPaths(output), "after that") as lock:
            assert lock.ended == []
    finally:
        end(holder, child)


def test_a_start_that_lives_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragfleet.run_lock._WAIT_S", 0.3)
    output = tmp_path / "out.jsonl"
    holder, child = hold(output, tag("the-launch", "0.0"))
    try:
        with pytest.raises(OutputError, match=f"being written by pid {holder.pid} on"):
            RunLock(RunPaths(output), "next").__enter__()
        assert psutil.Process(child).is_running()
    finally:
        end(holder, child)


def test_an_orphan_that_is_not_ours_is_named_and_spared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the lock, but nothing proves that it belongs to the start that died."""
    monkeypatch.setattr("ragfleet.run_lock._WAIT_S", 0.3)
    output = tmp_path / "out.jsonl"
    holder, child = hold(output, "another/0.0/")
    try:
        holder.kill()
        holder.wait()
        with pytest.raises(OutputError, match=r"left behind when it died.*fuser"):
            RunLock(RunPaths(output), "next").__enter__()
        assert psutil.Process(child).is_running()
    finally:
        end(holder, child)


def test_a_lock_that_was_taken_back_is_no_lock(tmp_path: Path) -> None:
    """A first start that is refused removes its new folder, and somebody may wait for its lock."""
    paths = RunPaths(tmp_path / "new" / "out.jsonl")
    refused = RunLock(paths, "refused").__enter__()
    waiting = ThreadPoolExecutor(1).submit(RunLock(paths, "waiting").__enter__)
    time.sleep(0.3)  # it tries every 0.1 s; nothing says that it does
    refused.discard_new()
    refused.__exit__()
    lock = waiting.result(timeout=10)
    assert os.path.samestat(os.fstat(lock.fd), paths.lock.stat())
    lock.discard_new()
    lock.__exit__()
    assert not (tmp_path / "new").exists(), "who is refused after that takes it back too"


def test_of_two_first_starts_one_makes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")

    def mkdir(folder: Path, **how: Any) -> None:
        os.mkdir(folder)  # the other one, just now
        os.mkdir(folder)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with RunLock(paths, "second") as lock:
        lock.discard_new()
    assert paths.lock.exists(), "what the other one made is not this one's to remove"


@pytest.mark.parametrize("times", [1, 99])
def test_a_folder_that_another_takes_back_is_made_again(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    left, open_ = iter(range(times)), os.open

    def opened(path: Any, *how: Any, **more: Any) -> int:
        if path == paths.lock and next(left, None) is not None:
            paths.directory.rmdir()  # the other one, refused just now
        return open_(path, *how, **more)

    monkeypatch.setattr("ragfleet.run_lock.os.open", opened)
    if times == 1:
        with RunLock(paths, "second"):
            assert holder_of(paths)
    else:
        with pytest.raises(OutputError, match=r"Can't create .*lock: No such file"):
            RunLock(paths, "second").__enter__()


def test_only_what_is_certainly_dead_is_dead() -> None:
    me = Starter.this("x")
    assert not me.is_dead()
    assert Starter(me.pid, "1", me.place).is_dead(), "the number was used again"
    assert not Starter(me.pid, "1", "another machine").is_dead()
    assert not Starter(me.pid, "", me.place).is_dead(), "where there is no /proc"
    assert not Starter(1, "1", "").is_dead()


def test_the_file_of_an_earlier_version_is_understood(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    paths.directory.mkdir()
    paths.lock.write_text("pid 1 on there, somebody, since then\n")
    with RunLock(paths, "next") as lock:
        assert lock.ended == []
    assert "pid" in paths.lock.read_text()


def test_who_has_an_output_is_said(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    check_free(paths)
    with RunLock(paths, "this"):
        me = f"pid {os.getpid()} on "
        assert (holder_of(paths) or "").startswith(me)
        with pytest.raises(OutputError, match=f"being written by {me}"):
            check_free(paths)
        os.truncate(paths.lock, 0)
        assert holder_of(paths) == "a process that is just starting"
        with pytest.raises(OutputError, match="being written by another process"):
            check_free(paths)
    assert holder_of(paths) is None
    check_free(paths)


def test_what_is_in_the_way_of_a_lock_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Can't create .*out\.run: "):
        RunLock(RunPaths(tmp_path / "file" / "out.jsonl"), "this").__enter__()
    paths = RunPaths(tmp_path / "out.jsonl")
    paths.lock.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"Can't create .*lock: Is a directory"):
        RunLock(paths, "this").__enter__()


def test_nobody_is_said_to_be_away_where_locks_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path / "out.jsonl")
    assert holder_of(paths) is None, "no run was ever there"
    paths.directory.mkdir()
    paths.lock.touch()
    assert holder_of(paths) is None

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ragfleet.run_lock.fcntl.flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        holder_of(paths)
    check_free(paths)
    with RunLock(paths, "this"):  # shards keep runs apart there
        assert "pid" in paths.lock.read_text()


WITHOUT_HANDLES = """
import os, subprocess
del os.pidfd_open
from ragfleet.leftovers import Orphanage
child = subprocess.Popen(["sleep", "60"])
Orphanage().end()
child.wait(10)
"""


def test_orphans_are_ended_where_there_are_no_process_handles() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_HANDLES], check=True, timeout=30)
