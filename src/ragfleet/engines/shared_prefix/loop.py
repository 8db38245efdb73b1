"""The loop: submitted requests in, outcomes out, one pass after the other.

Owns what happens between a pass of the scheduler and a row's outcome. Where a pass fails, the
requests in it go to the plain loop, which tries them one by one; see `SharedPrefixLoop.step`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from ragfleet.engines.batched import BatchedLoop, give_memory_back
from ragfleet.engines.decoding import Row, RowEnder, TokenChooser, not_finite, outcome_of
from ragfleet.engines.protocol import EngineSpec, Failure, Outcome, Prepared, RequestKey
from ragfleet.engines.shared_prefix.cache import Shape, limits_within
from ragfleet.engines.shared_prefix.decoder import BURST_STEPS, Decoder
from ragfleet.engines.shared_prefix.forward import Forward
from ragfleet.engines.shared_prefix.scheduler import Limits, Pass, Scheduler
from ragfleet.engines.shared_prefix.support import ready
from ragfleet.engines.shared_prefix.ways import Cache, Unsupported, Way, way_of
from ragfleet.errors import ModelError
from ragfleet.tokens import PromptTokenizer

log = logging.getLogger(__name__)

LOOKAHEAD: Final = 2
"""Waiting requests per slot: enough to see the end of a group, and what the next ones share."""
MOST_FAILURES: Final = 3
"""So many failed passes, and all further requests take the plain loop."""
MOST_HELD: Final = 16
"""So many prompts for which the cache has to go are held, then slots run empty for them."""
Step = tuple[Sequence[int], Sequence[int]]
"""By slot: a token, and whether its logits were not finite."""
Found = tuple[Sequence[int], Sequence[Row], Sequence[Step]]
"""Slots, their rows, and the tokens of each step."""


class SharedPrefixLoop:
    """`protocol.Engine` without loading and preparing."""

    def __init__(
        self,
        spec: EngineSpec,
        way: Way,
        forward: Forward,
        shape: Shape,
        limits: Limits,
        tokenizer: PromptTokenizer,
        stops: tuple[str, ...],
        max_model_len: int | None,
        plain: BatchedLoop,
        on_tokens: Callable[[int], None],
    ) -> None:
        self._spec = spec
        self._max_model_len = max_model_len
        self._way = way
        self._forward = forward
        self._tokenizer = tokenizer
        self._stops = stops
        self._plain = plain
        self._on_tokens = on_tokens
        self._scheduler = Scheduler(limits)
        self._chooser = TokenChooser(spec.sampling)
        self._shape = shape
        self._cache: Cache | None = None
        self._decoder: Decoder | None = None
        self._num_bytes = self._make_cache().num_bytes
        self._aborted: set[RequestKey] = set()
        self._ender = RowEnder(tokenizer, stops, self._aborted.__contains__)
        self._rows: dict[RequestKey, Row] = {}
        self._last_tokens: dict[int, int] = {}
        self._num_failures = 0
        self._needs_room = False
        """Plain batches have run out of memory beside the cache."""
        self._has_lacked_memory = False
        """The cache could not be made again at least once."""
        self._timeout_s = spec.request_timeout_s or math.inf
        self._way_notes = way.begin(spec)
        self.batch_size = limits.num_slots
        plain.make_room = self._make_room

    @property
    def notes(self) -> list[str]:
        """Lines for the log."""
        limits = self._scheduler.limits
        notes = [
            f"shared prefixes are read once: {limits.num_slots} slots and {limits.pool_tokens:,}"
            f" pooled tokens, {self._num_bytes:,} bytes of keys and values"
        ]
        if self._forward.why_not_packed is not None:
            notes.append(f"the weights are not packed: {self._forward.why_not_packed}")
        return notes + self._forward.notes + self._way_notes

    @property
    def degraded(self) -> str | None:
        """What is slower than it could be here, for the end statistics."""
        return "; ".join(self._way_notes) or None

    def refusal(self, prepared: Prepared) -> Failure | None:
        """Why a prompt is not for the budget that was asked for."""
        num_tokens = len(prepared.token_ids)
        if self._spec.kv_cache_bytes is None or self._scheduler.fits(num_tokens):
            return None
        return Failure(
            key=prepared.key,
            error_type="too_long",
            error=f"the prompt has {num_tokens} tokens; --kv_cache_bytes"
            f" {self._spec.kv_cache_bytes} has room for the keys and values of"
            f" {self._scheduler.limits.pool_tokens} beside those of the answers",
        )

    @property
    def _is_plain(self) -> bool:
        return self._num_failures >= MOST_FAILURES

    def has_room(self, prepared: Prepared) -> bool:
        if self._needs_room and self._plain.num_waiting >= MOST_HELD and not self._is_plain:
            return False
        if self._is_plain or not self._scheduler.fits(len(prepared.token_ids)):
            return self._plain.has_room(prepared)
        return self._scheduler.num_waiting < LOOKAHEAD * self.batch_size

    def submit(self, prepared: Prepared) -> None:
        # What is too long for the budget that was chosen here is answered all the same.
        if self._is_plain or not self._scheduler.fits(len(prepared.token_ids)):
            self._plain.submit(prepared)
            return
        self._rows[prepared.key] = Row(prepared)
        self._scheduler.submit(prepared.key, prepared.token_ids)

    def step(self, timeout_s: float) -> list[Outcome]:
        """Passes until a request is finished, or `timeout_s` is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._plain.has_work and not self._holds_plain:
                return self._plain_step(timeout_s)
            outcomes = self._pass()
            if outcomes or not self._rows or time.monotonic() > deadline_s:
                return outcomes

    def abort(self, key: RequestKey) -> None:
        if self._scheduler.drop(key):
            del self._rows[key]
        elif key in self._rows:
            self._aborted.add(key)
        else:
            self._plain.abort(key)

    def close(self) -> None:
        if self._scheduler.read_tokens:
            log.info(self.summary())
        self._rows.clear()
        self._plain.close()

    def summary(self) -> str:
        done = self._scheduler
        rest = "the rest was shared"
        if done.read_tokens > done.prompt_tokens:
            rest = "some of them again or for plain batches"
        return (
            f"read {done.read_tokens:,} of {done.prompt_tokens:,} prompt tokens, {rest};"
            f" {self._num_bytes:,} bytes of keys and values, at most {done.peak_pool_tokens:,} of"
            f" {done.limits.pool_tokens:,} pooled tokens in use"
        )

    # ---- plain batches

    @property
    def _holds_plain(self) -> bool:
        """Whether plain batches wait until nothing stands in the cache, as it has to go for them:
        else each would have all slots begin anew."""
        scheduler = self._scheduler
        is_idle = not scheduler.num_admitted and not scheduler.num_waiting
        return self._needs_room and self._cache is not None and not is_idle

    def _plain_step(self, timeout_s: float) -> list[Outcome]:
        started_s = time.monotonic()
        if self._needs_room:
            self._make_room()
        with self._forward.plain():
            outcomes = self._plain.step(timeout_s)
        # Those in slots stood still for a prompt that is not theirs.
        waited_s = time.monotonic() - started_s
        for row in self._rows.values():
            row.deadline_s += waited_s
        return outcomes

    def _make_room(self) -> None:
        """For a prompt that the memory left beside the cache is too small for: what was admitted
        begins anew after it. Once: those that come later are held."""
        self._needs_room |= self._cache is not None
        for key in self._scheduler.take_back():
            prepared = self._rows.pop(key).prepared
            if key in self._aborted:
                self._aborted.discard(key)
            else:
                self.submit(prepared)
        self._drop_cache()

    def _make_cache(self) -> Cache:
        cache = self._way.make_cache(self._shape, self._scheduler.limits)
        if self._way.make_decoder is not None:
            self._decoder = self._way.make_decoder(self._forward, cache, self._chooser)
        self._cache = cache
        return cache

    def _could_make_cache(self) -> bool:
        """False where somebody else has its memory by now: what waits goes in plain batches, and
        the next pass tries again."""
        try:
            self._make_cache()
            return True
        except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no error of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        keys = self._scheduler.take_waiting()
        what = "plain batches at times, for want of memory for keys and values"
        log.warning("%s: %d requests, %s", what, len(keys), reason)
        if self._spec.degrade is not None and not self._has_lacked_memory:
            self._spec.degrade(what)
        self._has_lacked_memory = True
        self._leave_to_plain(keys)
        return False

    def _drop_cache(self) -> None:
        """Plain batches need the memory; nothing in it is wanted any more."""
        if self._cache is None:
            return
        self._cache = self._decoder = None
        # A decoder and its steps hold each other.
        give_memory_back(on_gpu=self._shape.device.type == "cuda")

    # ---- a pass

    def _pass(self) -> list[Outcome]:
        if self._cache is None and self._scheduler.num_waiting and not self._could_make_cache():
            return []
        scheduled = self._scheduler.next_pass()
        if not scheduled.num_tokens:
            return []
        try:
            if self._decoder is not None and not scheduled.runs:
                slots, rows, steps = self._decode(self._decoder, scheduled)
            else:
                slots, rows, steps = self._read(scheduled)
        except Exception as error:  # a model's forward can raise anything
            message = f"{type(error).__name__}: {error}"
        else:
            return self._take(slots, rows, steps) if slots else []
        self._fall_back(message)
        return []

    def _rows_of(self, slots: Sequence[int]) -> list[Row]:
        return [self._rows[self._scheduler.key_of(slot)] for slot in slots]

    def _read(self, scheduled: Pass) -> Found:
        """One forward, and a token for each slot."""
        tensors = self._way.make_pass(scheduled, self._last_tokens, self._cache, None)
        logits = self._forward(tensors)
        self._on_tokens(sum(len(run.token_ids) for run in scheduled.runs))
        if not tensors.slots:
            return [], [], []
        rows = self._rows_of(tensors.slots)
        found = torch.stack((self._chooser.choose(logits, rows), not_finite(logits).long()))
        tokens, broken = found.tolist()  # one transfer from the device
        return tensors.slots, rows, [(tokens, broken)]

    def _decode(self, decoder: Decoder, scheduled: Pass) -> Found:
        """Several tokens of slots that all decode. Those that are at --max_new_tokens before the
        others drop the rest, as at an end marker, while their slots have room for it."""
        slots = [row.slot for row in scheduled.rows]
        rows = self._rows_of(slots)
        left = self._spec.sampling.max_new_tokens - min(row.num_tokens for row in rows)
        steps = min(BURST_STEPS, left, self._room(scheduled))
        is_greedy = self._chooser.is_greedy
        draws = [] if is_greedy else [self._chooser.draw(rows) for _ in range(steps)]
        self._scheduler.advance(steps - 1)
        return slots, rows, decoder.decode(scheduled.rows, self._last_tokens, steps, draws)

    def _room(self, scheduled: Pass) -> int:
        """Tokens that each row can decode without leaving its slot, or the positions that the model
        has."""
        room = self._scheduler.limits.slot_tokens - max(row.column for row in scheduled.rows)
        if self._max_model_len is None:
            return room
        return min(room, self._max_model_len - max(row.position for row in scheduled.rows))

    def _take(
        self, slots: Sequence[int], rows: Sequence[Row], steps: Sequence[Step]
    ) -> list[Outcome]:
        """Outcomes of the rows that these tokens end; what comes after an end is dropped."""
        outcomes: list[Outcome] = []
        most, num_taken = self._spec.sampling.max_new_tokens, 0
        tokens, broken = (zip(*by_step, strict=True) for by_step in zip(*steps, strict=True))
        for slot, row, ids, are_broken in zip(slots, rows, tokens, broken, strict=True):
            before = row.num_tokens
            if not before:
                row.deadline_s = time.monotonic() + self._timeout_s
                row.cached_tokens = self._scheduler.cached_tokens(slot)
            left = most - before
            self._ender.take(row, ids[:left], are_broken[:left])
            self._last_tokens[slot] = ids[-1]
            num_taken += row.num_tokens - before
            if row.done or row.num_tokens >= most:
                self._finish(row, slot, outcomes)
        self._on_tokens(num_taken)
        return outcomes

    def _finish(self, row: Row, slot: int, outcomes: list[Outcome]) -> None:
        key = row.prepared.key
        is_doubtful = row.broken and row.num_tokens == 1 and self._scheduler.has_copied(slot)
        self._scheduler.release(slot)
        if row.broken and self._cache is not None:
            self._cache.taint(slot)
        if is_doubtful:  # what it copied may have been spoilt by what follows it there
            self._leave_to_plain([key])
            return
        del self._rows[key]
        self._aborted.discard(key)
        if not row.aborted:
            timeout_s = self._spec.request_timeout_s
            outcomes.append(outcome_of(row, self._tokenizer, self._stops, timeout_s))

    def _fall_back(self, message: str) -> None:
        """The plain loop answers the requests of a failed pass: it finds out whose fault it is."""
        self._num_failures += 1
        keys = self._scheduler.take_back()
        log.warning(
            "a shared-prefix pass failed, its %d requests are answered in plain batches%s: %s",
            len(keys),
            ", and so are all that follow" if self._is_plain else "",
            message,
        )
        if self._is_plain:
            keys += self._scheduler.take_waiting()
            if self._spec.degrade is not None:
                self._spec.degrade(f"plain batches after {MOST_FAILURES} failed passes: {message}")
        self._drop_cache()
        self._leave_to_plain(keys)

    def _leave_to_plain(self, keys: Sequence[RequestKey]) -> None:
        for key in keys:
            row = self._rows.pop(key)
            if key not in self._aborted:
                self._plain.submit(row.prepared)
            self._aborted.discard(key)


