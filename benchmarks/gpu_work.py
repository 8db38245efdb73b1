"""What the arms of `gpu.py` are measured on: shapes of models, prompts of random ids, and what they
need at least.

Pure: no torch, no clock. A cell's prompts have a common head, a context that `share` of them have
in common, and a question of their own; random weights never end an answer, so each request says how
long its answer is (`answer_tokens`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from ragfleet.engines.protocol import Prepared, Request
from workloads import grouped

STEP_TOKENS: Final = 256
"""Prompt tokens whose reading costs about what one more token of an answer costs plain generation:
what the time of a sample is scaled to all requests by."""
TURN_IDS: Final = 101
"""Ids of a turn are so many further on: no multiple of it brings a small vocabulary round again."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape."""

    arch: str = "llama"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    initializer_range: float = 0.02
    """Large enough that the next token depends on the prompt, small enough for bf16."""
    requests: int = 16
    """Of a cell whose contexts are short; a quarter of it where they are long."""

    @property
    def layer_weights(self) -> int:
        """Of the matrix products of one layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def kv_weights(self) -> int:
        """Of a layer's keys and values: all that its last layer needs for a prompt's token."""
        return 2 * self.hidden * self.head_dim * self.kv_heads

    @property
    def step_weights(self) -> int:
        """That one step of decoding reads."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


SIZES: Final = {
    "1b": Size(  # Llama 3.2 1B's shape
        hidden=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        intermediate=8192,
        vocab=128_256,
        tied=True,
        initializer_range=0.03,
        requests=512,
    ),
    "8b": Size(  # Llama 3.1 8B's shape
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14_336,
        vocab=128_256,
        requests=256,
    ),
    "tiny": Size(
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        vocab=512,
        initializer_range=0.2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table. Lengths in tokens; equal cells have equal prompts."""

    share: int
    """Requests of one context."""
    context_tokens: int
    num_requests: int
    """Of which as many are made as whole groups have."""
    head_tokens: int = 80
    question_tokens: tuple[int, int] = (8, 40)
    answer_tokens: tuple[int, int] = (64, 128)
    seed: int = 0

    @property
    def most_tokens(self) -> int:
        """Of a prompt with its answer."""
        context = self.context_tokens + self.context_tokens // 10
        return self.head_tokens + context + self.question_tokens[1] + self.answer_tokens[1]


def make_requests(cell: Cell, vocab: int) -> list[Prepared]:
    """Groups side by side. Contexts vary by a tenth, so that they end at no block's edge."""
    rng = random.Random(cell.seed)

    def ids(count: int) -> list[int]:
        return rng.choices(range(3, vocab), k=count)

    head = ids(cell.head_tokens)
    requests: list[Prepared] = []
    while len(requests) < cell.num_requests // cell.share * cell.share:
        spread = cell.context_tokens // 10
        context = ids(cell.context_tokens + rng.randint(-spread, spread))
        name = f"context {len(requests) // cell.share}"
        for _ in range(cell.share):
            number = len(requests)
            request = Request(
                key=number.to_bytes(16, "big"),
                query=f"question {number}",
                context=name,
                retrieval_method=None,
                record={"answer_tokens": rng.randint(*cell.answer_tokens)},
            )
            prompt = head + context + ids(rng.randint(*cell.question_tokens))
            requests.append(Prepared(request=request, prompt="", token_ids=prompt))
    return requests


def in_other_ids(requests: Sequence[Prepared], turn: int, vocab: int) -> list[Prepared]:
    """The same lengths and the same in common, in ids that no cache knows of an earlier turn."""
    others = []
    for request in requests:
        key = (turn << 32 | int.from_bytes(request.key, "big")).to_bytes(16, "big")
        ids = 3 + (np.array(request.token_ids) - 3 + turn * TURN_IDS) % (vocab - 3)
        others.append(
            Prepared(
                request=msgspec.structs.replace(request.request, key=key),
                prompt="",
                token_ids=ids.tolist(),
            )
        )
    return others


def answer_tokens(prepared: Prepared) -> int:
    length: int = prepared.request.record["answer_tokens"]
    return length


def sample(requests: Sequence[Prepared], count: int, group: int, turn: int = 0) -> list[Prepared]:
    """At least `count` requests in whole groups, from all over; others in each `turn`."""
    groups = [requests[at : at + group] for at in range(0, len(requests), group)]
    wanted = min(len(groups), -(-count // group))
    picked = {(number * len(groups) // wanted + turn) % len(groups) for number in range(wanted)}
    return [request for number in sorted(picked) for request in groups[number]]


def work(requests: Sequence[Prepared]) -> int:
    return sum(len(r.token_ids) + STEP_TOKENS * answer_tokens(r) for r in requests)


# ---- the limit


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device was measured to do."""

    flops: float
    """Per second, of a large matrix product."""
    bytes_per_s: float
    """Read and written by a large copy."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Least seconds for a cell's answers."""

    arithmetic_s: float
    traffic_s: float

    @property
    def seconds(self) -> float:
        """Both can go on at the same time, so it is the longer one: nothing can be faster."""
        return max(self.arithmetic_s, self.traffic_s)


def roofline(
    size: Size, requests: Sequence[Prepared], machine: Machine, *, slots: int, itemsize: int
) -> Roofline:
    """Each token that several prompts begin with read once, keys and values of a context once in a
    step for all that stand on it, the weights once in a step of `slots` answers."""
    answers = [answer_tokens(request) for request in requests]
    new = positions = 0
    for length, common in _new_tokens(requests):
        new += length - common
        positions += (length * (length + 1) - common * (common + 1)) // 2
    for request, count in zip(requests, answers, strict=True):
        positions += count * len(request.token_ids) + count * count // 2
    linear = new * (size.layer_weights * (size.layers - 1) + size.kv_weights)
    linear += sum(answers) * size.step_weights
    attention = 2 * size.heads * size.head_dim * size.layers * positions
    steps = max(*answers, -(-sum(answers) // slots))
    traffic = steps * size.step_weights
    traffic += size.kv_values_per_token * _tokens_seen(requests)
    return Roofline(
        arithmetic_s=2 * (linear + attention) / machine.flops,
        traffic_s=itemsize * traffic / machine.bytes_per_s,
    )


def _new_tokens(requests: Sequence[Prepared]) -> Iterator[tuple[int, int]]:
    """(length, begin it has in common with another one) of each prompt."""
    before: list[int] = []
    for prompt in sorted(list(request.token_ids) for request in requests):
        pairs = zip(before, prompt, strict=False)
        shorter = min(len(before), len(prompt))
        yield len(prompt), next((n for n, (a, b) in enumerate(pairs) if a != b), shorter)
        before = prompt


def _tokens_seen(requests: Sequence[Prepared]) -> int:
    """Tokens whose keys and values all steps together read, those of a group once in a step."""
    seen = 0
    groups: dict[str, list[Prepared]] = {}
    for request in grouped(requests):
        groups.setdefault(request.request.context, []).append(request)
    for group in groups.values():
        prompts = [group[0].token_ids, *(request.token_ids for request in group[1:])]
        common = len(group[0].token_ids)
        for prompt in prompts[1:]:
            pairs = zip(prompts[0], prompt, strict=False)
            common = next((n for n, (a, b) in enumerate(pairs) if a != b or n >= common), common)
        seen += common * max(answer_tokens(request) for request in group)
        for request in group:
            count = answer_tokens(request)
            seen += count * (len(request.token_ids) - common) + count * count // 2
    return seen
