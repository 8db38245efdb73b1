"""Which prompts begin alike, and what is worth reading once.

Pure. Owns the tree of prefixes: a node is a run of tokens that follows its parent's, read once for
all prompts that go through it. Prompts are compared by their token ids alone, never by text: what
is shared is exactly what each prompt would have been on its own.

Prompts come as `packed` ids, four bytes each: comparing bytes is a hundred times faster than
comparing lists of integers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

LEAST_SHARED: Final = 16
"""Fewer tokens never get a node: each is a call per layer in every pass that decodes from it."""
LEAST_SAVED: Final = 128
"""Tokens not read again that are worth a node, where the rest could stand in slots instead."""
MOST_SHARED_LEVELS: Final = 3
"""Nodes above each other, a request's own not counted: what all share, what groups share whose
contexts begin alike, and what a group shares. With two, a group of the second kind has no node of
its own left, and each of its requests reads its context anew."""
ID_BYTES: Final = 4


def pack(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()


def common_tokens(a: bytes, b: bytes, known: int = 0) -> int:
    """How many tokens two packed prompts begin with in common: `known`, or more."""
    low, high = known, min(len(a), len(b)) // ID_BYTES
    while low < high:  # all of [0, low) is equal, nothing from `high` on is known to be
        middle = (low + high + 1) // 2
        if a[low * ID_BYTES : middle * ID_BYTES] == b[low * ID_BYTES : middle * ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


Children = dict[bytes, list["Node"]]
"""By their first LEAST_SHARED tokens, for hundreds may stand below one; shorter ones under b""."""


@dataclass(slots=True, eq=False)
class Node:
    """Tokens `[begin, end)` of every prompt that goes through it, in the pool from `offset` on."""

    number: int
    packed: bytes
    """Its own tokens, without its parents'."""
    parent: Node | None
    begin: int
    offset: int
    planned: int = 0
    """Tokens whose keys and values are in the pool, or will be after the pass being made."""
    users: int = 0
    """Child nodes, and requests that stand on it."""
    used_at: int = 0
    children: Children = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def end(self) -> int:
        return self.begin + self.length

    @property
    def ancestors(self) -> list[Node]:
        """Those it stands on, from the root."""
        return [*self.parent.ancestors, self.parent] if self.parent else []


class PrefixTree:
    """The nodes that have a place in the pool."""

    def __init__(self) -> None:
        self._roots: Children = {}
        self._unused: list[tuple[int, int, Node]] = []
        """Nodes without users as `_age` tells them, the longest unused first."""
        self._clock = 0
        self._count = 0

    def match(self, packed: bytes) -> list[Node]:
        """Nodes that `packed` goes through, from the root. Its last token is never in one."""
        chain: list[Node] = []
        last = len(packed) // ID_BYTES - 1
        children, start = self._roots, 0
        while True:
            fitting = [
                node
                for key in (_first_tokens(packed, start), b"")
                for node in children.get(key, ())
                if node.end <= last and packed.startswith(node.packed, start)
            ]
            if not fitting:
                return chain
            chain.append(max(fitting, key=lambda node: node.length))
            children, start = chain[-1].children, chain[-1].end * ID_BYTES

    def add(self, packed: bytes, parent: Node | None, offset: int) -> Node:
        """A new node of the tokens `packed` below `parent`."""
        self._count += 1
        begin = parent.end if parent else 0
        node = Node(number=self._count, packed=packed, parent=parent, begin=begin, offset=offset)
        self._beside(node).setdefault(_first_tokens(packed), []).append(node)
        if parent is not None:
            self._use(parent)
        self._touch([node])
        insort(self._unused, _age(node))
        return node

    def remove(self, node: Node) -> None:
        assert not node.users
        del self._unused[bisect_left(self._unused, _age(node))]
        beside, key = self._beside(node), _first_tokens(node.packed)
        beside[key].remove(node)
        if not beside[key]:
            del beside[key]
        if node.parent is not None:
            self.leave(node.parent)

    def stand_on(self, chain: Sequence[Node]) -> None:
        """A request stands on the last of `chain`, and uses all of it."""
        self._use(chain[-1])
        self._touch(chain)

    def leave(self, node: Node) -> None:
        """A request, or a child, no longer stands on `node`."""
        node.users -= 1
        if not node.users:
            insort(self._unused, _age(node))

    def unused(self, spared: Sequence[Node] = ()) -> Node | None:
        """The node that nothing stands on and that was used the longest time ago."""
        return next((node for _, _, node in self._unused if node not in spared), None)

    def _beside(self, node: Node) -> Children:
        return node.parent.children if node.parent else self._roots

    def _use(self, node: Node) -> None:
        if not node.users:
            del self._unused[bisect_left(self._unused, _age(node))]
        node.users += 1

    def _touch(self, chain: Iterable[Node]) -> None:
        """Only those with users, or new ones: the order of the unused stays."""
        self._clock += 1
        for node in chain:
            node.used_at = self._clock


def _first_tokens(packed: bytes, start: int = 0) -> bytes:
    """Where in `Children` a node is that begins at the byte `start`."""
    key = packed[start : start + LEAST_SHARED * ID_BYTES]
    return key if len(key) == LEAST_SHARED * ID_BYTES else b""


def _age(node: Node) -> tuple[int, int, Node]:
    return node.used_at, node.number, node


def shared_ends(
    packed: bytes, others: Iterable[bytes], begin: int, levels: int, own_tokens: int
) -> list[int]:
    """Where shared nodes of a prompt should end, given those it may share with.

    At most `levels` ends after `begin`. First the one that saves most reading: (end - begin) times
    the number of others that go so far. Then, by the same rule, what those share that turn off
    before it (the head of all prompts, where this is a large group's), and what goes beyond it.
    A rest of at most `own_tokens` needs no node, so there one must save more than it costs.
    """
    last = len(packed) // ID_BYTES - 1
    start, stop = begin * ID_BYTES, (begin + LEAST_SHARED) * ID_BYTES
    least, before = packed[start:stop], packed[:start]
    # Many may wait and few be alike here: told first by what costs least to compare.
    alike = [one for one in others if one.startswith(least, start) and one.startswith(before)]
    lengths = []
    for other in alike:
        common = min(common_tokens(packed, other, begin), last, len(other) // ID_BYTES - 1)
        if common - begin >= LEAST_SHARED:
            lengths.append(common)
    ends: list[int] = []
    best = _best_end(lengths, begin, last + 1 - begin <= own_tokens)
    if best is not None and levels > 1:
        head = _best_end([end for end in lengths if end < best], begin, False)
        if head is not None and best - head >= LEAST_SHARED:
            ends.append(head)
    while best is not None and len(ends) < levels:
        ends.append(best)
        best = _best_end(lengths, best, last + 1 - best <= own_tokens)
    return ends


def _best_end(lengths: Iterable[int], begin: int, can_do_without: bool) -> int | None:
    ordered = sorted((end for end in lengths if end - begin >= LEAST_SHARED), reverse=True)
    savings = [(end - begin) * count for count, end in enumerate(ordered, start=1)]
    if not savings or (can_do_without and max(savings) < LEAST_SAVED):
        return None
    return ordered[savings.index(max(savings))]
