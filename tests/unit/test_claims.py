"""Claims: whoever dies whenever, no chunk has two live owners and none is forgotten."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from ragfleet.claims import Board, Claim, ClaimStore, Holder, Leave, Wait, decide
from ragfleet.errors import StorageError


def board_of(slices: list[list[int]], costs: list[float] | None = None, **known: Any) -> Board:
    count = sum(map(len, slices))
    return Board(slices=slices, costs=costs if costs is not None else [1.0] * count, **known)


def held(owner: str, generation: int = 0) -> tuple[int, Holder]:
    return generation, Holder(owner, "o_rank0.jsonl", 0)


def choose(
    board: Board,
    rank: int = 0,
    *,
    me: str | None = None,
    may_steal: bool = True,
    is_alive: Callable[[str], bool] = lambda owner: True,
) -> Claim | Wait | Leave:
    return decide(board, me or f"{rank}.0", rank, is_alive, may_steal=may_steal)


# ---- one decision


def test_the_own_slice_comes_first_and_in_order() -> None:
    board = board_of([[2, 0], [1, 3]], costs=[1.0, 99.0, 1.0, 99.0])
    assert choose(board, 0) == Claim(2, 0)
    assert choose(board, 1) == Claim(1, 0)
    board.claims[2] = held("0.0")
    assert choose(board, 0) == Claim(0, 0)
    board.done.add(0)
    assert choose(board, 0) == Claim(1, 0), "then it steals"


def test_stealing_takes_from_the_slice_that_is_furthest_behind() -> None:
    board = board_of([[], [0, 1, 2], [3, 4]], costs=[1.0, 1.0, 1.0, 5.0, 1.0])
    assert choose(board) == Claim(3, 0)
    board.claims[3] = held("2.0")
    assert choose(board) == Claim(0, 0)
    board.done |= {0, 1, 2}
    assert choose(board) == Claim(4, 0)


def test_chunks_without_cost_are_stolen_too() -> None:
    assert choose(board_of([[], [], [0]], costs=[0.0])) == Claim(0, 0)


def test_without_stealing_others_slices_are_left_alone() -> None:
    board = board_of([[0], [1]])
    board.done.add(0)
    assert choose(board, may_steal=False) == Wait()
    assert choose(board, may_steal=True) == Claim(1, 0)


def test_the_slice_of_a_rank_that_is_given_up_is_everybodys() -> None:
    board = board_of([[0], [1, 2], [3]])
    board.done.add(0)
    board.gone.add(1)
    assert choose(board, may_steal=False) == Claim(1, 0)
    board.claims[1] = held("0.0")
    assert choose(board, may_steal=False) == Claim(2, 0)
    board.claims[2] = held("2.0")
    assert choose(board, may_steal=False) == Wait(), "slice 2 has a worker of its own"


def test_what_the_dead_held_is_taken_over_with_the_next_generation() -> None:
    board = board_of([[], [0, 1]])
    board.claims = {0: held("1.0", 3), 1: held("2.0")}
    assert choose(board) == Wait()
    assert choose(board, is_alive=lambda owner: owner != "1.0") == Claim(0, 4, held("1.0")[1])
    board.dead.add("2.0")
    assert choose(board, may_steal=False) == Claim(1, 1, held("2.0")[1])
    board.done.add(1)
    assert choose(board) == Wait()


def test_fresh_chunks_come_before_those_of_the_dead() -> None:
    board = board_of([[0], [1]], dead={"1.0"}, claims={1: held("1.0")})
    assert choose(board, 0) == Claim(0, 0)


def test_nobody_takes_over_from_itself_but_a_restarted_worker_from_its_first_life() -> None:
    board = board_of([[0]], claims={0: held("0.0")}, dead={"0.0"})
    assert choose(board, me="0.0") == Wait()
    assert choose(board, me="0.1") == Claim(0, 1, held("0.0")[1])


def test_all_done_is_the_only_reason_to_leave() -> None:
    board = board_of([[0], [1]], claims={0: held("0.0"), 1: held("1.0")}, done={0})
    assert choose(board) == Wait()
    board.done.add(1)
    assert choose(board) == Leave()
    assert choose(board_of([[], []])) == Leave()


def test_a_rank_without_a_slice_helps() -> None:
    assert choose(board_of([[0]]), rank=5) == Claim(0, 0)
    assert choose(board_of([[0]]), rank=5, may_steal=False) == Wait()


# ---- the store


def test_a_claim_is_made_once_and_says_all(tmp_path: Path) -> None:
    store = ClaimStore(tmp_path)
    holder = Holder("3.0", "my:odd results_rank3.1.jsonl", 81920)
    assert store.try_claim(Claim(12, 0), holder)
    assert not store.try_claim(Claim(12, 0), Holder("4.0", "x", 0))
    assert store.holder(12, 0) == holder
    assert os.listdir(tmp_path) == ["0000012.g0"]
    board = board_of([[0]])
    ClaimStore(tmp_path).refresh(board)
    assert board.claims == {12: (0, holder)}


def test_the_highest_generation_owns_whatever_order_files_are_listed_in(tmp_path: Path) -> None:
    store = ClaimStore(tmp_path)
    for generation in (10, 2, 9, 0):
        store.try_claim(Claim(7, generation), Holder(f"{generation}.0", "s", generation))
        board = board_of([[0]])
        store.refresh(board)
        assert board.claims[7][0] == 10
    assert board.claims[7][1].owner == "10.0"
    assert store.is_superseded(7, 9)
    assert not store.is_superseded(7, 10)
    assert not store.is_superseded(8, 0)


def test_marks_are_read_back_and_may_be_made_twice(tmp_path: Path) -> None:
    store = ClaimStore(tmp_path)
    for _ in range(2):
        store.finish(3)
        store.bury("2.1")
        store.give_up(2)
        store.time_out(4711)
    board = board_of([[0]])
    assert store.refresh(board) == {3}
    assert board.done == {3}
    assert board.dead == {"2.1"}
    assert board.gone == {2}
    assert board.timed_out == {4711}
    assert board.claims == {}


def test_chunk_numbers_may_outgrow_their_zeros(tmp_path: Path) -> None:
    store = ClaimStore(tmp_path)
    store.try_claim(Claim(123456789, 0), Holder("0.0", "s", 1))
    store.finish(123456789)
    board = board_of([[0]])
    store.refresh(board)
    assert 123456789 in board.claims
    assert board.done == {123456789}


def test_a_claim_that_was_deleted_is_as_if_it_had_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is done again; a worker that stumbled over it would be started until it is given up."""
    store = ClaimStore(tmp_path)
    for generation in range(3):
        store.try_claim(Claim(7, generation), Holder(f"{generation}.0", "s", generation))
    (tmp_path / "0000007.g1").unlink()
    earlier = store.earlier_holders(Claim(7, 3))
    assert [holder.owner for holder in earlier] == ["0.0", "2.0"]
    listed = os.listdir(tmp_path)
    for name in listed:
        (tmp_path / name).unlink()
    monkeypatch.setattr("ragfleet.claims.os.listdir", lambda path: listed)
    board = board_of([[7]])
    store.refresh(board)
    assert board.claims == {}


