"""How many prompt tokens a run has to compute, before anything is loaded but the tokenizer.

Owns the sampling of records, the estimate with its error bar, and the exact count. A prompt is cut
in two where the question begins to matter: what comes before is its prefix, which equal contexts
share. The worker's engine finds the exact prefixes; this says what to expect of it.

The estimates are regressions of tokens on bytes (Cochran, Sampling Techniques, 3rd ed., ch. 7),
because the bytes of all records are known. Nothing here decides what is sent.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ragfleet.engines.protocol import PromptSettings
from ragfleet.errors import InputError
from ragfleet.index import read_lines
from ragfleet.model_files import context_limit
from ragfleet.plan import BYTES_PER_TOKEN, Plan
from ragfleet.planning import Indexed, cost_model
from ragfleet.preparation import Preparation
from ragfleet.prompts import RecordPromptError, build_messages
from ragfleet.records import Head, LazyRecord, parse_head

if TYPE_CHECKING:
    from ragfleet.tokens import PromptTokenizer

SAMPLED: Final = 256
"""Requests, and as many prefix groups; all of them where there are no more."""
_PROGRESS_EVERY: Final = 1 << 10
_SEED: Final = 0
_CONFIDENCE: Final = 1.96
"""Standard errors in an error bar: 95 %."""
_TOKENISED: Final = np.dtype(
    [
        ("prefix_bytes", "<f8"),
        ("suffix_bytes", "<f8"),
        ("tokens", "<f8"),
        ("prefix_tokens", "<f8"),
        ("too_long", "<f8"),
        ("fails", "<f8"),
    ]
)
_OTHER_QUESTION: Final = "\N{REFERENCE MARK}"
"""Begins like no question: what a prompt has in common with this one's is its prefix."""


