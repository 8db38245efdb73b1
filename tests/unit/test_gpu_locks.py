"""GPUs that one run of ragfleet has are nobody else's, until its process ends, however it ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragfleet import gpu_locks
from ragfleet.gpu_locks import GpuLocks

HOLD = (
    "import sys, time, pathlib; from ragfleet.gpu_locks import GpuLocks;"
    " locks = GpuLocks(pathlib.Path(sys.argv[1])); print(locks.take(sys.argv[2:]), flush=True);"
    " time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "gpus"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_locks, "_WAIT_S", 0.05)


@pytest.fixture
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has GPU-b."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "GPU-b"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "{}\n"
        yield process
        process.kill()


def test_what_is_given_up_is_free_although_a_child_inherited_it(folder: Path) -> None:
    with GpuLocks(folder) as locks:
        assert locks.take(["GPU-a"]) == {}
        inherited = [os.dup(fd) for fd in locks._fds.values()]  # as a fork has them
    try:
        assert GpuLocks(folder).holders(["GPU-a"]) == {}
    finally:
        for fd in inherited:
            os.close(fd)


def test_a_gpu_is_taken_once(folder: Path) -> None:
    with GpuLocks(folder) as first, GpuLocks(folder) as second:
        assert first.take(["GPU-a", "GPU-b"]) == {}
        assert first.take(["GPU-a", "GPU-b"]) == {}, "ours already"
        assert first.holders(["GPU-a"]) == {}
        assert set(second.holders(["GPU-a", "GPU-c"])) == {"GPU-a"}
        assert set(second.take(["GPU-b", "GPU-c"])) == {"GPU-b"}
        assert first.holders(["GPU-c"]) == {}, "all or none"
        assert set(second.take(["GPU-b", "GPU-c"], all_or_none=False)) == {"GPU-b"}
        assert set(first.holders(["GPU-c"])) == {"GPU-c"}
    with GpuLocks(folder) as third:
        assert third.take(["GPU-a", "GPU-b", "GPU-c"]) == {}
        assert third.note is None


def test_a_killed_run_holds_nothing(folder: Path, holder: subprocess.Popen[str]) -> None:
    with GpuLocks(folder) as locks:
        words = {"GPU-b": f"another ragfleet run, pid {holder.pid}"}
        assert locks.holders(["GPU-a", "GPU-b"]) == words
        assert locks.take(["GPU-a", "GPU-b"]) == words
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert locks.take(["GPU-a", "GPU-b"]) == {}


def test_looking_makes_nothing_and_stands_in_nobodys_way(folder: Path) -> None:
    assert GpuLocks(folder).holders(["GPU-a"]) == {}
    assert not folder.exists()
    with GpuLocks(folder) as locks:
        assert locks.take(["GPU-a"]) == {}
        assert GpuLocks(folder).holders(["GPU-b"]) == {}
        assert [path.name for path in folder.iterdir()] == ["GPU-a"]


def test_workers_do_not_inherit_it(folder: Path) -> None:
    with GpuLocks(folder) as locks:
        locks.take(["GPU-a"])
        child = subprocess.Popen(["sleep", "60"])
    try:
        with GpuLocks(folder) as other:
            assert other.take(["GPU-a"]) == {}
    finally:
        child.kill()
        child.wait()


def test_other_users_may_lock_the_same_files(folder: Path) -> None:
    mask = os.umask(0o077)
    try:
        with GpuLocks(folder) as locks:
            locks.take(["GPU-a/../b"])
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777
    (file,) = folder.iterdir()
    assert (file.name, file.read_bytes()) == ("GPU-a_.._b", b"")
    assert stat.S_IMODE(file.stat().st_mode) == 0o444


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    precious.chmod(0o600)
    folder.mkdir()
    (folder / "GPU-a").symlink_to(precious)
    os.mkfifo(folder / "GPU-b")
    os.link(precious, folder / "GPU-d")
    for name in ("GPU-a", "GPU-b", "GPU-d"):
        with GpuLocks(folder) as locks:
            assert locks.take([name]) == {}
            assert locks.note is not None
            assert "GPUs are not locked" in locks.note
            assert locks.holders([name]) == {}
    assert precious.read_text() == "mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    with GpuLocks(linked) as locks:
        locks.take(["GPU-c"])
        assert locks.note is not None
    assert not (folder / "GPU-c").exists()


def test_where_nothing_can_be_locked_it_goes_on(tmp_path: Path) -> None:
    with GpuLocks(tmp_path / "no" / "folder") as locks:
        assert locks.take(["GPU-a"]) == {}
        assert locks.note is not None
        assert locks.note.endswith("No such file or directory.")


def test_a_file_that_was_tidied_away_is_made_again(folder: Path) -> None:
    with GpuLocks(folder) as first, GpuLocks(folder) as second:
        first.take(["GPU-a"])
        (folder / "GPU-a").unlink()
        assert second.take(["GPU-a"]) == {}, "it is another file now"
        assert set(GpuLocks(folder).holders(["GPU-a"])) == {"GPU-a"}


def test_of_several_at_once_one_gets_all(folder: Path) -> None:
    wanted = [f"GPU-{number}" for number in range(8)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), *names], stdout=subprocess.PIPE, text=True
        )
        for names in (wanted, wanted[::-1], wanted[4:] + wanted[:4])
    ]
    try:
        said = [process.stdout.readline() for process in processes if process.stdout is not None]
        assert said.count("{}\n") == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_it_waits_for_who_only_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_locks, "_WAIT_S", 5.0)
    with GpuLocks(folder) as first, GpuLocks(folder) as second:
        first.take(["GPU-a"])
        (fd,) = first._fds.values()
        monkeypatch.setattr(time, "sleep", lambda seconds: first._release(list(first._fds)))
        assert fd > 2
        assert second.take(["GPU-a"]) == {}