def test_a_death_is_known_with_what_was_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing may have passed the one name before it was there, and find the other."""
    store = ClaimStore(tmp_path)
    store.record_death("1.0", [4, 5])
    store.bury("1.0")
    monkeypatch.setattr("ragfleet.claims.os.listdir", lambda path: ["dead.1.0"])
    board = board_of([[0]])
    store.refresh(board)
    assert board.deaths == {"1.0": (4, 5)}


def test_a_death_is_known_though_nobody_lived_to_free_its_claims(tmp_path: Path) -> None:
    """The launcher may be killed after the one and before the other: the next start reads both."""
    ClaimStore(tmp_path).record_death("1.0", [4, 5])
    board = board_of([[0]])
    ClaimStore(tmp_path).refresh(board)
    assert board.deaths == {"1.0": (4, 5)}
    assert board.dead == set()


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    store = ClaimStore(tmp_path / "gone")
    with pytest.raises(StorageError, match="symbolic links"):
        store.try_claim(Claim(0, 0), Holder("0.0", "s", 0))
    with pytest.raises(StorageError, match="Can't create"):
        store.finish(0)


# ---- any interleaving


@dataclass
class Process:
    """A worker process of the model."""

    rank: int
    owner: str
    board: Board
    chunks: dict[int, int] = field(default_factory=dict)
    """What it works on: chunk → generation."""
    has_left: bool = False


class Fleet(RuleBasedStateMachine):
    """Workers that claim, finish, stop, come back and die, over one real folder of claims."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="claims-"))
        self.store = ClaimStore(self.directory)
        self.processes: list[Process] = []
        self.expired: set[str] = set()
        """Owners whose beats stand still for everybody."""
        self.declared: set[str] = set()
        """Owners that were believed dead at some time, rightly or not."""
        self.finished: set[int] = set()

    @initialize(
        sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        may_steal=st.booleans(),
        costs=st.randoms(use_true_random=False),
    )
    def start(self, sizes: list[int], may_steal: bool, costs: Any) -> None:
        total, self.slices = 0, []
        for size in sizes:
            self.slices.append(list(range(total, total + size)))
            total += size
        self.costs = [float(costs.randint(0, 3)) for _ in range(total)]
        self.may_steal = may_steal
        self.incarnations = [0] * len(sizes)
        for rank in range(len(sizes)):
            self.spawn(rank)

    def spawn(self, rank: int) -> Process:
        owner = f"{rank}.{self.incarnations[rank]}"
        self.incarnations[rank] += 1
        process = Process(rank, owner, Board(slices=self.slices, costs=self.costs))
        self.processes.append(process)
        return process

    def one(self, data: st.DataObject) -> Process:
        return data.draw(st.sampled_from(self.processes))

    def is_believed_alive(self, owner: str) -> bool:
        return owner not in self.expired

    def ask(self, process: Process) -> Claim | Wait | Leave:
        return decide(
            process.board,
            process.owner,
            process.rank,
            self.is_believed_alive,
            may_steal=self.may_steal,
        )

    def try_claim(self, process: Process, claim: Claim) -> bool:
        if not self.store.try_claim(claim, Holder(process.owner, "s", 0)):
            return False
        if claim.generation:
            previous = self.store.holder(claim.chunk, claim.generation - 1)
            assert claim.previous == previous
            assert previous.owner in self.declared, "taken from somebody who is believed alive"
        process.chunks[claim.chunk] = claim.generation
        process.board.claims[claim.chunk] = (claim.generation, self.store.holder(*claim_of(claim)))
        return True

    def act(self, process: Process) -> Claim | Wait | Leave:
        instruction = self.ask(process)
        if isinstance(instruction, Claim):
            assert instruction.chunk not in process.board.done
            self.try_claim(process, instruction)
        elif isinstance(instruction, Leave):
            assert self.finished == set(range(len(self.costs))), "left before all was done"
            process.has_left = True
        return instruction

    @rule(data=st.data(), looks=st.booleans())
    def work(self, data: st.DataObject, looks: bool) -> None:
        """`looks` false: on what it knew last."""
        process = self.one(data)
        if looks:
            self.store.refresh(process.board)
        self.act(process)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(data=st.data())
    def two_at_once(self, data: st.DataObject) -> None:
        """Both decide before either claims."""
        first, second = self.one(data), self.one(data)
        for process in (first, second):
            self.store.refresh(process.board)
        claims = [(process, self.ask(process)) for process in (first, second)]
        won = [
            claim.chunk
            for process, claim in claims
            if isinstance(claim, Claim) and self.try_claim(process, claim)
        ]
        assert len(won) == len(set(won))

    @precondition(lambda self: any(process.chunks for process in self.processes))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from([p for p in self.processes if p.chunks]))
        chunk = data.draw(st.sampled_from(sorted(process.chunks)))
        generation = process.chunks.pop(chunk)
        if not self.store.is_superseded(chunk, generation):
            self.store.finish(chunk)
            process.board.done.add(chunk)
            self.finished.add(chunk)

    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """Its beats stand still, though it may go on working."""
        owner = self.one(data).owner
        self.expired.add(owner)
        self.declared.add(owner)

    @precondition(lambda self: self.expired & {process.owner for process in self.processes})
    @rule(data=st.data())
    def thaw(self, data: st.DataObject) -> None:
        living = {process.owner for process in self.processes}
        self.expired.discard(data.draw(st.sampled_from(sorted(self.expired & living))))

    @rule(data=st.data(), is_reaped=st.booleans(), comes_back=st.booleans())
    def die(self, data: st.DataObject, is_reaped: bool, comes_back: bool) -> None:
        process = self.one(data)
        self.processes.remove(process)
        self.declared.add(process.owner)
        if is_reaped:
            self.store.bury(process.owner)
        else:
            self.expired.add(process.owner)
        if comes_back or not self.processes:
            self.spawn(process.rank)
        else:
            self.store.give_up(process.rank)

    @invariant()
    def at_most_one_live_owner(self) -> None:
        """Whoever was never believed dead holds its chunks alone among those like it."""
        holders: dict[int, str] = {}
        for process in self.processes:
            if process.owner in self.declared:
                continue
            for chunk, generation in process.chunks.items():
                assert chunk not in holders, f"{chunk}: {holders[chunk]} and {process.owner}"
                holders[chunk] = process.owner
                assert not self.store.is_superseded(chunk, generation)

    @invariant()
    def claims_only_grow(self) -> None:
        now = set(os.listdir(self.directory))
        assert getattr(self, "names", set()) <= now
        self.names = now

    def teardown(self) -> None:
        try:
            if hasattr(self, "slices"):
                self.drain()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def drain(self) -> None:
        """From any state, whoever lives finishes everything: no chunk is forgotten."""
        self.expired -= {process.owner for process in self.processes}
        for _ in range(4 * len(self.costs) + 8):
            for process in self.processes:
                for chunk, generation in list(process.chunks.items()):
                    if not self.store.is_superseded(chunk, generation):
                        self.store.finish(chunk)
                        self.finished.add(chunk)
                    del process.chunks[chunk]
                self.store.refresh(process.board)
                self.act(process)
            if all(process.has_left for process in self.processes):
                break
        assert self.finished == set(range(len(self.costs)))
        assert all(process.has_left for process in self.processes)


def claim_of(claim: Claim) -> tuple[int, int]:
    return claim.chunk, claim.generation


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=80, stateful_step_count=30)


def test_deciding_changes_nothing() -> None:
    board = board_of([[0], [1]], claims={0: held("1.0")}, dead={"1.0"})
    before = copy.deepcopy(board)
    choose(board)
    assert board == before
