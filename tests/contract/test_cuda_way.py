"""CUDA's way of the shared-prefix loop, on the CPU: its layout, its bursts, its self-check.

That it answers token for token as plain `generate` does is in test_shared_prefix.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_way import take_cudas_way
from driving import Make, ask, drive
from fake_flash import fake_flash, use
from test_shared_prefix import answer, ids, loop_of, prompt_sets

from models import Reference, make_model
from ragfleet.engines import transformers
from ragfleet.engines.checkpoint import CONTEXT_BYTES
from ragfleet.engines.protocol import (
    Completion,
    EngineSpec,
    Prepared,
    PromptSettings,
    SamplingParams,
)
from ragfleet.engines.shared_prefix import decoder, support, varlen_pass, ways
from ragfleet.engines.shared_prefix import loop as loop_module
from ragfleet.engines.shared_prefix.cache import Shape, limits_within
from ragfleet.engines.shared_prefix.decoder import BURST_STEPS, Decoder, Step
from ragfleet.engines.shared_prefix.graphs import Graphs
from ragfleet.engines.shared_prefix.scheduler import Limits, Range, Run
from ragfleet.engines.shared_prefix.varlen import (
    Kernels,
    Ranges,
    attend_levels,
    flash_varlen,
    plain_varlen,
)
from ragfleet.engines.shared_prefix.varlen_cache import VarlenCache
from ragfleet.engines.shared_prefix.varlen_pass import absent_in, in_blocks, level_reads
from ragfleet.errors import ModelError

CPU = torch.device("cpu")
NEW = 10
NOTHING = Range(0, 0)


# ---- layout


def test_levels_name_every_token_once() -> None:
    a, b, c = Range(0, 30), Range(40, 9), Range(50, 8)
    pieces = [(0, 1, (a, b)), (1, 2, (a, b)), (2, 3, ()), (3, 9, (a,)), (9, 12, (a, c))]
    assert level_reads(pieces, 14) == [
        [(0, 2, a), (2, 3, NOTHING), (3, 12, a), (12, 14, NOTHING)],
        [(0, 2, b), (2, 9, NOTHING), (9, 12, c), (12, 14, NOTHING)],
    ]
    assert level_reads([(0, 4, ())], 8) == []


def test_what_many_ask_is_cut_into_blocks() -> None:
    a, b = Range(0, 30), Range(40, 9)
    assert in_blocks([[(0, 3, a), (3, 10, b)], [(0, 10, NOTHING)]], 4) == [
        [(0, 3, a), (3, 7, b), (7, 10, b)],
        [(0, 4, NOTHING), (4, 8, NOTHING), (8, 10, NOTHING)],
    ]


def small_cache() -> VarlenCache:
    limits = Limits(num_slots=4, max_new_tokens=2, pool_tokens=9, pass_tokens=9, own_tokens=8)
    return VarlenCache(Shape(1, 2, 8, torch.float32, CPU, group=3), limits)


def test_a_copy_of_what_is_copied_comes_from_its_source() -> None:
    cache = small_cache()
    runs = [
        Run([1], 20, (), slot=1, copied_tokens=3, copied_from=0),
        Run([1, 2], 24, (), slot=3, copied_tokens=5, copied_from=1),
        Run([1], 22, (), slot=2, copied_tokens=2, copied_from=3),
    ]
    copies = varlen_pass._copies_of(runs, cache)
    assert copies is not None
    first, second = cache.place(0), cache.place(1)
    origins = [*range(first, first + 3)] * 2 + [second + 3, second + 4, first, first + 1]
    counts = ((1, 3), (3, 5), (2, 2))
    targets = [cache.place(slot, n) for slot, count in counts for n in range(count)]
    assert copies.tolist() == [origins, targets]


def test_places_stay_within_the_budget() -> None:
    shape = Shape(2, 2, 16, torch.float32, CPU)
    sizes: Any = {"num_slots": 9, "max_new_tokens": 8, "max_model_len": None, "pass_tokens": 64}
    for budget in range(400_000, 402_000, 97):
        limits = limits_within(budget, shape, **sizes, extra_tokens=VarlenCache.EXTRA_TOKENS)
        cache = VarlenCache(shape, limits)
        assert budget - shape.bytes_per_token < cache.num_bytes <= budget
        assert cache.place(limits.num_slots - 1, limits.slot_tokens - 1) == cache.scratch - 1


# ---- whole engines


def test_by_the_fused_kernel_token_by_token(
    start: Make, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    """As if it took fp32."""
    use(monkeypatch, partial(fake_flash, any_dtype=True))
    take_cudas_way(monkeypatch, flash_varlen)
    engine = start(batch_size=5, max_new_tokens=6)
    sets = prompt_sets()
    prompts = sets["questions that begin alike"] + sets["groups with a head"][::2]
    for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, 6, [3])
        assert list(found.token_ids) == [token for token in tokens if token != 3]


def test_levels_go_by_blocks_of_queries(
    start: Make, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    """Else all ranges get as many blocks as the one that all share."""
    monkeypatch.setattr(varlen_pass, "BLOCK_QUERIES", 8)
    most = []

    def kernel(query: Any, key: Any, value: Any, ranges: Ranges, scaling: float) -> Any:
        assert (ranges.starts_q.diff() <= ranges.max_q).all()
        if query.shape[1] == key.shape[1]:  # a level's, not a token's own part
            most.append(ranges.max_q)
        return plain_varlen(query, key, value, ranges, scaling)

    take_cudas_way(monkeypatch, kernel, capture=WarmUps().capture)
    engine = start(batch_size=9, max_new_tokens=6)
    prompts = prompt_sets()["one group of all"]
    for prompt, found in zip(prompts, answer(engine, prompts), strict=True):
        tokens = reference.generate(prompt, 6, [3])
        assert list(found.token_ids) == [token for token in tokens if token != 3]
    assert max(most) == 8


def test_by_the_fused_kernel_in_half_precision(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The self-check holds its logits; NaN shows what nobody wrote."""
    use(monkeypatch, fake_flash)
    model = make_model(tmp_path / "m", "--initializer_range", "0.02")
    take_cudas_way(monkeypatch, flash_varlen)
    engine = start(model_dir=model, precision="bf16", batch_size=5, max_new_tokens=6)
    cache = loop_of(engine)._cache
    assert isinstance(cache, VarlenCache)
    assert cache.states.dtype == torch.bfloat16
    cache.states.fill_(torch.nan)  # what nobody wrote nobody reads
    for found in answer(engine, prompt_sets()["questions that begin alike"]):
        assert found.completion_tokens


