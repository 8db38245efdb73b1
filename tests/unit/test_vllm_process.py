"""The watch over vLLM's engine process, and what its last words were; without vLLM."""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import pytest

from ragfleet.engines.vllm_process import LogMark, ProcessWatch


@pytest.fixture
def child() -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    yield process
    process.kill()
    process.join()


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_killed_process_ends_the_wait_after_what_is_there(child: BaseProcess) -> None:
    client = SimpleNamespace(outputs_queue=queue.Queue[Any]())
    watch = ProcessWatch(client, [child])
    client.outputs_queue.put("an answer")
    assert watch.death is None
    child.kill()
    assert client.outputs_queue.get(timeout=5) == "an answer"
    error = client.outputs_queue.get(timeout=5)
    assert isinstance(error, Exception)
    assert str(error) == watch.death
    assert "was killed by SIGKILL; the kernel does that where memory runs out" in str(error)
    assert watch.was_killed


def test_a_killed_process_ends_the_wait_for_a_call(child: BaseProcess) -> None:
    calls: dict[int, Future[None]] = {1: Future()}
    client = SimpleNamespace(outputs_queue=queue.Queue[Any](), utility_results=calls)
    watch = ProcessWatch(client, [child])
    call = calls[1]
    child.kill()
    assert "SIGKILL" in str(call.exception(timeout=5))
    calls[2] = late = Future[None]()
    assert "SIGKILL" in str(late.exception(timeout=5))
    watch.close()


def test_an_end_on_purpose_is_none(child: BaseProcess) -> None:
    client = SimpleNamespace(outputs_queue=queue.Queue[Any]())
    watch = ProcessWatch(client, [child])
    watch.close()
    child.kill()
    with pytest.raises(queue.Empty):
        client.outputs_queue.get(timeout=1)
    assert watch.death is None


def test_without_a_queue_this_process_ends(child: BaseProcess) -> None:
    codes: list[int] = []
    ProcessWatch(SimpleNamespace(), [child], codes.append)
    child.kill()
    until(lambda: codes == [1])


def test_an_engine_in_this_process_is_vllms_to_watch(child: BaseProcess) -> None:
    codes: list[int] = []
    watch = ProcessWatch(SimpleNamespace(engine_core="here"), [child], codes.append)
    child.kill()
    time.sleep(1)
    assert (watch.death, codes) == (None, [])


def test_an_exit_code_is_told() -> None:
    child = multiprocessing.get_context("spawn").Process(target=sys.exit, args=(3,))
    child.start()
    client = SimpleNamespace(outputs_queue=queue.Queue[Any]())
    watch = ProcessWatch(client, [child])
    assert "ended with exit code 3" in str(client.outputs_queue.get(timeout=10))
    assert not watch.was_killed


SAID = """\
INFO 11-26 [a.py:1] Error: none yet
(EngineCore pid=9) ERROR 11-26 08:54:36 [core.py:15] ValueError: No cache blocks.
Traceback (most recent call last):
  File "core.py", line 1, in run
torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB
Exception: WorkerProc initialization failed. See stack trace for root cause.
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_the_last_words_are_found_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"ValueError: long ago\n")
    mark = LogMark()
    assert mark.last_error() is None
    os.write(2, SAID.encode())
    assert mark.last_error() == "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"
    os.write(2, b"(EngineCore pid=9) ERROR 11-26 [core.py:15] ValueError: No cache blocks.\n")
    assert mark.last_error() == "ValueError: No cache blocks."


def test_without_a_file_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_mode=0o010600))
        mark = LogMark()
    assert mark.last_error() is None
