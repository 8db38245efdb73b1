"""Whose trouble a failed start is, among several supervisors of one launch."""

from __future__ import annotations

from pathlib import Path

from ragfleet.launchers.starts import Starts


def test_it_is_everybodys_when_nobody_could_start(tmp_path: Path) -> None:
    starts: Starts[str] = Starts(tmp_path, 3)
    assert starts.verdict() == "nobody's"
    starts.fail(1, "one")
    starts.fail(0, "zero")
    assert starts.verdict() == "not known", "the third may still be ready"
    starts.fail(2, "two")
    assert starts.verdict() == "everybody's"
    assert starts.release() == ["zero", "one", "two"]
    assert not starts.all_given_up()


def test_it_is_its_own_when_somebody_was_ready(tmp_path: Path) -> None:
    starts: Starts[str] = Starts(tmp_path, 2)
    starts.fail(0, "zero")
    starts.succeed()
    assert starts.verdict() == "its own"
    assert starts.release() == ["zero"]
    assert starts.verdict() == "nobody's"
    starts.fail(0, "again")
    assert starts.verdict() == "its own", "at once, from now on"


def test_supervisors_know_of_each_other(tmp_path: Path) -> None:
    one: Starts[str] = Starts(tmp_path, 2)
    other: Starts[str] = Starts(tmp_path, 2)
    one.fail(0, "zero")
    assert other.verdict() == "nobody's", "none of its own"
    assert one.verdict() == "not known"
    other.fail(1, "one")
    assert one.verdict() == other.verdict() == "everybody's"
    one.release()
    other.succeed()
    assert other.verdict() == "its own"


def test_who_is_given_up_will_not_be_ready(tmp_path: Path) -> None:
    starts: Starts[str] = Starts(tmp_path, 2)
    starts.give_up(1)
    starts.fail(0, "zero")
    assert starts.verdict() == "everybody's"
    assert not starts.all_given_up()
    starts.give_up(0)
    assert starts.all_given_up()