@dataclass(frozen=True)
class Estimate:
    """A total; 95 times of 100 within `error`. 0 says that it was counted."""

    total: float
    error: float

    def __str__(self) -> str:
        if not self.error:
            return f"{self.total:,.0f}"
        digits = max(0, len(f"{self.error:.0f}") - 2)
        return f"{round(self.total, -digits):,.0f} ± {round(self.error, -digits):,.0f}"

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.total + other.total, float(np.hypot(self.error, other.error)))


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Prompt tokens of the requests of a plan.

    Attributes:
        prompts: of all prompts, nothing shared.
        shared: each distinct prefix once, what all prompts begin with once a worker.
        planned: as the chunks lie: a prefix again in each chunk that needs it.
        num_too_long: requests whose prompt and answer the model does not take (None: no limit is
            known).
            Without --truncate_context they fail, and count in none of the sums.
        num_sampled: prompts that were tokenised; `is_exact` says that it was all of them.
        num_failing: requests whose prompt can't be made; `first_failure` says why. They count in
            none of the sums.
    """

    prompts: Estimate
    shared: Estimate
    planned: Estimate
    num_too_long: Estimate | None
    num_sampled: int
    is_exact: bool
    num_failing: Estimate = Estimate(0.0, 0.0)
    first_failure: str | None = None


def total_of(
    x: NDArray[np.float64], y: NDArray[np.float64], num_all: int, x_all: float
) -> Estimate:
    """The total of y over `num_all` units whose x sum to `x_all`, from a sample of (x, y)."""
    num = len(y)
    if num >= num_all:
        return Estimate(float(y.sum()), 0.0)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy) / float(dx @ dx) if float(dx @ dx) else 0.0
    total = num_all * (float(y.mean()) + slope * (x_all / num_all - float(x.mean())))
    residual = dy - slope * dx
    variance = float(residual @ residual) / max(1, num - 2)
    error = num_all * np.sqrt((1 - num / num_all) * variance / num)
    return Estimate(total, _CONFIDENCE * float(error))


class Prefixes:
    """Tokenises records as the worker will, each prompt in two parts."""

    def __init__(
        self, tokenizer: PromptTokenizer, settings: PromptSettings, most_tokens: int | None = None
    ) -> None:
        """`most_tokens`: of a prompt that does not fail; None: none fails for its length."""
        self._tokenizer, self._settings, self._most = tokenizer, settings, most_tokens
        self._num_special = {adds: len(tokenizer.encode("", adds)) for adds in (False, True)}
        self._prefix, self._prefix_tokens = "", 0

    def split(self, line: bytes) -> tuple[int, int, str]:
        """(tokens, tokens of its prefix, the prefix) of one prompt. Raises RecordPromptError."""
        head, record = _parse(line)
        prompt, adds = self._render(head, record, head.query)
        if (least := self._tokenizer.tokens_far_above(self._most, prompt)) is not None:
            return least, 0, ""
        other, _ = self._render(head, record, _OTHER_QUESTION)
        common = _common_prefix(prompt, other)
        offsets = self._tokenizer.offsets(prompt)
        num_special = self._num_special[adds]
        prefix = bisect.bisect_right(offsets, common, key=lambda span: span[1])
        cut = offsets[prefix][0] if prefix < len(offsets) else len(prompt)
        return len(offsets) + num_special, prefix + num_special, prompt[:cut]

    def split_next(self, line: bytes) -> tuple[int, int]:
        """(tokens, tokens of its prefix); a prefix that the last one had too is not read again."""
        head, record = _parse(line)
        prompt, _ = self._render(head, record, head.query)
        if self._prefix and prompt.startswith(self._prefix):
            if (least := self._tokenizer.tokens_far_above(self._most, prompt)) is not None:
                return least, 0
            rest = self._tokenizer.encode(prompt[len(self._prefix) :], False)
            return self._prefix_tokens + len(rest), self._prefix_tokens
        tokens, self._prefix_tokens, self._prefix = self.split(line)
        return tokens, self._prefix_tokens

    def num_tokens_within(self, prompt: str, num_characters: int) -> int:
        """Tokens of a prompt that end within its first characters, special ones included."""
        offsets = self._tokenizer.offsets(prompt)
        num_special = self._num_special[self._tokenizer.chat_template is None]
        return num_special + bisect.bisect_right(offsets, num_characters, key=lambda span: span[1])

    def _render(self, head: Head, record: LazyRecord, query: str) -> tuple[str, bool]:
        messages = build_messages(
            self._settings, record, query, head.context, head.retrieval_method
        )
        return self._tokenizer.render(messages, self._settings)


class PrefillSample:
    """Tokenised records of a run, from which a plan of it is estimated."""

    def __init__(
        self, preparation: Preparation, indexed: Indexed, to_do: NDArray[np.bool_]
    ) -> None:
        """Reads and tokenises the sample. Raises ModelError."""
        from ragfleet.tokens import load_tokenizer

        assert preparation.model_dir is not None
        config = preparation.config
        self._indexed = indexed
        limit = config.max_model_len or context_limit(preparation.model_dir)
        self._most_tokens = None if limit is None else limit - config.max_new_tokens
        self._truncates = config.truncate_context != "error"
        self._prefixes = Prefixes(
            load_tokenizer(preparation.model_dir),
            preparation.prompts,
            None if self._truncates else self._most_tokens,
        )
        self._rows = np.flatnonzero(to_do)
        group = indexed.index.grouping["group"][self._rows]
        self._leads = self._rows[np.unique(group, return_index=True)[1]]
        draw = np.random.default_rng(_SEED)
        self._first_failure: str | None = None
        self._requests, prefixes = self._tokenise(_drawn(draw, self._rows))
        self._groups, more = self._tokenise(_drawn(draw, self._leads))
        self._common_tokens = self._count_common(prefixes + more)

    @property
    def bytes_per_token(self) -> float:
        """Of prompts that are sent whole, apart from what all of them begin with."""
        requests = self._requests[
            (self._requests["too_long"] == 0) & (self._requests["fails"] == 0)
        ]
        if not len(requests):
            return BYTES_PER_TOKEN
        tokens = float(requests["tokens"].sum()) - self._common_tokens * len(requests)
        num_bytes = float(requests["prefix_bytes"].sum() + requests["suffix_bytes"].sum())
        return float(np.clip(num_bytes / max(tokens, 1.0), 0.5, 20.0))

    @property
    def most_tokens(self) -> float:
        """Of a prompt that the model takes."""
        return np.inf if self._most_tokens is None else max(0, self._most_tokens)

    def estimate(self, plan: Plan) -> Prefill:
        """Of a plan of these requests."""
        all_of_them, sample = self._indexed.index.grouping[self._rows], self._requests
        prefix_bytes = float(all_of_them["prefix_bytes"].sum())
        suffix_bytes = float(all_of_them["suffix_bytes"].sum())
        num_all = len(self._rows)
        prompts = total_of(
            sample["prefix_bytes"] + sample["suffix_bytes"],
            sample["tokens"],
            num_all,
            prefix_bytes + suffix_bytes,
        )
        rests = sample["tokens"] - sample["prefix_tokens"]
        rest = total_of(sample["suffix_bytes"], rests, num_all, suffix_bytes)
        rest += Estimate(float(self._common_of(plan, prompts)), 0.0)
        too_long = None
        if self._most_tokens is not None:
            too_long = total_of(np.zeros(len(sample)), sample["too_long"], num_all, 0.0)
        return Prefill(
            prompts=prompts,
            shared=self._prefixes_of(self._leads) + rest,
            planned=self._prefixes_of(plan.order[plan.leads]) + rest,
            num_too_long=too_long,
            num_sampled=len(sample),
            is_exact=len(sample) == num_all,
            num_failing=total_of(np.zeros(len(sample)), sample["fails"], num_all, 0.0),
            first_failure=self._first_failure,
        )

    def count(self, plan: Plan, on_progress: Callable[[int], None] | None = None) -> Prefill:
        """The same, by tokenising every request, each distinct context once."""
        group = self._indexed.index.grouping["group"][plan.order]
        by_group = np.argsort(group, kind="stable")  # static plans have groups apart
        order, groups = plan.order[by_group], group[by_group].tolist()
        prompts = rests = num_too_long = num_failing = 0
        first_failure = None
        prefix_of: dict[int, int] = {}
        for number, (key, line) in enumerate(zip(groups, self._lines(order), strict=True)):
            if on_progress is not None and number and number % _PROGRESS_EVERY == 0:
                on_progress(number)
            try:
                tokens, prefix = self._prefixes.split_next(line)
            except RecordPromptError as error:
                num_failing += 1
                first_failure = first_failure or str(error)
                continue
            tokens, prefix, is_too_long = self._fitted(tokens, prefix)
            num_too_long += is_too_long
            if tokens:
                prompts, rests = prompts + tokens, rests + tokens - prefix
                prefix_of[key] = prefix
        common = self._common_tokens
        rests += self._common_of(plan, Estimate(prompts, 0.0))
        again = group[plan.leads].tolist()
        return Prefill(
            prompts=Estimate(prompts, 0.0),
            shared=Estimate(rests + sum(n - common for n in prefix_of.values()), 0.0),
            planned=Estimate(rests + sum(prefix_of.get(k, common) - common for k in again), 0.0),
            num_too_long=None if self._most_tokens is None else Estimate(num_too_long, 0.0),
            num_sampled=len(order),
            is_exact=True,
            num_failing=Estimate(num_failing, 0.0),
            first_failure=first_failure,
        )

    def _common_of(self, plan: Plan, prompts: Estimate) -> int:
        """What all prompts begin with, once for each worker that has any."""
        num_workers = len(np.unique(plan.chunks["slice"]))
        return self._common_tokens * num_workers if prompts.total else 0

    def _prefixes_of(self, rows: NDArray[Any]) -> Estimate:
        """Tokens of the prefixes of these rows, one row for each prefill, the common part apart."""
        own = np.maximum(self._groups["prefix_tokens"] - self._common_tokens, 0)
        total_bytes = float(self._indexed.index.grouping["prefix_bytes"][rows].sum())
        return total_of(self._groups["prefix_bytes"], own, len(rows), total_bytes)

    def _tokenise(self, rows: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
        """[n] of _TOKENISED, and the text of each prefix."""
        grouping = self._indexed.index.grouping
        found, prefixes = [], []
        for row, line in zip(rows.tolist(), self._lines(rows), strict=True):
            fails = False
            try:
                tokens, prefix, text = self._prefixes.split(line)
            except RecordPromptError as error:
                tokens, prefix, text, fails = 0, 0, "", True
                self._first_failure = self._first_failure or str(error)
            sizes = grouping[row]
            fitted = self._fitted(tokens, prefix)
            found.append((sizes["prefix_bytes"], sizes["suffix_bytes"], *fitted, fails))
            prefixes += [text] if text else []
        return np.array(found, _TOKENISED), prefixes

    def _fitted(self, tokens: int, prefix: int) -> tuple[int, int, bool]:
        """What is computed of a prompt: nothing of one that fails, less of one that is cut."""
        most = self._most_tokens
        if most is None or tokens <= most:
            return tokens, prefix, False
        return (most, min(most, prefix), True) if self._truncates else (0, 0, True)

    def _lines(self, rows: NDArray[Any]) -> Iterator[bytes]:
        records = self._indexed.index.records[rows]
        fd = os.open(self._indexed.index.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield from read_lines(fd, records["offset"], records["length"])
        finally:
            os.close(fd)

    def _count_common(self, prefixes: list[str]) -> int:
        """Tokens with which all prompts begin, whatever their context."""
        distinct = list(dict.fromkeys(prefixes))
        if len(distinct) < 2:
            return 0
        common = min(_common_prefix(distinct[0], other) for other in distinct[1:])
        return self._prefixes.num_tokens_within(distinct[0], common)


def plan_requests(
    preparation: Preparation,
    indexed: Indexed,
    to_do: NDArray[np.bool_],
    exact: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Plan, Prefill | None]:
    """The plan of these requests, and what it costs in prompt tokens where that can be told.

    Args:
        exact: count all prompts.
        on_progress: called now and then with how many are counted.

    Raises:
        InputError: not one prompt of the run can be made.
    """
    sample = None
    if to_do.any() and can_tokenise(preparation):
        sample = PrefillSample(preparation, indexed, to_do)
        costs = cost_model(preparation, sample.bytes_per_token, sample.most_tokens)
    else:
        costs = cost_model(preparation)
    plan = indexed.plan(to_do, preparation.config.schedule, costs)
    if sample is None:
        return plan, None
    prefill = sample.count(plan, on_progress) if exact else sample.estimate(plan)
    # Where answers are there already, what remains gets its failure rows, so that it can be merged.
    is_all = prefill.is_exact and int(to_do.sum()) == int(indexed.requests.sum())
    if is_all and prefill.num_failing.total == len(plan.order):
        why = str(prefill.first_failure).removesuffix(".")
        raise InputError(
            f"Not one of the {len(plan.order):,} prompts can be made; the first: {why}. See"
            " --prompt_template and the fields of the records (ragfleet show)."
        )
    return plan, prefill


def can_tokenise(preparation: Preparation) -> bool:
    """Whether prompts are known before a worker starts, and torch isn't needed for them."""
    folder = preparation.model_dir
    is_ours = preparation.inference_class is None and preparation.engine != "echo"
    return is_ours and folder is not None and (folder / "tokenizer.json").is_file()


def _drawn(draw: np.random.Generator, rows: NDArray[Any]) -> NDArray[Any]:
    """A sample without repetition, in file order."""
    if len(rows) <= SAMPLED:
        return rows
    return np.sort(draw.choice(rows, SAMPLED, replace=False))


def _parse(line: bytes) -> tuple[Head, LazyRecord]:
    head = parse_head(line)
    if not isinstance(head, Head):
        raise RecordPromptError("the input was edited meanwhile")
    return head, LazyRecord(line)


def _common_prefix(one: str, other: str) -> int:
    """Characters that two texts begin with together, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low
