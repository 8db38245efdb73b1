"""What `benchmarks/gpu.py` measures on, and how it keeps to its time; slow ones run it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from gpu_trials import Answers, Trial, measure, ratio
from gpu_work import (
    SIZES,
    Cell,
    Machine,
    answer_tokens,
    in_other_ids,
    make_requests,
    roofline,
    sample,
    work,
)
from ragfleet.engines.protocol import Prepared
from workloads import count_tokens

ROOT = Path(__file__).resolve().parents[2]
CELL = Cell(share=4, context_tokens=100, num_requests=30, head_tokens=20)
VOCAB = 50_000


# ---- the work


def test_requests_share_what_the_cell_says() -> None:
    requests = make_requests(CELL, VOCAB)
    assert len(requests) == 28  # whole groups
    assert requests == make_requests(CELL, VOCAB)
    head = list(requests[0].token_ids[:20])
    for at in range(0, len(requests), 4):
        group = requests[at : at + 4]
        assert len({request.request.context for request in group}) == 1
        side_by_side = zip(*(request.token_ids for request in group), strict=False)
        common = len(list(takewhile(lambda ids: len({*ids}) == 1, side_by_side)))
        assert 20 + 90 <= common <= 20 + 110 + 1
        for request in group:
            assert list(request.token_ids[:20]) == head
            assert 8 <= len(request.token_ids) - common + 1 <= 41
            assert 64 <= answer_tokens(request) <= 128
            assert len(request.token_ids) + answer_tokens(request) <= CELL.most_tokens
    assert len({answer_tokens(request) for request in requests}) > 10


def test_samples_are_whole_groups_and_others_each_turn() -> None:
    requests = make_requests(CELL, VOCAB)
    part = sample(requests, 9, 4)
    assert len(part) == 12
    contexts = [request.request.context for request in part]
    assert all(contexts.count(context) == 4 for context in contexts)
    assert sample(requests, 1, 1, turn=0) != sample(requests, 1, 1, turn=1)
    assert sample(requests, 100, 4, turn=2) == requests
    assert work(part) < work(requests)


def test_another_turn_has_other_ids_and_the_same_in_common() -> None:
    requests = make_requests(CELL, VOCAB)
    others = in_other_ids(requests, 3, VOCAB)
    assert len({request.key for request in (*requests, *others)}) == 2 * len(requests)
    assert count_tokens(others) == count_tokens(requests)
    for one, other in zip(requests, others, strict=True):
        assert len(one.token_ids) == len(other.token_ids)
        assert all(a != b for a, b in zip(one.token_ids, other.token_ids, strict=True))
        assert 3 <= min(other.token_ids) <= max(other.token_ids) < VOCAB
        assert answer_tokens(one) == answer_tokens(other)


def test_roofline_counts_what_is_shared_once() -> None:
    machine = Machine(flops=1e12, bytes_per_s=1e11)
    size = SIZES["1b"]
    shared, alone = (
        make_requests(Cell(share=share, context_tokens=500, num_requests=32), VOCAB)
        for share in (16, 1)
    )
    assert count_tokens(shared).shared < count_tokens(alone).shared / 5
    less, more = (
        roofline(size, requests, machine, slots=32, itemsize=2) for requests in (shared, alone)
    )
    assert less.arithmetic_s < more.arithmetic_s / 2
    assert less.traffic_s < more.traffic_s
    # Reading alone: two operations for each weight and token.
    least = 2 * size.layer_weights * (size.layers - 1) * count_tokens(alone).shared / 1e12
    assert least < more.arithmetic_s < 1.5 * least
    assert more.seconds == max(more.arithmetic_s, more.traffic_s)
    # Fewer slots read the weights more often.
    assert roofline(size, alone, machine, slots=4, itemsize=2).traffic_s > 2 * more.traffic_s
    # 1 B and 8 B weights, the embeddings not counted.
    assert 1.2e9 < size.step_weights < 1.3e9
    assert 7.4e9 < SIZES["8b"].step_weights < 7.6e9


# ---- the time


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeArm:
    """Takes a second for each request, and `first_s` more at its first run."""

    name = "fake"

    def __init__(self, clock: Clock, *, part: int | None = None, first_s: float = 0) -> None:
        self.clock, self.part, self.first_s = clock, part, first_s
        self.per_request_s = 1.0
        self.keys: list[list[bytes]] = []
        self.is_open = False

    def group(self, share: int) -> int:
        return share

    def open(self, requests: Sequence[Prepared]) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        assert self.is_open
        seconds = self.per_request_s * len(requests)
        self.clock.now_s += seconds + (0 if self.keys else self.first_s)
        self.keys.append([request.key for request in requests])
        return seconds, {r.key: [0] * answer_tokens(r) for r in requests}


PROMPTS = [in_other_ids(make_requests(CELL, VOCAB), turn, VOCAB) for turn in range(4)]


def measured(arm: FakeArm, until_s: float, say: Callable[[str], None] = lambda _: None) -> Trial:
    trial = Trial(arm, PROMPTS, 4)
    measure([trial], until_s=until_s, clock=arm.clock, say=say)
    assert not arm.is_open
    return trial


def test_all_requests_after_a_part_that_warms_up() -> None:
    arm = FakeArm(Clock(), first_s=100)
    trial = measured(arm, 100 + 8 + 3 * 28)  # what the first run builds is built once
    assert [len(keys) for keys in arm.keys] == [8, 28, 28, 28]
    assert (trial.count, trial.seconds, trial.notes) == (28, [28.0] * 3, [])
    assert not trial.is_sampled


def test_no_round_asks_what_another_one_did() -> None:
    arm = FakeArm(Clock())
    measured(arm, 1000)
    asked = [key for keys in arm.keys for key in keys]
    assert len({*asked}) == len(asked)


def test_a_part_is_scaled_to_all_and_another_in_each_round() -> None:
    arm = FakeArm(Clock(), part=8)
    trial = measured(arm, 1000)
    assert [len(keys) for keys in arm.keys] == [8] * 4
    numbers = [{key[-4:] for key in keys} for keys in arm.keys]
    assert all(one != other for one, other in pairwise(numbers))
    assert (trial.count, trial.is_sampled) == (8, True)
    for seconds in trial.seconds:  # exact but for the lengths of what was picked
        assert seconds == pytest.approx(28, rel=0.2)


def test_rounds_that_do_not_fit_are_left_out_and_said_to_be() -> None:
    arm = FakeArm(Clock())

    def slower(turn: str) -> None:
        arm.per_request_s = 5

    trial = measured(arm, 8 + 28 + 5 * 28, slower)
    assert trial.seconds == [28, 5 * 28]
    assert trial.notes == ["2 of 3 rounds: the time was over"]


def test_a_first_round_is_begun_as_long_as_there_is_time_at_all() -> None:
    arm = FakeArm(Clock())
    trial = measured(arm, 8 + 1)
    assert trial.seconds == [28]
    assert trial.notes == ["1 of 3 rounds: the time was over"]
    late = measured(FakeArm(Clock()), 8)
    assert (late.seconds, late.count) == ([], 0)
    assert late.notes == ["0 of 3 rounds: the time was over"]


def test_an_arm_that_fails_leaves_the_others_alone() -> None:
    clock = Clock()

    class Short(FakeArm):
        def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
            seconds, answers = super().run(requests)
            return seconds, {key: answer[:-1] for key, answer in answers.items()}

    trials = [Trial(arm, PROMPTS[:3], 4) for arm in (Short(clock), FakeArm(clock))]
    measure(trials, until_s=1000, clock=clock, say=lambda _: None)
    assert trials[0].failed
    assert "asked for" in trials[0].notes[0]
    assert len(trials[1].seconds) == 2
    assert ratio(trials[0].seconds, trials[1].seconds) is None
    assert ratio(trials[1].seconds, [14, 56, 1]) == (14 + 56) / 2 / 28


# ---- all of it


def run(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tiny_table(tmp_path: Path) -> None:
    file, profile = tmp_path / "table.json", tmp_path / "profile.txt"
    told = run("table", "--tiny", "--seconds", "40", "--json", str(file), "--profile", str(profile))
    assert "failed" not in told
    table = json.loads(file.read_text())
    assert [cell["cell"]["share"] for cell in table["cells"]] == [4, 1]
    for cell in table["cells"]:
        assert list(cell["arms"]) == [
            "naive",
            "static",
            "continuous",
            "stock",
            "unshared",
            "ours",
        ]
        for name, arm in cell["arms"].items():
            assert arm["seconds"], (name, arm)
            assert arm["largest_gap"] < 0.25, (name, arm)
        assert "torch's plain_varlen" in cell["arms"]["continuous"]["attention"]
        assert cell["arms"]["ours"]["read_tokens"] < cell["arms"]["unshared"]["read_tokens"]
    assert "a pass that reads prompts" in profile.read_text()


@pytest.mark.slow
def test_tiny_check() -> None:
    told = run("check", "--tiny").splitlines()
    assert told[-1] == "right"
    assert sum(line.startswith("  ours ") for line in told) == 8
