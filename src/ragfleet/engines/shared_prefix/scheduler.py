"""What the next pass of the loop reads and decodes. Pure: no tensors, no clock.

Owns admission, slots and eviction. A request is admitted, first come first served, when a slot is
free and the pool has room for what it alone needs; what it shares is charged once. A pass holds one
decode step of every running slot, and as many prompt tokens of newly admitted requests as fit, so
that a slot is filled again in the pass after it became free; or, where such passes are costly, in
rounds (`rounds`).

What a request's own part has in common with that of one that runs on the same nodes is copied from
slot to slot, not read again: questions often begin alike.

A slot has room for the longest answer from the start: what was admitted always finishes.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Final, NamedTuple

from ragfleet.engines.protocol import RequestKey
from ragfleet.engines.shared_prefix.pool import Pool
from ragfleet.engines.shared_prefix.prefixes import (
    ID_BYTES,
    LEAST_SHARED,
    MOST_SHARED_LEVELS,
    Node,
    PrefixTree,
    common_tokens,
    pack,
    shared_ends,
)
from ragfleet.engines.shared_prefix.rounds import Rounds
from ragfleet.engines.shared_prefix.waiting import Waiting

OWN_TOKENS: Final = 64
"""Most prompt tokens that stand in a slot, beside the answer; longer rests get a node."""
LEAST_COPIED: Final = 4
"""Fewer tokens are read: what is copied is one more part of the attention in each layer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What there is room for."""

    num_slots: int
    max_new_tokens: int
    pool_tokens: int
    pass_tokens: int
    """Most tokens of a pass, if the running slots with one request's own tokens are not more."""
    own_tokens: int = OWN_TOKENS
    least_free: int = 1
    """Free slots that a round of admission waits for, where a pass with runs is best a rare one."""

    @property
    def slot_tokens(self) -> int:
        """Places of a slot: own prompt tokens, then the answer."""
        return self.own_tokens + self.max_new_tokens


class Range(NamedTuple):
    """Tokens of the pool."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive prompt tokens to read in a pass: one request's own, or a piece of a node."""

    token_ids: Sequence[int]
    position: int
    """Of the first of them in its prompt."""
    reads: tuple[Range, ...]
    """What stands before them."""
    pool_offset: int = -1
    """Where their keys and values go; -1 for into a slot, after what is copied there."""
    slot: int = -1
    """The slot whose first token the last of them gives; -1 for a node's."""
    copied_tokens: int = 0
    """That come before them in the slot, from the first places of `copied_from`, another slot."""
    copied_from: int = -1


class Row(NamedTuple):
    """A slot that decodes one token. Each pass makes one per slot: a tuple is made quickly."""

    slot: int
    position: int
    column: int
    """Place in the slot."""
    reads: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward: rows first, those with common ranges side by side; then runs."""

    rows: Sequence[Row]
    runs: Sequence[Run]

    @property
    def num_tokens(self) -> int:
        return len(self.rows) + sum(len(run.token_ids) for run in self.runs)


@dataclass(slots=True, eq=False)
class _Entry:
    """A request from submit to release."""

    key: RequestKey
    token_ids: Sequence[int]
    packed: bytes
    chain: list[Node] = field(default_factory=list)
    begin: int = 0
    """First token of its own, after its chain's."""
    reads: tuple[Range, ...] = ()
    slot: int = -1
    order: tuple[tuple[int, ...], int] = ((), -1)
    """Of the rows in a pass: those with common ranges side by side."""
    column: int = 0
    """Next free place in its slot."""
    cached_tokens: int = 0
    """Of its prompt: in nodes that were there, or planned, when it was admitted, or copied."""
    has_copied: bool = False


_order: Final = attrgetter("order")


