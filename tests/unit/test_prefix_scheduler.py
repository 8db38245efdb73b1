"""The shared-prefix loop's scheduler: everything finishes, in order, within its limits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragfleet.engines.shared_prefix.pool import Pool
from ragfleet.engines.shared_prefix.prefixes import (
    MOST_SHARED_LEVELS,
    Node,
    PrefixTree,
    common_tokens,
    pack,
    shared_ends,
)
from ragfleet.engines.shared_prefix.rounds import Rounds
from ragfleet.engines.shared_prefix.scheduler import Limits, Range, Run, Scheduler

LIMITS = Limits(num_slots=4, max_new_tokens=6, pool_tokens=400, pass_tokens=90, own_tokens=20)


class Mirror:
    """Keys and values as (token, tokens before it), so that whatever a token sees can be told.

    A run or row is right when what it reads from the pool and finds in its slot is exactly its own
    prompt and answer before it.
    """

    def __init__(self, scheduler: Scheduler, prompts: Sequence[Sequence[int]]) -> None:
        self.scheduler = scheduler
        self.prompts = prompts
        self.pool: list[tuple[int, ...]] = [()] * scheduler.limits.pool_tokens
        self.slots: dict[int, list[int]] = {}
        self.owner: dict[int, int] = {}
        self.answers: dict[int, list[int]] = {}
        self.started: list[int] = []
        self.read: list[int] = []
        self.cached_tokens = 0

    def seen(self, reads: Sequence[Range]) -> tuple[int, ...]:
        text: tuple[int, ...] = ()
        for range_ in reads:
            for place in range(range_.offset, range_.offset + range_.length):
                text += (self.pool[place][-1],)
                assert self.pool[place] == text, "a place that holds another prompt's token"
        return text

    def copied(self, run: Run) -> list[int]:
        """What a run takes over from another slot: it must stand there, after the same tokens."""
        if not run.copied_tokens:
            return []
        source = self.slots[run.copied_from]
        assert run.copied_tokens <= len(source)
        number = self.owner[run.copied_from]
        own = len(self.prompts[number]) - (run.position - run.copied_tokens)
        assert run.copied_tokens <= own, "an answer is not part of a prompt"
        own_number = int.from_bytes(self.scheduler.key_of(run.slot), "big")
        assert list(self.prompts[number][: run.position]) == list(
            self.prompts[own_number][: run.position]
        )
        return source[: run.copied_tokens]

    def step(self, length_of: Sequence[int], most_steps: int = 1) -> bool:
        """One pass; False when there was nothing to do. Up to `most_steps` tokens of what runs,
        where it has no runs; who ends within them is released afterwards."""
        scheduled = self.scheduler.next_pass()
        limits = self.scheduler.limits
        # The first run goes whole, whatever rows there are.
        most = max(limits.pass_tokens, limits.num_slots - 1 + limits.own_tokens)
        assert scheduled.num_tokens <= most
        seen_slots = [row.slot for row in scheduled.rows]
        fed = []
        for row in scheduled.rows:
            number = self.owner[row.slot]
            text = self.seen(row.reads) + tuple(self.slots[row.slot])
            assert text == (*self.prompts[number], *self.answers[number][:-1])
            assert row.position == len(text)
            assert row.column == len(self.slots[row.slot]) < limits.slot_tokens
            self.slots[row.slot].append(self.answers[number][-1])
            fed.append(row.slot)
        for run in scheduled.runs:
            before = self.seen(run.reads)
            assert run.position == len(before) + run.copied_tokens
            self.read += run.token_ids
            if run.slot < 0:
                for step, token in enumerate(run.token_ids):
                    before = (*before, token)
                    self.pool[run.pool_offset + step] = before
            else:
                number = int.from_bytes(self.scheduler.key_of(run.slot), "big")
                assert run.slot not in self.slots, "a slot given to two"
                copied = self.copied(run)
                assert (*before, *copied, *run.token_ids) == tuple(self.prompts[number])
                assert run.token_ids
                assert len(copied) + len(run.token_ids) <= limits.own_tokens
                self.slots[run.slot] = [*copied, *run.token_ids]
                self.owner[run.slot] = number
                self.answers[number] = []
                self.started.append(number)
                assert self.scheduler.has_copied(run.slot) == bool(copied)
                self.cached_tokens += self.scheduler.cached_tokens(run.slot)
                fed.append(run.slot)
                seen_slots.append(run.slot)
        assert len(set(seen_slots)) == len(seen_slots) <= limits.num_slots
        self.take(fed, length_of)
        if scheduled.rows and not scheduled.runs:
            left = [limits.slot_tokens - 1 - row.column for row in scheduled.rows]
            more = min(most_steps - 1, *left)
            self.scheduler.advance(more)
            for _ in range(more):
                going_on = [slot for slot in fed if slot in self.slots]
                for slot in going_on:
                    self.slots[slot].append(self.answers[self.owner[slot]][-1])
                self.take(going_on, length_of)
        return bool(scheduled.num_tokens)

    def take(self, slots: Sequence[int], length_of: Sequence[int]) -> None:
        """A token of each; those whose answer is as long as it becomes are released."""
        for slot in slots:
            number = self.owner[slot]
            self.answers[number].append(10_000 + len(self.answers[number]))
            if len(self.answers[number]) == length_of[number]:
                self.scheduler.release(slot)
                del self.slots[slot], self.owner[slot]


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[list[int]], list[int], Limits, int]:
    """Prompts with heads, groups, prompts equal to their prefix or to each other, and loners."""
    seed = draw(st.integers(0, 2**20))
    rng = random.Random(seed)
    head = [1] * draw(st.sampled_from([0, 3, 16, 40]))
    groups = [
        head + rng.choices(range(2, 5), k=draw(st.integers(0, 90)))
        for _ in range(draw(st.integers(1, 5)))
    ]
    prompts = []
    for _ in range(draw(st.integers(1, 25))):
        prompt = list(rng.choice(groups)) if rng.random() < 0.9 else []
        prompt += rng.choices(range(2, 9), k=rng.choice([0, 1, 5, 19, 20, 21, 70]))
        prompts.append(prompt or [2])
    if draw(st.booleans()):
        prompts.sort()
    longest = max(map(len, prompts))
    limits = Limits(
        num_slots=draw(st.integers(1, 6)),
        max_new_tokens=6,
        pool_tokens=draw(st.integers(longest - 1, 600)),
        pass_tokens=draw(st.integers(20, 120)),
        own_tokens=draw(st.integers(1, 20)),
        least_free=draw(st.sampled_from([1, 1, 2, 3, 7])),
    )
    return prompts, [rng.randint(1, 6) for _ in prompts], limits, draw(st.integers(1, 12))


def play(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    limits: Limits,
    window: int,
    most_steps: int = 1,
) -> Mirror:
    scheduler = Scheduler(limits)
    mirror = Mirror(scheduler, prompts)
    submitted = 0
    for _ in range(10_000):
        while submitted < len(prompts) and scheduler.num_waiting < window:
            scheduler.submit(submitted.to_bytes(16, "big"), prompts[submitted])
            submitted += 1
        if not mirror.step(lengths, most_steps):
            break
    return mirror


@given(workloads(), st.sampled_from([1, 2, 4]))
def test_everything_finishes_and_sees_its_own_prompt(
    workload: tuple[list[list[int]], list[int], Limits, int], most_steps: int
) -> None:
    prompts, lengths, limits, window = workload
    mirror = play(prompts, lengths, limits, window, most_steps)
    scheduler = mirror.scheduler
    assert {number: len(answer) for number, answer in mirror.answers.items()} == dict(
        enumerate(lengths)
    )
    assert mirror.started == sorted(mirror.started), "not first come first served"
    assert scheduler.num_waiting == scheduler.num_admitted == 0
    assert scheduler.peak_pool_tokens <= limits.pool_tokens
    assert len(mirror.read) == scheduler.read_tokens <= sum(map(len, prompts))
    assert scheduler.prompt_tokens == sum(map(len, prompts))
    assert mirror.cached_tokens == scheduler.prompt_tokens - scheduler.read_tokens
    # Nothing is held any more: the whole pool can be had.
    scheduler.submit(bytes(16), [9] * (limits.pool_tokens + 1))
    assert scheduler.next_pass().num_tokens > 0


def test_what_a_group_shares_is_read_once() -> None:
    head, groups = [1] * 30, [[2] * 50, [3] * 60]
    prompts = [[*head, *group, 4 + number] for group in groups for number in range(5)]
    mirror = play(prompts, [6] * 10, LIMITS, 10)
    assert len(mirror.read) == 30 + 50 + 60 + 10


def test_a_group_that_comes_in_pieces_is_still_read_once() -> None:
    prompts = [[1] * 60 + [2, number] for number in range(12)]
    mirror = play(prompts, [1 + number % 6 for number in range(12)], LIMITS, 2)
    assert len(mirror.read) == 60 + 1 + 12 or len(mirror.read) == 61 + 12


def test_what_questions_begin_with_alike_is_copied_not_read() -> None:
    rng = random.Random(1)
    context, question = [1] * 40, [2] * 8
    prompts = [[*context, *question, *rng.choices(range(3, 99), k=5)] for _ in range(3)]
    prompts += [[*context, 100 + number] for number in range(3)]
    mirror = play(prompts, [6] * 6, dataclasses.replace(LIMITS, num_slots=6), 6)
    assert len(mirror.read) == 40 + 8 + 3 * 5 + 3
    following = [[*context, *[2] * number, 50 + number, 60] for number in (8, 9, 10)]
    mirror = play([[*context, 100], *following], [6] * 4, LIMITS, 4)
    assert len(mirror.read) == 40 + 1 + (8 + 2) + 3 + 3, "from the one that has most of it"
    elsewhere = [[*[3] * 40, 9], [*[4] * 40, *question, 1], [*[3] * 40, *question, 2], [4] * 41]
    mirror = play(elsewhere, [6] * 4, LIMITS, 4)
    assert len(mirror.read) == 2 * 40 + 1 + 9 + 9 + 1, "it stands in another context there"
    alone = play(prompts, [6] * 6, dataclasses.replace(LIMITS, num_slots=1), 6)
    assert len(alone.read) == 40 + 3 * (8 + 5) + 3, "nobody is left to copy from"


def test_slots_are_filled_again_in_the_next_pass() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(9):
        scheduler.submit(bytes([number]), [number] * 10)
    assert len(scheduler.next_pass().runs) == 4
    for slot in (1, 3):
        scheduler.release(slot)
    following = scheduler.next_pass()
    assert [row.slot for row in following.rows] == [0, 2]
    assert sorted(run.slot for run in following.runs) == [1, 3]


def first_runs(scheduler: Scheduler) -> int:
    """How many requests the next pass starts."""
    return sum(run.slot >= 0 for run in scheduler.next_pass().runs)


def test_a_round_waits_until_enough_slots_are_free_and_then_fills_all() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, least_free=3, pass_tokens=15))
    for number in range(20):
        scheduler.submit(bytes([number]), [number] * 10)
    assert [first_runs(scheduler) for _ in range(5)] == [1, 1, 1, 1, 0]
    scheduler.release(0)
    scheduler.release(1)
    assert first_runs(scheduler) == 0, "two are free, it waits for three"
    scheduler.release(2)
    assert first_runs(scheduler) == 1, "a pass has room for one prompt"
    scheduler.release(0)
    following = [first_runs(scheduler) for _ in range(4)]
    assert following == [1, 1, 1, 0], "it goes on, and with what becomes free meanwhile"
    scheduler.release(0)
    scheduler.release(1)
    assert first_runs(scheduler) == 0, "all were taken: that ended it"


def test_a_round_begins_at_the_latest_when_nothing_runs() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, least_free=99))
    for number in range(12):
        scheduler.submit(bytes([number]), [number] * 10)
    assert first_runs(scheduler) == 4
    for slot in range(3):
        scheduler.release(slot)
        assert first_runs(scheduler) == 0
    scheduler.release(3)
    assert first_runs(scheduler) == 4


def test_few_requests_need_not_wait_for_others() -> None:
    scheduler = Scheduler(dataclasses.replace(LIMITS, least_free=2))
    for number in range(4):
        scheduler.submit(bytes([number]), [number] * 10)
        assert first_runs(scheduler) == 1, "no slot was taken in vain: the round goes on"
    scheduler.release(1)
    scheduler.submit(b"a", [9] * 10)
    scheduler.submit(b"b", [9] * 10)
    assert first_runs(scheduler) == 0, "one slot is free, it waits for two"
    assert scheduler.drop(b"b")
    assert first_runs(scheduler) == 1, "there is a slot for all that wait"


def test_a_round_that_a_full_pool_ended_waits_for_the_same_part_of_what_runs() -> None:
    rounds = Rounds(num_slots=256, least_free=32)
    assert rounds.may_admit(0, 9)
    rounds.refused(80)
    assert not rounds.may_admit(71, 9)
    assert rounds.may_admit(70, 9)
    rounds.refused(5)
    assert not rounds.may_admit(5, 9)
    assert rounds.may_admit(4, 9)


def test_a_full_pool_too_is_left_until_enough_are_done() -> None:
    scheduler = Scheduler(
        Limits(num_slots=8, max_new_tokens=6, pool_tokens=400, pass_tokens=500, least_free=4)
    )
    for number in range(7):
        scheduler.submit(bytes([number]), [number] * 100)
    assert first_runs(scheduler) == 4
    scheduler.release(1)
    assert first_runs(scheduler) == 0, "half of the slots, so half of the four"
    scheduler.submit(b"one more", [9] * 100)
    assert first_runs(scheduler) == 0
    scheduler.release(3)
    assert first_runs(scheduler) == 2


@pytest.mark.parametrize("least_free", [1, 2, 4, 9])
def test_nobody_starves_while_others_keep_coming(least_free: int) -> None:
    """A request that is first starts within one answer's time."""
    rng = random.Random(least_free)
    limits = dataclasses.replace(LIMITS, least_free=least_free)
    scheduler = Scheduler(limits)
    left: dict[int, int] = {}
    submitted, gap = 0, 0
    for _ in range(600):
        while scheduler.num_waiting < 8:
            prompt = [submitted % 7] * 30 + rng.choices(range(9), k=rng.randint(1, 150))
            scheduler.submit(submitted.to_bytes(16, "big"), prompt)
            submitted += 1
        scheduled = scheduler.next_pass()
        started = {run.slot for run in scheduled.runs if run.slot >= 0}
        for slot in started | {row.slot for row in scheduled.rows}:
            left[slot] = left.get(slot) or rng.randint(1, limits.max_new_tokens)
            left[slot] -= 1
            if not left[slot]:
                scheduler.release(slot)
        gap = 0 if started else gap + 1
        assert gap <= limits.max_new_tokens + 3, "the longest answer, and three passes to read"
    assert submitted > 200