@pytest.mark.parametrize("temperature", [0.1, 0.9])
def test_draws_are_those_of_plain_batches(
    start: Make, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    take_cudas_way(monkeypatch)
    settings = {"temperature": temperature, "top_p": 0.9, "max_new_tokens": 9}
    requests = [ask(n, f"What is {n}?", "A text. " * (n % 3 + 4), seed=n) for n in range(12)]
    alone = drive(start(batch_size=1, prefix_sharing="off", **settings), requests)
    engine = start(batch_size=5, **settings)
    loop_of(engine)
    together = drive(engine, requests[::-1])
    for request in requests:
        one, other = alone[request.key], together[request.key]
        assert isinstance(one, Completion)
        assert isinstance(other, Completion)
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason


def noted_bursts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, steps) of each, from now on."""
    bursts = []
    decode = Decoder.decode

    def counted(self: Decoder, rows: Any, fed: Any, steps: int, draws: Any) -> Any:
        bursts.append((len(rows), steps))
        return decode(self, rows, fed, steps, draws)

    monkeypatch.setattr(Decoder, "decode", counted)
    return bursts


def test_bursts_are_counted_token_by_token(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    take_cudas_way(monkeypatch)
    engine = start(batch_size=4, max_new_tokens=NEW)
    bursts = noted_bursts(monkeypatch)
    prompts = [ids(random.Random(1), 20)] * 4
    found = answer(engine, prompts)
    read = loop_of(engine)._scheduler.read_tokens
    assert engine.progress() == read + sum(one.completion_tokens for one in found)
    # The first token comes with the prompt; the last burst goes no further than the answer may.
    assert bursts == [(4, BURST_STEPS), (4, BURST_STEPS), (4, NEW - 1 - 2 * BURST_STEPS)]


@pytest.mark.parametrize(
    ("length", "max_model_len", "expected"),
    [
        (20, None, [(1, 4), (2, 4), (1, 3)]),
        (20, 28, [(1, 4), (2, 3), (1, 4)]),  # positions end with the first one's answer
        (64, None, [(1, 4), (2, 3), (1, 4)]),  # its slot ends there
    ],
)
def test_a_burst_does_not_end_with_the_first_answer(
    start: Make,
    monkeypatch: pytest.MonkeyPatch,
    reference: Reference,
    length: int,
    max_model_len: int | None,
    expected: list[tuple[int, int]],
) -> None:
    """With hundreds of rows one is always about to be at --max_new_tokens."""
    take_cudas_way(monkeypatch)
    engine = start(batch_size=2, max_new_tokens=8, max_model_len=max_model_len)
    bursts = noted_bursts(monkeypatch)
    rng = random.Random(3)
    prompts = [ids(rng, length), ids(rng, length)]
    found: dict[bytes, Any] = {}
    for number, prompt in enumerate(prompts):
        engine.submit(Prepared(request=ask(number), prompt="", token_ids=tuple(prompt)))
        for _ in range(2):  # a pass that reads it, and one more
            found |= {outcome.key: outcome for outcome in engine.step(0)}
    while len(found) < len(prompts):
        found |= {outcome.key: outcome for outcome in engine.step(1)}
    assert bursts == expected
    for number, prompt in enumerate(prompts):
        tokens = reference.generate(prompt, 8, [3])
        assert 3 not in tokens, "an answer that ends early"
        assert list(found[ask(number).key].token_ids) == tokens


class WarmUps:
    """A capture as CUDA's: the step runs beforehand, and then as it was at the capture."""

    def __init__(self) -> None:
        self.captured = self.repeated = 0

    def capture(self, step: Step) -> Step:
        self.captured += 1
        step()

        def repeat() -> None:
            self.repeated += 1
            step()

        return repeat


