"""Which prompts begin alike, and what is worth reading once.

Pure. Owns the tree of prefixes: a node is a run of tokens that follows its parent's, read once for
all prompts that go through it. Prompts are compared by their token ids alone, never by text: what
is shared is exactly what each prompt would have been on its own.

Prompts come as `packed` ids, four bytes each: comparing bytes is a hundred times faster than
comparing lists of integers.
"""

from __future__ import annotations

from array import array
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


def common_tokens(a: bytes, b: bytes) -> int:
    """How many tokens two packed prompts begin with in common."""
    low, high = 0, min(len(a), len(b)) // ID_BYTES
    while low < high:  # all of [0, low) is equal, nothing from `high` on is known to be
        middle = (low + high + 1) // 2
        if a[low * ID_BYTES : middle * ID_BYTES] == b[low * ID_BYTES : middle * ID_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low


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
    children: list[Node] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.packed) // ID_BYTES

    @property
    def end(self) -> int:
        return self.begin + self.length


class PrefixTree:
    """The nodes that have a place in the pool."""

    def __init__(self) -> None:
        self._roots: list[Node] = []
        self._clock = 0
        self._count = 0

    def match(self, packed: bytes) -> list[Node]:
        """Nodes that `packed` goes through, from the root. Its last token is never in one."""
        chain: list[Node] = []
        last = len(packed) // ID_BYTES - 1
        children = self._roots
        while True:
            at = chain[-1].end if chain else 0
            fitting = [
                node
                for node in children
                if node.end <= last and packed.startswith(node.packed, at * ID_BYTES)
            ]
            if not fitting:
                return chain
            chain.append(max(fitting, key=lambda node: node.length))
            children = chain[-1].children

    def add(self, packed: bytes, parent: Node | None, offset: int) -> Node:
        """A new node of the tokens `packed` below `parent`."""
        self._count += 1
        begin = parent.end if parent else 0
        node = Node(number=self._count, packed=packed, parent=parent, begin=begin, offset=offset)
        if parent is None:
            self._roots.append(node)
        else:
            parent.children.append(node)
            parent.users += 1
        self.touch([node])
        return node

    def remove(self, node: Node) -> None:
        assert not node.users
        (node.parent.children if node.parent else self._roots).remove(node)
        if node.parent is not None:
            node.parent.users -= 1

    def touch(self, chain: Iterable[Node]) -> None:
        self._clock += 1
        for node in chain:
            node.used_at = self._clock

    def unused(self, spared: Sequence[Node] = ()) -> Node | None:
        """The node that nothing stands on and that was used the longest time ago."""
        free = [node for node in self.nodes() if not node.users and node not in spared]
        return min(free, key=lambda node: node.used_at, default=None)

    def nodes(self) -> list[Node]:
        found = []
        waiting = list(self._roots)
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting += node.children
        return found


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
    lengths = []
    for other in others:
        common = min(common_tokens(packed, other), last, len(other) // ID_BYTES - 1)
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