def test_nodes_are_laid_again_when_all_was_evicted_for_them() -> None:
    """The first of two stood where the second alone has room."""
    limits = dataclasses.replace(LIMITS, pool_tokens=95, own_tokens=5)
    scheduler = Scheduler(limits)
    scheduler.submit(b"evicted", [1] * 41)  # [0, 40)
    scheduler.submit(b"running", [2] * 11)  # [40, 50)
    assert first_runs(scheduler) == 2
    scheduler.release(0)
    scheduler.submit(b"a", [3] * 30 + [4] * 46)
    scheduler.submit(b"b", [3] * 30 + [5])
    runs = scheduler.next_pass().runs
    assert [run.pool_offset for run in runs[:2]] == [0, 50]


def test_what_follows_a_dropped_request_that_did_not_fit_is_tried_at_once() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.submit(b"a", [1] * 300)
    for _ in range(4):
        scheduler.next_pass()
    scheduler.submit(b"b", [2] * 300)
    scheduler.submit(b"c", [3] * 10)
    assert first_runs(scheduler) == 0
    assert scheduler.drop(b"b")
    assert first_runs(scheduler) == 1
    scheduler.submit(b"d", [4] * 300)
    for number in range(4):
        scheduler.submit(bytes([number]), [number] * 10)
    assert first_runs(scheduler) == 0
    scheduler.release(0)
    assert sum(first_runs(scheduler) for _ in range(5)) == 3
    assert scheduler.drop(bytes([3])), "now slots are missing, and this makes none"
    assert first_runs(scheduler) == 0