class Scheduler:
    """The state machine. `submit`, then `next_pass` and `release` in turn."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.prompt_tokens = 0
        """Of admitted requests, shared or not."""
        self.read_tokens = 0
        """Prompt tokens that passes have read."""
        self._tree = PrefixTree()
        self._pool = Pool(limits.pool_tokens)
        self._slots = list(range(limits.num_slots))  # a heap: low slots first
        self._waiting: Waiting[_Entry] = Waiting()
        self._reading: deque[Node | _Entry] = deque()
        self._running: dict[int, _Entry] = {}
        self._decoding: list[_Entry] = []
        """Those that run, in the order of their rows."""
        self._rounds = Rounds(limits.num_slots, limits.least_free)

    def fits(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens can be admitted at all."""
        return num_tokens - 1 <= self.limits.pool_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_admitted(self) -> int:
        return self.limits.num_slots - len(self._slots)

    @property
    def peak_pool_tokens(self) -> int:
        return self._pool.peak_tokens

    def submit(self, key: RequestKey, token_ids: Sequence[int]) -> None:
        """Raises ValueError for what can't be admitted."""
        if not token_ids or not self.fits(len(token_ids)):
            raise ValueError(f"a prompt of {len(token_ids)} tokens")
        self._waiting.append(_Entry(key, token_ids, pack(token_ids)))

    def key_of(self, slot: int) -> RequestKey:
        """The request that holds a slot, from its first run on."""
        return self._running[slot].key

    def cached_tokens(self, slot: int) -> int:
        """Of the prompt in `slot`: what it did not have to read because another one had."""
        return self._running[slot].cached_tokens

    def has_copied(self, slot: int) -> bool:
        return self._running[slot].has_copied

    def next_pass(self) -> Pass:
        """One step of all that runs, and the next prompt tokens. Without tokens: nothing to do.

        What it returns counts as done: see `take_back` for a pass that failed.
        """
        decoding = [self._row(entry) for entry in self._decoding]
        return Pass(decoding, self._next_runs(self.limits.pass_tokens - len(decoding)))

    def advance(self, steps: int) -> None:
        """All that runs decodes `steps` tokens more than the pass just made says. It has no runs,
        and all slots have room for them."""
        for entry in self._running.values():
            entry.column += steps

    def release(self, slot: int) -> None:
        """The request in `slot` is finished, or no longer wanted."""
        entry = self._running.pop(slot)
        del self._decoding[bisect_left(self._decoding, entry.order, key=_order)]
        heapq.heappush(self._slots, slot)
        if entry.chain:
            self._tree.leave(entry.chain[-1])

    def drop(self, key: RequestKey) -> bool:
        """Forget a request that waits; False for one that was admitted, or that nobody knows."""
        dropped = self._waiting.drop(key)
        if dropped:
            self._rounds.forget_refused()
        return dropped

    def take_back(self) -> list[RequestKey]:
        """Forget all that was admitted, and every node; their keys, for another engine."""
        entries = [one for one in self._reading if isinstance(one, _Entry)]
        entries = [*self._running.values(), *entries]
        self.prompt_tokens -= sum(len(entry.token_ids) for entry in entries)
        self._reading.clear()
        self._running.clear()
        self._decoding.clear()
        self._slots = list(range(self.limits.num_slots))
        self._tree = PrefixTree()
        peak_tokens = self._pool.peak_tokens
        self._pool = Pool(self.limits.pool_tokens)
        self._pool.peak_tokens = peak_tokens
        return [entry.key for entry in entries]

    def take_waiting(self) -> list[RequestKey]:
        """Forget all that waits; their keys."""
        return self._waiting.clear()

    # ---- a pass

    def _row(self, entry: _Entry) -> Row:
        column = entry.column
        entry.column = column + 1
        return Row(entry.slot, entry.begin + column, column, entry.reads)

    def _next_runs(self, num_tokens: int) -> list[Run]:
        runs: list[Run] = []
        while num_tokens > 0 and (self._reading or self._admit()):
            first = self._reading[0]
            if isinstance(first, _Entry):
                run = self._own_run(first)
                if runs and len(run.token_ids) > num_tokens:
                    break
                self._reading.popleft()
                first.column = run.copied_tokens + len(run.token_ids)
                first.cached_tokens += run.copied_tokens
                first.has_copied = run.copied_tokens > 0
                self._running[first.slot] = first
                insort(self._decoding, first, key=_order)
            else:
                run = self._node_run(first, num_tokens)
                if first.planned == first.length:
                    self._reading.popleft()
            runs.append(run)
            num_tokens -= len(run.token_ids)
            self.read_tokens += len(run.token_ids)
        return runs

    def _own_run(self, entry: _Entry) -> Run:
        copied, source = self._most_common(entry)
        return Run(
            token_ids=entry.token_ids[entry.begin + copied :],
            position=entry.begin + copied,
            reads=entry.reads,
            slot=entry.slot,
            copied_tokens=copied,
            copied_from=source,
        )

    def _most_common(self, entry: _Entry) -> tuple[int, int]:
        """How many of its own tokens, never its last, another slot holds; and which. (0, -1)."""
        best = (0, -1)
        last = len(entry.token_ids) - 1
        nodes, start = entry.order[0], entry.begin * ID_BYTES
        wanted = entry.packed[start : start + LEAST_COPIED * ID_BYTES]
        first = bisect_left(self._decoding, (nodes, -1), key=_order)
        for other in islice(self._decoding, first, None):
            if other.order[0] != nodes:
                break
            if not other.packed.startswith(wanted, start):
                continue
            common = min(common_tokens(entry.packed, other.packed, entry.begin), last) - entry.begin
            if common >= LEAST_COPIED and common > best[0]:
                best = (common, other.slot)
                wanted = entry.packed[start : start + (common + 1) * ID_BYTES]
        return best

    def _node_run(self, node: Node, num_tokens: int) -> Run:
        done = node.planned
        node.planned = min(node.length, done + num_tokens)
        piece = memoryview(node.packed[done * ID_BYTES : node.planned * ID_BYTES]).cast("I")
        before = _ranges(node.ancestors)
        return Run(
            token_ids=piece.tolist(),
            position=node.begin + done,
            reads=(*before, Range(node.offset, done)) if done else before,
            pool_offset=node.offset + done,
        )

    # ---- admission

    def _admit(self) -> bool:
        """Give the first waiting request a slot, and places in the pool; False if it must wait."""
        if not self._waiting:
            return False
        if not self._rounds.may_admit(self.num_admitted, len(self._waiting)):
            return False
        entry = self._waiting.first
        chain = self._tree.match(entry.packed)
        new = self._grow(entry, chain)
        if new is None and not self.num_admitted:
            # Nothing will come free by waiting, so what is left of others goes: then it fits.
            self._evict_all()
            chain = []
            new = self._grow(entry, chain)
        if new is None:
            self._rounds.refused(self.num_admitted)
            return False
        self._waiting.popleft()
        self._reading += new
        entry.cached_tokens = chain[-1].end if chain else 0
        self._put(entry, chain + new)
        self._reading.append(entry)
        self.prompt_tokens += len(entry.token_ids)
        self._rounds.admitted(self.num_admitted)
        return True

    def _put(self, entry: _Entry, chain: list[Node]) -> None:
        """Into a slot, on `chain`."""
        if chain:
            self._tree.stand_on(chain)
            entry.begin = chain[-1].end
        entry.chain, entry.reads = chain, _ranges(chain)
        entry.slot = heapq.heappop(self._slots)
        entry.order = (tuple(node.number for node in chain), entry.slot)

    def _grow(self, entry: _Entry, chain: Sequence[Node]) -> list[Node] | None:
        """New nodes for `entry` below `chain`; None, and none made, when the pool is too full."""
        ends = self._new_ends(entry, chain)
        new = self._lay(entry, chain, ends)
        if new is None and len(ends) > 1:  # all that may be evicted is now: each may fit elsewhere
            new = self._lay(entry, chain, ends)
        return new

    def _new_ends(self, entry: _Entry, chain: Sequence[Node]) -> list[int]:
        """Where the nodes end that `entry`, the first that waits, needs below `chain`."""
        begin = chain[-1].end if chain else 0
        others = self._waiting.like_first(begin + LEAST_SHARED)
        levels = MOST_SHARED_LEVELS - len(chain)
        own_tokens = self.limits.own_tokens
        ends = shared_ends(entry.packed, others, begin, levels, own_tokens) if levels > 0 else []
        last = len(entry.token_ids) - 1
        if last + 1 - (ends[-1] if ends else begin) > own_tokens:
            ends.append(last)
        return ends

    def _lay(self, entry: _Entry, chain: Sequence[Node], ends: Sequence[int]) -> list[Node] | None:
        begin = chain[-1].end if chain else 0
        new: list[Node] = []
        for end in ends:
            offset = self._place(end - begin, [*chain, *new])
            if offset is None:
                for node in reversed(new):
                    self._discard(node)
                return None
            parent = new[-1] if new else chain[-1] if chain else None
            piece = entry.packed[begin * ID_BYTES : end * ID_BYTES]
            new.append(self._tree.add(piece, parent, offset))
            begin = end
        return new

    def _place(self, length: int, spared: Sequence[Node]) -> int | None:
        """Room for `length` tokens, evicting what nothing stands on, the longest unused first."""
        while (offset := self._pool.take(length)) is None:
            node = self._tree.unused(spared)
            if node is None:
                return None
            self._discard(node)
        return offset

    def _discard(self, node: Node) -> None:
        self._tree.remove(node)
        self._pool.give_back(node.offset, node.length)

    def _evict_all(self) -> None:
        while (node := self._tree.unused()) is not None:
            self._discard(node)


def _ranges(chain: Iterable[Node]) -> tuple[Range, ...]:
    return tuple(Range(node.offset, node.length) for node in chain)
