"""When a worker counts as standing still: beats and instants in, a verdict out."""

from __future__ import annotations

from typing import Any

from ragfleet.beats import Beat
from ragfleet.launchers.liveness import AwakeTime, Life
from ragfleet.pulse import Counters


def awake(*looks: float) -> AwakeTime:
    time = AwakeTime(every_s=0.5, last_s=0.0)
    for now_s in looks:
        time.look(now_s)
    return time


def life(now_s: float = 0.0, **beat: Any) -> Life:
    """Of a worker that is ready and has said this."""
    known = Life(beat_seen_s=0.0, moved_s=0.0)
    known.become_ready(0.0, beat.pop("blocked_after_s", None))
    known.observe(Beat(owner="0.0", sequence=1, **beat), now_s)
    return known


def test_time_in_which_everything_stood_still_does_not_count() -> None:
    time = awake(1.0, 2.0, 102.0, 103.0)
    assert time.since(0.0, 103.0) == 3.0
    assert time.since(50.0, 103.0) == 1.0, "it began in the middle of it"
    assert time.since(102.5, 103.0) == 0.5
    assert awake(1.0, 4.0, 7.0).since(0.0, 7.0) == 7.0, "a busy machine is late, too"


def test_progress_counts_and_beats_alone_do_not() -> None:
    known = life(state="generating", in_flight=3, progress=7)
    for second in range(1, 12):
        beat = Beat(owner="0.0", sequence=1 + second, state="generating", in_flight=3, progress=7)
        known.observe(beat, float(second))
    assert known.standstill(11.0, awake(), 100.0, 10.0) == (
        "makes no progress for 11 s (--stall_timeout_s)"
    )
    known.observe(Beat(owner="0.0", sequence=99, state="generating", progress=8), 11.0)
    assert known.standstill(12.0, awake(), 100.0, 10.0) is None


def test_one_that_waits_only_has_to_give_beats() -> None:
    known = life(state="waiting")
    assert known.standstill(9.0, awake(), 100.0, 10.0) is None
    assert known.standstill(11.0, awake(), 100.0, 10.0) == (
        "gives no sign of life for 11 s (--stall_timeout_s)"
    )


def test_loading_has_a_limit_of_its_own() -> None:
    known = Life(beat_seen_s=0.0, moved_s=0.0)
    assert known.standstill(99.0, awake(), 100.0, 10.0) is None
    assert known.standstill(101.0, awake(), 100.0, 10.0) == (
        "is loading for 101 s (--start_timeout_s)"
    )


def test_a_users_code_has_the_longer_limit() -> None:
    known = life(state="generating", in_flight=1, blocked_after_s=50.0)
    assert known.standstill(59.0, awake(), 100.0, 10.0) is None
    assert known.standstill(61.0, awake(), 100.0, 10.0) is not None


def test_a_request_that_blocks_is_named_by_its_row() -> None:
    known = life(now_s=20.0, in_flight=1, oldest_row=4711, oldest_s=2.0, blocked_after_s=3.0)
    assert known.blocking_row(25.0, awake()) is None
    assert known.blocking_row(26.5, awake()) == 4711, "also when it holds up the beats"
    assert known.blocking_row(80.0, awake(19.0, 76.0)) is None, "a suspended job has time"
    assert life(in_flight=1, oldest_row=1, oldest_s=99.0).blocking_row(99.0, awake()) is None


def test_why_a_worker_is_slower_is_said_once() -> None:
    counters = Counters()
    for reason in ("no room", "no room", "too long", "no room"):
        counters.degrade(reason)
    assert counters.degraded == "no room; too long"