def test_what_nobody_stands_on_goes_first_when_the_pool_is_full() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(4):  # four nodes of 99 tokens: the pool is full
        scheduler.submit(bytes([number]), [number] * 100)
    for _ in range(5):
        scheduler.next_pass()
    assert scheduler.num_admitted == 4
    scheduler.release(2)
    scheduler.submit(b"a", [7] * 290)
    assert scheduler.next_pass().runs == [], "it does not fit beside three that run"
    scheduler.release(0)
    scheduler.release(1)
    assert scheduler.next_pass().runs


def test_a_prompt_that_is_its_groups_prefix() -> None:
    prefix = [5] * 40
    mirror = play([prefix, [*prefix, 6], prefix, [*prefix, 7, 8]], [3] * 4, LIMITS, 4)
    assert len(mirror.read) == 39 + 1 + 2 + 1 + 3


def test_neighbouring_heads_are_told_apart() -> None:
    """The head that all share and the group's part are nodes of their own."""
    group = pack([1] * 20 + [2] * 50 + [3])
    others = [pack([1] * 20 + [2] * 50 + [4])] * 3 + [pack([1] * 20 + [9] * 60)] * 30
    assert shared_ends(group, others, 0, MOST_SHARED_LEVELS, 64) == [20, 70]
    assert shared_ends(group, others, 20, 1, 50) == [70]
    assert shared_ends(group, [], 0, MOST_SHARED_LEVELS, 64) == []
    least = [pack([1] * 16 + [5])] * 9
    assert shared_ends(group, least, 0, MOST_SHARED_LEVELS, 64) == [16]
    assert shared_ends(group, [pack([1] * 15 + [5])] * 9, 0, MOST_SHARED_LEVELS, 64) == []