def test_capturing_leaves_no_trace(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start(batch_size=5, max_new_tokens=NEW)
    sets = prompt_sets()
    prompts = [*sets["groups with a head"], *sets["questions that begin alike"]]
    wanted = [found.token_ids for found in answer(plain, prompts)]
    warm_ups = WarmUps()
    take_cudas_way(monkeypatch, capture=warm_ups.capture)
    engine = start(batch_size=5, max_new_tokens=NEW)
    assert warm_ups.captured == 1, "the self-check looks at captured steps too"
    assert [found.token_ids for found in answer(engine, prompts)] == wanted
    assert warm_ups.captured > 1
    assert warm_ups.repeated > 2 * warm_ups.captured


def test_where_steps_cannot_be_captured(
    start: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Graphs, step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_captured", refused)
    graphs = Graphs()
    take_cudas_way(monkeypatch, capture=graphs.capture)
    engine = start(batch_size=4, max_new_tokens=NEW)
    assert "not permitted" in str(graphs.why_not)
    prompts = prompt_sets()["one group of all"]
    assert len(answer(engine, prompts)) == len(prompts)
    assert caplog.text.count("without CUDA graphs") == 1


class FakeCuda:
    """What of torch.cuda captures use, with the rule of its allocator for pools."""

    def __init__(self) -> None:
        self.waited: list[Any] = []
        """(stream, for which other one) each time."""
        self.current: Any = self.Stream()
        self.users: dict[int, int] = {}
        """Graphs of each pool; it is not known before its first one."""
        self.pools = 0
        self.underway: list[int] = []
        """Pools that what is allocated comes from."""

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {"Stream": self.Stream, "current_stream": lambda: self.current}
        names |= {"stream": self.stream, "graph": self.graph, "CUDAGraph": partial(FakeGraph, self)}
        for name, one in (names | {"graph_pool_handle": self.graph_pool_handle}).items():
            monkeypatch.setattr(torch.cuda, name, one)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation)

    def end_allocation(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("not currently recording to mempool_id")
        self.underway.remove(pool)

    def Stream(self) -> Any:
        stream = SimpleNamespace()
        stream.wait_stream = lambda other: self.waited.append((stream, other))
        return stream

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(
        self, graph: Any, *, pool: int, stream: Any = None, capture_error_mode: str
    ) -> Iterator[None]:
        """Where it fails, what was current is not so again. Where it became invalid, as it does not
        where memory runs out, the allocator is not told that it is over."""
        self.current = stream or self.Stream()
        if self.users.get(pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] = self.users.get(pool, 0) + 1
        graph.pool = pool
        self.underway.append(pool)
        try:
            yield
        except torch.OutOfMemoryError:
            self.end_allocation(0, pool)
            raise
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.end_allocation(0, pool)


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pool = 0

    def replay(self) -> None:
        pass

    def __del__(self) -> None:
        if self.pool:
            self.cuda.users[self.pool] -= 1


def test_graphs_share_a_pool_while_one_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the self-check are gone when the first ones of the loop are captured."""
    cuda = FakeCuda()
    cuda.use(monkeypatch)
    graphs = Graphs()
    streams = []
    captured = [graphs.capture(lambda: streams.append(cuda.current)) for _ in range(2)]
    assert cuda.users == {1: 2}
    captured.clear()
    assert cuda.users == {1: 0}
    captured = [graphs.capture(lambda: streams.append(cuda.current)) for _ in range(2)]
    assert graphs.why_not is None
    assert cuda.users == {1: 0, 2: 2}
    assert len(set(map(id, streams))) == 1, "warmed up where it is captured"


def test_a_capture_that_fails_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.use(monkeypatch)
    before = cuda.current
    graphs = Graphs()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    cuda.users[7] = 0
    graphs.capture(lambda: None)
    assert "INTERNAL ASSERT" in str(graphs.why_not)
    assert cuda.current is before


def failing_at(calls: Sequence[int], error: Exception) -> Step:
    """The first capture calls it twice."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise error

    return step


@pytest.mark.parametrize("call", [1, 2])
def test_a_capture_out_of_memory_is_that_steps_alone(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    cuda = FakeCuda()
    cuda.use(monkeypatch)
    told: list[str] = []
    graphs = Graphs()
    graphs.degrade = told.append
    for _ in range(2):
        step = failing_at([call], torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
        assert graphs.capture(step) is step
        assert cuda.waited[-1] == (cuda.current, graphs._stream), "it may write later than the next"
    assert told == ["decoding goes without CUDA graphs at times, for want of memory"]
    assert graphs.why_not is None
    assert graphs.capture(lambda: None).__name__ == "replay"
    assert cuda.underway == []


def test_captures_that_run_out_of_memory_on_trial_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones would be used without having been checked."""
    FakeCuda().use(monkeypatch)
    graphs = Graphs()
    graphs.capture(failing_at([2], torch.OutOfMemoryError("CUDA out of memory.")))
    assert "out of memory" in str(graphs.why_not)


def test_a_capture_that_becomes_invalid_is_over_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.use(monkeypatch)
    told: list[str] = []
    graphs = Graphs()
    graphs.degrade = told.append
    step = failing_at([2], RuntimeError("operation not permitted when stream is capturing"))
    assert graphs.capture(step) is step
    assert cuda.underway == [], "the allocator would give no memory back"
    assert "previous error during capture" in str(graphs.why_not)
    assert told == [f"decoding goes without CUDA graphs: {graphs.why_not}"]


def test_what_is_told_of_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start by `begin`, later by `EngineSpec.degrade`."""
    FakeCuda().use(monkeypatch)
    shape = Shape(2, 2, 16, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(ways, "why_not_flash", lambda *_: None)
    monkeypatch.setattr(ways, "_with_triton", lambda shape: (Kernels(plain_varlen), None, None))
    told: list[str] = []
    way = ways.way_of(shape)
    assert way.begin(dataclasses.replace(spec("on"), degrade=told.append)) == []
    assert way.make_decoder is not None
    capture = way.make_decoder.args[1]  # type: ignore[attr-defined]
    capture(failing_at([2], RuntimeError("not permitted")))
    assert len(told) == 1
    assert told[0] in way.begin(spec("on"))


# ---- when it is not right


def scores_forgotten(*args: Any) -> Any:
    outs, lses = attend_levels(*args)
    return outs, torch.zeros_like(lses)


def absence_ignored(levels: Any, num_tokens: int) -> Any:
    return np.zeros_like(absent_in(levels, num_tokens))


def copies_unresolved(runs: Sequence[Run], cache: VarlenCache) -> Any:
    copies = [copies_of([run], cache) for run in runs if run.copied_tokens]
    return torch.cat(copies, 1) if copies else None


copies_of = varlen_pass._copies_of


def offsets_shifted(self: VarlenCache, slot: int, column: int = 0) -> int:
    """Slots overlap."""
    return self.num_pool + slot * (self.slot_tokens - 5) + column


def lengths_not_advanced(self: Any) -> None:
    before = self._own_lengths.clone()
    step(self)
    self._own_lengths.copy_(before)


def positions_not_advanced(self: Any) -> None:
    before = self._positions.clone()
    step(self)
    self._positions.copy_(before)


def tokens_not_fed(self: Any) -> None:
    before = self._ids.clone()
    step(self)
    self._ids.copy_(before)


step = decoder._Bucket._step


@pytest.mark.parametrize(
    ("owner", "name", "mistaken"),
    [
        (varlen_pass, "attend_levels", scores_forgotten),
        (varlen_pass, "absent_in", absence_ignored),
        (varlen_pass, "_copies_of", copies_unresolved),
        (VarlenCache, "place", offsets_shifted),
        (decoder._Bucket, "_step", lengths_not_advanced),
        (decoder._Bucket, "_step", positions_not_advanced),
        (decoder._Bucket, "_step", tokens_not_fed),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_the_self_check_bites(
    start: Make, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, mistaken: Any
) -> None:
    take_cudas_way(monkeypatch)
    monkeypatch.setattr(owner, name, mistaken)
    engine = start(max_new_tokens=NEW)
    info = engine.start()
    assert "logits differ" in str(info.degraded) or "other tokens" in str(info.degraded)
    assert info.degraded in info.notes
    assert len(answer(engine, prompt_sets()["no head"][:2])) == 2


def test_the_self_check_sees_what_layers_want(
    start: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_cudas_way(monkeypatch)
    model = make_model(tmp_path / "m", "--arch", "mistral", "--sliding_window", "64")
    assert "sliding window of 64" in str(start(model_dir=model).start().degraded)


# ---- where it is asked for


def spec(prefix_sharing: Any) -> EngineSpec:
    return EngineSpec(
        model_dir=None,
        sampling=SamplingParams(max_new_tokens=8),
        prompts=PromptSettings(system_prompt=""),
        num_gpus=1,
        prefix_sharing=prefix_sharing,
    )


def test_a_gpu_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 2, 16, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(Shape, "of", lambda model: shape)
    monkeypatch.setattr(ways, "why_not_flash", lambda *_: "no such operation")
    nothing: Any = None
    with pytest.raises(ways.Unsupported, match="as it is used here: no such operation"):
        loop_module.make_loop(spec("auto"), nothing, nothing, (), None, nothing, nothing)


def test_fp32_on_a_gpu_is_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 2, 16, torch.float32, torch.device("cuda"))
    monkeypatch.setattr(Shape, "of", lambda model: shape)
    nothing: Any = None
    with pytest.raises(ways.Unsupported, match="--prefix_sharing on goes range by range"):
        loop_module.make_loop(spec("auto"), nothing, nothing, (), None, nothing, nothing)


def test_on_is_not_to_be_had_by_halves(start: Make, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "--arch", "mistral", "--sliding_window", "64")
    assert "sliding window of 64" in str(start(model_dir=model).start().degraded)
    with pytest.raises(ModelError, match=r"sliding window of 64.*auto would take plain batches"):
        start(model_dir=model, prefix_sharing="on")


def test_devices_without_a_way() -> None:
    with pytest.raises(ways.Unsupported, match="no way for meta devices"):
        ways.way_of(Shape(2, 2, 16, torch.float32, torch.device("meta")))
    exact = ways.way_of(Shape(2, 2, 16, torch.float32, torch.device("cuda")))
    assert "exact and slow" in exact.begin(spec("on"))[0]


def test_layers_on_several_gpus_are_refused() -> None:
    config = SimpleNamespace(model_type="llama")
    config.get_text_config = lambda: config
    model = SimpleNamespace(
        config=config, dtype=torch.bfloat16, hf_device_map={"layers.0": 0, "layers.1": 1}
    )
    with pytest.raises(ways.Unsupported, match="spread over GPUs"):
        support.check_config(model, ways.varlen_way(Kernels(plain_varlen), decoder.eagerly))


@pytest.mark.parametrize("limit", [None, 10 << 30])
def test_a_gpus_memory_is_not_taken_whole(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    shape = Shape(32, 8, 128, torch.bfloat16, torch.device("cuda"), group=4)
    part = EngineSpec(
        model_dir=None,
        sampling=SamplingParams(max_new_tokens=8),
        prompts=PromptSettings(system_prompt=""),
        gpu_memory_bytes=limit,
    )
    sizes = {"num_slots": 256, "max_new_tokens": 128, "max_model_len": 8192}
    free = 50 << 30 if limit is None else (8 << 30) - CONTEXT_BYTES
    way = ways.varlen_way(Kernels(plain_varlen), decoder.eagerly)
    assert way.default_budget(shape, part, sizes) == int(0.8 * free)
    assert way.default_budget(shape, part, {**sizes, "num_slots": 1}) == (8192 + 192) * (
        shape.bytes_per_token
    )


def test_a_pass_is_laid_out_as_ranges() -> None:
    """A node's run sees what is before it in the same stretch as its own part."""
    cache = small_cache()
    run = Run([5, 6], 5, (Range(7, 1), Range(2, 4)), pool_offset=6)
    assert varlen_pass._view_of_run(run, cache) == (2, Range(2, 6), [Range(7, 1)])
    in_slot = Run([5, 6], 9, (Range(2, 7),), slot=0, copied_tokens=3)
    own = Range(cache.place(0), 5)
    assert varlen_pass._view_of_run(in_slot, cache) == (2, own, (Range(2, 7),))


def test_a_gpu_that_no_longer_answers_ends_the_start(
    start: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain batches can't be taken where the trial broke the device for this process."""

    def broken(*args: Any, **others: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def trial(*args: Any) -> Any:
        monkeypatch.setattr(torch, "zeros", broken)
        raise ways.Unsupported("the fused attention is missing")

    monkeypatch.setattr(transformers, "make_loop", trial)
    with pytest.raises(ModelError, match=r"illegal memory access.*--prefix_sharing off"):
        start(prefix_sharing="on")
