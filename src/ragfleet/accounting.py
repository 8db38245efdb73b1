"""What a run with a remote API has cost and may still cost: tokens and money.

Owns the estimate before a run and the sums over its shards. Prices are the user's; nothing here
knows a currency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ragfleet.planning import Finished, Indexed
from ragfleet.records import parse_sent
from ragfleet.remote.ledger import budget_of
from ragfleet.remote.ledger_file import NAME, write_ledger
from ragfleet.remote.spec import RemoteSpec

_BYTES_PER_TOKEN: Final = (2.5, 4.5)
"""The two ends of an estimate: dense text and plain English. Only the server has the tokenizer."""
_SAMPLE: Final = 512
_OVERHEAD_BYTES: Final = 60
"""Of a request beside its texts: roles, heading."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


_decode_usage = msgspec.json.Decoder(_Usage).decode


def spent_tokens(finished: Finished) -> tuple[float, float]:
    """(prompt, completion) tokens of all lines that count in the shards."""
    prompt = completion = 0
    answers = finished.winners.answers
    for number, path in enumerate(finished.winners.paths):
        mine = answers[answers["shard"] == number]
        with open(path, "rb") as file:
            for offset, length in zip(
                mine["offset"].tolist(), mine["length"].tolist(), strict=True
            ):
                file.seek(offset)
                usage = _decode_usage(file.read(length))
                prompt += usage.prompt_tokens or 0
                completion += usage.completion_tokens or 0
    return float(prompt), float(completion)


def begin_account(
    directory: Path, remote: RemoteSpec, indexed: Indexed, finished: Finished
) -> None:
    """Write a launch's account; limits of totals hold for all starts of a run together."""
    spent = (0.0, 0.0)
    if remote.max_cost is not None or remote.max_tokens_total is not None:
        spent = spent_tokens(finished)
    directory.mkdir(parents=True, exist_ok=True)
    write_ledger(directory / NAME, budget_of(remote), spent)


def estimate_lines(
    remote: RemoteSpec,
    indexed: Indexed,
    to_do: NDArray[np.bool_],
    max_new_tokens: int,
    system_prompt: str,
) -> list[str]:
    """What the requests of `to_do` will take: tokens, and money where prices are given."""
    rows = np.flatnonzero(to_do)
    if not len(rows):
        return ["nothing is left to send"]
    records = indexed.index.records
    sample = rows[np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLE)).astype(int)]
    overhead = len(system_prompt.encode()) + _OVERHEAD_BYTES
    mean = _mean_bytes(Path(indexed.selection.contexts_file), records[sample]) + overhead
    total = mean * len(rows)
    high, low = (total / size for size in _BYTES_PER_TOKEN)
    answers = len(rows) * max_new_tokens
    lines = [
        f"{len(rows):,} requests; prompts {_short(low)} to {_short(high)} tokens, answers at most"
        f" {_short(answers)}"
    ]
    if remote.price_in is not None or remote.price_out is not None:
        lines.append(
            f"cost {remote.cost(low, 0):,.2f} (prompts alone, at least) to"
            f" {remote.cost(high, answers):,.2f} (all answers at --max_new_tokens)"
        )
    for limit, worst, flag in (
        (remote.max_cost, remote.cost(high, answers), "max_cost"),
        (remote.max_tokens_total, high + answers, "max_tokens_total"),
    ):
        if limit is not None and worst > limit:
            lines.append(f"--{flag} {limit:,} may stop the run before its end")
    minutes = [
        needed / rate
        for needed, rate in (
            (len(rows), remote.requests_per_minute),
            ((low + high) / 2 + answers, remote.tokens_per_minute),
        )
        if rate is not None
    ]
    if minutes and remote.api_mode == "realtime":
        lines.append(f"the rate limits alone make it {max(minutes):,.1f} minutes")
    return lines


def _mean_bytes(contexts_file: Path, records: NDArray[Any]) -> float:
    sizes = []
    with open(contexts_file, "rb") as file:
        for offset, length in zip(
            records["offset"].tolist(), records["length"].tolist(), strict=True
        ):
            file.seek(offset)
            _, query, context, _ = parse_sent(file.read(length))
            sizes.append(len(query.encode()) + len(context.encode()))
    return sum(sizes) / len(sizes)


def _short(count: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"