def test_contexts_that_begin_alike_keep_a_node_of_their_own() -> None:
    """A head of 20, a beginning of 50 that three contexts have, and 40 that each has alone."""
    head, alike = [1] * 20, [2] * 50
    contexts = [head + alike + [number] * 40 for number in (3, 4, 5)] + [head + [6] * 60]
    prompts = [[*context, 7 + number, 0, 0] for context in contexts for number in range(4)]
    limits = dataclasses.replace(LIMITS, num_slots=16)
    mirror = play(prompts, [3] * len(prompts), limits, len(prompts))
    assert len(mirror.read) == 20 + 50 + 3 * 40 + 60 + 3 * len(prompts)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_common_tokens(a: list[int], b: list[int]) -> None:
    wanted = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    wanted = min(len(a), len(b)) if wanted is None else wanted
    assert common_tokens(pack(a), pack(b)) == wanted
    assert common_tokens(pack([2**31, *a]), pack([2**31, *b])) == wanted + 1
    assert common_tokens(pack(a), pack(b), known=wanted // 2) == wanted


@given(st.integers(0, 2**20))
def test_the_tree_finds_what_a_look_at_all_nodes_finds(seed: int) -> None:
    """Of nodes shorter and longer than what they are looked up by, added, used and removed."""
    rng = random.Random(seed)
    tree = PrefixTree()
    nodes: list[Node] = []
    held: list[Node] = []
    for _ in range(40):
        prompt = pack(rng.choices([1, 1, 1, 1, 2], k=rng.randint(1, 70)))
        chain = tree.match(prompt)
        begin = chain[-1].end if chain else 0
        start, last = begin * 4, len(prompt) // 4 - 1
        fitting = [
            node
            for node in nodes
            if node.parent is (chain[-1] if chain else None)
            and node.end <= last
            and prompt[start:].startswith(node.packed)
        ]
        assert not fitting, "one more goes on from here"
        assert b"".join(node.packed for node in chain) == prompt[:start]
        if last > begin and rng.random() < 0.7:
            end = rng.randint(begin + 1, last)
            nodes.append(tree.add(prompt[start : end * 4], chain[-1] if chain else None, 0))
            chain.append(nodes[-1])
        if chain:
            tree.stand_on(chain)
            held.append(chain[-1])
        if held and rng.random() < 0.8:
            tree.leave(held.pop(rng.randrange(len(held))))
        spared = rng.sample(nodes, k=len(nodes) // 3)
        free = [node for node in nodes if not node.users and node not in spared]
        oldest = tree.unused(spared)
        assert oldest is min(free, key=lambda node: node.used_at, default=None)
        if oldest is not None and rng.random() < 0.3:
            tree.remove(oldest)
            nodes.remove(oldest)
    for node in held:
        tree.leave(node)
    while (left := tree.unused()) is not None:
        tree.remove(left)
    assert not tree._roots, "something is kept of nodes that are gone"


def test_dropping_and_taking_back() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(6):
        scheduler.submit(bytes([number]), [number] * 100)
    scheduler.next_pass()
    scheduler.next_pass()
    assert not scheduler.drop(bytes([0])), "it runs"
    assert scheduler.drop(bytes([5]))
    assert not scheduler.drop(b"nobody")
    taken = scheduler.take_back()
    assert set(taken) | set(scheduler.take_waiting()) == {bytes([n]) for n in range(5)}
    assert scheduler.num_admitted == scheduler.num_waiting == 0
    scheduler.submit(b"y", [1] * 10)
    assert scheduler.next_pass().runs
    assert scheduler.take_back() == [b"y"]
    assert not scheduler.next_pass().num_tokens, "what ran is forgotten"
    scheduler.submit(b"x", [1] * 401)
    assert scheduler.next_pass().num_tokens == 90


def test_what_never_fits_is_refused() -> None:
    scheduler = Scheduler(LIMITS)
    assert scheduler.fits(401)
    assert not scheduler.fits(402)
    with pytest.raises(ValueError, match="402 tokens"):
        scheduler.submit(b"x", [1] * 402)
    with pytest.raises(ValueError, match="0 tokens"):
        scheduler.submit(b"x", [])


@given(st.lists(st.integers(1, 30), max_size=30), st.randoms(use_true_random=False))
def test_the_pool_gives_each_place_to_one(lengths: list[int], rng: random.Random) -> None:
    pool = Pool(100)
    held: list[tuple[int, int]] = []
    for length in lengths:
        while (start := pool.take(length)) is None:
            taken = held.pop(rng.randrange(len(held)))
            pool.give_back(*taken)
        held.append((start, length))
        places = [place for start, length in held for place in range(start, start + length)]
        assert len(set(places)) == len(places) == pool.used_tokens
        assert max(places) < 100
    for taken in held:
        pool.give_back(*taken)
    assert pool.take(100) == 0