def make_loop(
    spec: EngineSpec,
    model: Any,
    tokenizer: PromptTokenizer,
    stops: tuple[str, ...],
    max_model_len: int | None,
    plain: BatchedLoop,
    on_tokens: Callable[[int], None],
) -> SharedPrefixLoop:
    """Raises Unsupported, `model` being as it was; ModelError: --kv_cache_bytes is too small."""
    shape = Shape.of(model)
    if shape.device.type == "cuda" and shape.dtype == torch.float32 and spec.prefix_sharing != "on":
        raise Unsupported(
            "fp32 has no fused attention on a GPU; --prefix_sharing on goes range by range,"
            " exact and slow"
        )
    way = way_of(shape)
    forward = ready(model, way, max_model_len, TokenChooser(spec.sampling))
    sizes: Any = {
        "num_slots": spec.batch_size or way.num_slots,
        "max_new_tokens": spec.sampling.max_new_tokens,
        "max_model_len": max_model_len,
    }
    budget = spec.kv_cache_bytes
    if budget is None:
        budget = way.default_budget(shape, spec, sizes)
    try:
        limits = limits_within(
            budget,
            shape,
            **sizes,
            pass_tokens=way.pass_tokens,
            extra_tokens=way.extra_tokens,
            least_free_share=way.least_free_share,
        )
    except ValueError as error:
        forward.undo()
        if spec.kv_cache_bytes is None:
            raise Unsupported(f"there is too little memory: {error}") from None
        raise ModelError(f"--kv_cache_bytes is too small: {error}.") from None
    try:
        return SharedPrefixLoop(
            spec, way, forward, shape, limits, tokenizer, stops, max_model_len, plain, on_tokens
        )
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no error of its own
        forward.undo()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unsupported(f"there is no room for keys and values: {reason}") from error
