"""What a worker holds: chunks that are taken over, given up, counted, and marked again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ragfleet.claims import Claim, ClaimStore, Holder, Leave, Wait
from ragfleet.config import RunConfig
from ragfleet.engines.protocol import RequestOrder
from ragfleet.holdings import Holdings
from ragfleet.launch import LaunchPaths, RunPaths, Work, write_launch
from ragfleet.plan import CostModel
from ragfleet.planning import index_contexts, selection_of
from ragfleet.preparation import prepare
from ragfleet.seats import launch_of
from ragfleet.shards import ShardWriter

NUM_RECORDS = 512


class Run:
    """Two workers' claims on a real folder, without their processes."""

    def __init__(self, folder: Path) -> None:
        contexts = folder / "contexts.jsonl"
        lines = ({"query": f"q{n}", "context": f"c{n // 4}"} for n in range(NUM_RECORDS))
        contexts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.config = RunConfig(
            contexts_file=contexts,
            output_file=folder / "out.jsonl",
            model_path="pocket",
            engine="echo",
            num_workers=2,
        )
        preparation = prepare(self.config, os.environ)
        selection = selection_of(self.config, 2, preparation.key_fields)
        indexed = index_contexts(selection, preparation.identity.run_key)
        plan = indexed.plan(indexed.requests, "dynamic", CostModel(answer_tokens=4))
        self.paths = LaunchPaths(RunPaths(self.config.output_file).launches / "one")
        self.launch = launch_of(preparation, "one", 2, private=False)
        work = Work(indexed.index.records, plan.order, plan.leads, plan.chunks)
        write_launch(self.paths, self.launch, work, {})
        self.store = ClaimStore(self.paths.claims)
        self.num_chunks = len(plan.chunks)

    def worker(self, rank: int, owner: str) -> tuple[Holdings, ShardWriter]:
        shard = ShardWriter(self.config.output_file, rank)
        return Holdings(self.paths, self.launch, rank, owner, shard), shard


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def answer(shard: ShardWriter, key: bytes) -> None:
    row = {"request_key": key.hex(), "finished_at_ns": 1, "success": True, "answer": "x"}
    row |= {"inference_time": 0.1, "worker_rank": 0}
    shard.append(json.dumps(row).encode() + b"\n")


def test_who_takes_over_skips_what_is_finished_and_nothing_else(run: Run) -> None:
    first, shard = run.worker(0, "0.0")
    before, held = first.claim(is_hungry=False), first.claim(is_hungry=False)
    assert before is not None
    assert held is not None
    shard.append(b'{"torn":\n')
    rows = list(held.rows)
    for *_, key in rows[:2]:
        answer(shard, key)
    run.store.bury("0.0")

    second, _ = run.worker(0, "0.1")
    second.refresh()
    taken = {}
    while chunk := second.claim(is_hungry=False):
        taken[chunk.number] = chunk
    again = taken[held.number]
    assert (again.generation, second.counters.generations[held.number]) == (1, 1)
    assert again.skip == {key for *_, key in rows[:2]}
    assert list(again.rows) == rows
    assert taken[before.number].skip == again.skip, "a shard's answers, whichever chunk they are of"
    assert all(not chunk.skip for chunk in taken.values() if chunk.generation == 0)


def test_what_is_taken_from_others_is_counted(run: Run) -> None:
    holdings, _ = run.worker(1, "1.0")
    own = len(holdings.board.slices[1])
    for number in range(run.num_chunks):
        assert holdings.claim(is_hungry=number >= own) is not None
        assert holdings.counters.stolen == max(0, number + 1 - own)
    assert 0 < own < run.num_chunks
    assert holdings.claim(is_hungry=True) is None
    assert isinstance(holdings.next_step(), Wait), "its own are not finished"


def test_only_the_hungry_take_from_others(run: Run) -> None:
    holdings, _ = run.worker(1, "1.0")
    for _ in holdings.board.slices[1]:
        assert holdings.claim(is_hungry=False) is not None
    assert holdings.claim(is_hungry=False) is None
    assert isinstance(holdings.next_step(), Claim)
    assert holdings.claim(is_hungry=True) is not None


def test_a_chunk_is_finished_with_its_last_request(run: Run) -> None:
    holdings, _ = run.worker(0, "0.0")
    chunk = holdings.claim(is_hungry=False)
    assert chunk is not None
    for exhausted, outstanding in ((False, 0), (True, 1)):
        chunk.exhausted, chunk.outstanding = exhausted, outstanding
        holdings.close_if_complete(chunk)
        assert not holdings.board.done
        assert holdings.counters.generations == {chunk.number: 0}
    chunk.outstanding = 0
    holdings.close_if_complete(chunk)
    assert holdings.board.done == {chunk.number}
    assert holdings.counters.generations == {}
    (mark,) = run.paths.claims.glob("*.done")
    mark.unlink()
    holdings.refresh()
    assert mark.exists(), "a mark that was lost is made again"
    for number in range(run.num_chunks):
        run.store.finish(number)
    holdings.refresh()
    assert isinstance(holdings.next_step(), Leave)


def test_what_somebody_took_over_is_theirs_to_finish(run: Run) -> None:
    holdings, _ = run.worker(0, "0.0")
    chunk = holdings.claim(is_hungry=False)
    assert chunk is not None
    holder = Holder("1.0", "out_rank1.jsonl", 0)
    assert run.store.try_claim(Claim(chunk.number, 1), holder)
    holdings.counters.superseded.add((chunk.number, 0))
    assert holdings.is_superseded(chunk)
    next(chunk.rows)
    chunk.forget_rest()
    assert list(chunk.rows) == []
    chunk.exhausted = True
    holdings.close_if_complete(chunk)
    assert not list(run.paths.claims.glob("*.done"))
    assert not holdings.board.done


def test_a_chunk_that_was_taken_back_keeps_its_own_generation(run: Run) -> None:
    """Believed dead, it lives and takes the chunk from who took it: two claims, one number."""
    holdings, _ = run.worker(0, "0.0")
    old = holdings.claim(is_hungry=False)
    assert old is not None
    holdings.counters.superseded.add((old.number, 0))
    holdings.counters.generations[old.number] = 2
    old.exhausted = True
    holdings.close_if_complete(old)
    assert holdings.counters.generations == {old.number: 2}


def test_a_chunk_comes_in_the_engines_order(run: Run) -> None:
    found: dict[str, list[list[int]]] = {}
    orders: tuple[RequestOrder, ...] = ("grouped", "leader_first")
    for order in orders:
        holdings, _ = run.worker(0, f"{order}.0")
        holdings.order = order
        while chunk := holdings.claim(is_hungry=True):
            found.setdefault(order, []).append([line_no for _, _, _, line_no, _ in chunk.rows])
        for claim in run.paths.claims.iterdir():
            claim.unlink()
    for grouped, leader_first in zip(*found.values(), strict=True):
        contexts = [(line_no - 1) // 4 for line_no in grouped]
        leaders = [grouped[contexts.index(context)] for context in dict.fromkeys(contexts)]
        assert leader_first[: len(leaders)] == leaders
        assert sorted(leader_first) == sorted(grouped)
    assert any(len(chunk) > 4 for chunk in found["grouped"]), "some have more than one group"
