"""How many workers with how many GPUs each: `--num_workers auto`, and what another split would do.

Owns the arithmetic of a model on GPUs: weights, KV cache, activations, which sizes its heads divide
by, and a rough speed of each split. Pure: bytes and shapes in, a layout with its sums out. It knows
nothing of files, processes or engines' own settings.

Speeds are a roofline (Williams et al., CACM 52, 2009) with round figures for today's GPUs: a decode
step reads the weights and the cache once, prefill computes, and splitting a layer costs two
all-reduces (Shoeybi et al., arXiv 1909.08053). Only their ratios are used, and called "about".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

from ragfleet.allocation import tensor_parallel_size, threads_of
from ragfleet.errors import DeviceError
from ragfleet.inventory import gib

Split = Literal["heads", "layers"]
"""heads: tensor parallel, the GPUs of a worker compute together; layers: they take turns."""

USABLE_FRACTION: Final = 0.9
"""Of a GPU's free memory; engines leave the rest alone too."""
WEIGHTS_SHARE: Final = 0.75
"""Most of that which weights may take: with a small KV cache few requests run together. An engine
that splits heads and is not told how takes the fewest GPUs by this."""
CONTEXT_BYTES: Final = 1 << 30
"""CUDA context, kernels, captured graphs."""
PREFILL_TOKENS: Final = 8192
"""Prompt tokens in one forward pass."""
FEW_REQUESTS: Final = 4
"""Fewer at once share little, and the weights are read for almost each of them alone."""
WORTH_SAYING: Final = 1.15
"""A split less than this much faster is not worth a word."""

_FLOPS: Final = 3e14
_BYTES_PER_S: Final = 2e12
_LINK_BYTES_PER_S: Final = 6e10
_ALL_REDUCE_S: Final = 20e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """What a model takes. `weights_bytes` is as loaded, in the run's precision."""

    weights_bytes: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    dtype_bytes: int = 2

    def kv_bytes_per_token(self, num_gpus: int = 1, split: Split = "heads") -> int:
        """On each of `num_gpus`; key/value heads fewer than GPUs are replicated."""
        heads, layers = self.num_key_value_heads, self.num_layers
        if split == "heads":
            heads = -(-heads // num_gpus)
        else:
            layers = -(-layers // num_gpus)
        return 2 * layers * heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What the engine is to hold at once."""

    num_requests: int
    prompt_tokens: int
    """Of an average request."""
    answer_tokens: int
    """The most an answer may have."""

    @property
    def tokens_per_request(self) -> int:
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`num_workers` workers of `num_gpus` GPUs each. Bytes are of one GPU."""

    num_workers: int
    num_gpus: int
    usable_bytes: int
    weights_bytes: int
    activation_bytes: int
    logits_bytes: int
    """Of one request in a decode step."""
    kv_bytes_per_token: int
    demand: Demand
    requests_per_s: float
    """Of all workers together, roughly."""

    @property
    def num_requests(self) -> int:
        """That fit at once into one worker's cache, up to the demand; 0: it does not fit."""
        room = self.usable_bytes - self.weights_bytes - self.activation_bytes
        each = self.demand.tokens_per_request * self.kv_bytes_per_token + self.logits_bytes
        return max(0, min(self.demand.num_requests, room // each))

    @property
    def name(self) -> str:
        return f"{self.num_workers}×{self.num_gpus}"

    def arithmetic(self) -> str:
        """The sum that decides, for one GPU."""
        count = max(1, self.num_requests)
        kv_bytes = count * self.demand.tokens_per_request * self.kv_bytes_per_token
        activation_bytes = self.activation_bytes + count * self.logits_bytes
        total = self.weights_bytes + activation_bytes + kv_bytes
        return (
            f"weights {gib(self.weights_bytes)} + activations {gib(activation_bytes)} + KV of"
            f" {count} × {self.demand.tokens_per_request:,} tokens {gib(kv_bytes)}"
            f" = {gib(total)} of {gib(self.usable_bytes)} usable"
        )


def layout_of(
    gpu_bytes: Sequence[int],
    model: ModelSize,
    demand: Demand,
    num_workers: int,
    num_gpus: int,
    split: Split = "heads",
) -> Layout:
    """One split, whether it fits or not. `gpu_bytes`: free memory of each GPU to be used."""
    num_ways = num_gpus if split == "heads" else 1
    layout = Layout(
        num_workers=num_workers,
        num_gpus=num_gpus,
        usable_bytes=int(USABLE_FRACTION * min(gpu_bytes)),
        weights_bytes=-(-model.weights_bytes // num_gpus),
        activation_bytes=_activation_bytes(model, num_ways),
        logits_bytes=2 * 4 * -(-model.vocab_size // num_ways),
        kv_bytes_per_token=model.kv_bytes_per_token(num_gpus, split),
        demand=demand,
        requests_per_s=0.0,
    )
    at_once = layout.num_requests
    if not at_once:
        return layout
    seconds = _seconds_per_request(model, demand, at_once, num_ways)
    return replace(layout, requests_per_s=num_workers / seconds)


def layouts(
    gpu_bytes: Sequence[int],
    model: ModelSize,
    demand: Demand,
    split: Split = "heads",
    sizes: Sequence[int] | None = None,
    *,
    is_told: bool = False,
) -> list[Layout]:
    """Every split of these GPUs that the model allows, the fastest first; what fits comes first.

    Where layers take turns, more GPUs for a worker are room and not speed, and what is spread
    shares no prefixes, which no speed here knows: the fewest that hold more than a few requests
    come first.
    `sizes`: the numbers of GPUs that one worker may have (None: any). Where heads are split, the
    engine takes of such a number what it needs, and each layout has only these; one that `is_told`
    how it splits takes all.
    """
    found = []
    for num_gpus in sizes or range(1, len(gpu_bytes) + 1):
        is_asked = sizes is not None and split == "heads" and not is_told
        taken = engine_gpus(gpu_bytes, model, num_gpus) if is_asked else num_gpus
        if split == "layers" or is_told or divides(model, taken):
            num_workers = len(gpu_bytes) // num_gpus
            found.append(layout_of(gpu_bytes, model, demand, num_workers, taken, split))
    if split == "layers":
        enough = min(demand.num_requests, FEW_REQUESTS)

        def rank(layout: Layout) -> tuple[bool, int, float, int]:
            is_tight = layout.num_requests < enough
            fewest = 0 if is_tight else layout.num_gpus
            return is_tight, fewest, -layout.requests_per_s, layout.num_gpus

        return sorted(found, key=rank)
    # Among equals fewer GPUs for each worker.
    return sorted(found, key=lambda layout: (-layout.requests_per_s, layout.num_gpus))


def divides(model: ModelSize, num_gpus: int) -> bool:
    """Whether a model's heads and MLP split so many ways."""
    shape = (model.num_attention_heads, model.num_key_value_heads, model.intermediate_size)
    return tensor_parallel_size(num_gpus, *shape) == num_gpus


def engine_gpus(gpu_bytes: Sequence[int], model: ModelSize, num_gpus: int) -> int:
    """Of a worker's GPUs, those that an engine takes which splits heads and is not told how."""
    sizes = [size for size in range(1, num_gpus + 1) if divides(model, size)]
    room = WEIGHTS_SHARE * USABLE_FRACTION * min(gpu_bytes)
    return next((size for size in sizes if model.weights_bytes <= size * room), sizes[-1])


def choose_gpus(
    gpu_bytes: Sequence[int],
    model: ModelSize,
    demand: Demand,
    split: Split = "heads",
    sizes: Sequence[int] | None = None,
    *,
    is_told: bool = False,
) -> tuple[Layout, int]:
    """(the first of `layouts`, the least memory that its GPUs have).

    The smallest GPU decides how much each is given, so it is left out where the others do clearly
    more without. Raises DeviceError with the sums when nothing fits.
    """
    chosen, least_bytes = None, 0
    split_up = partial(
        layouts, model=model, demand=demand, split=split, sizes=sizes, is_told=is_told
    )
    for smallest in sorted(set(gpu_bytes)):
        larger = [num_bytes for num_bytes in gpu_bytes if num_bytes >= smallest]
        if len(larger) < min(sizes or [1]):
            break
        found = split_up(larger)
        worth = 0.0 if chosen is None else WORTH_SAYING * chosen.requests_per_s
        if found and found[0].num_requests and found[0].requests_per_s > worth:
            chosen, least_bytes = found[0], smallest
    if chosen is not None:
        return chosen, least_bytes
    sums = [
        f"  {layout.num_gpus} GPU(s) a worker: {layout.arithmetic()}"
        for layout in sorted(split_up(gpu_bytes), key=lambda layout: layout.num_gpus)
    ]
    missing = "" if split == "layers" else _not_dividing(model, len(gpu_bytes))
    raise DeviceError(
        f"The model does not fit {len(gpu_bytes)} GPU(s), however it is split; for each GPU:\n"
        + "\n".join(sums)
        + missing
        + "\nTake a smaller or quantised model, more GPUs, or --device cpu."
    )


def faster_layout(
    current: Layout, found: Sequence[Layout], flag: str = "--num_workers"
) -> str | None:
    """The line about a split that would be faster than the current one, where there is any.

    `flag`: with which the number of workers is asked for.
    """
    best = found[0] if found else None
    if best is None or not best.num_requests or best.name == current.name:
        return None
    option = f"{flag} {best.num_workers}"
    if not current.num_requests:
        return f"{current.name} does not fit: {current.arithmetic()}; {best.name} does ({option})."
    ratio = best.requests_per_s / current.requests_per_s
    if ratio < WORTH_SAYING:
        return None
    return f"{current.name} fits; {best.name} about {ratio:.1f} × faster ({option})."


def cpu_workers(
    num_cores: int,
    num_threads: int,
    available_bytes: int | None,
    weights_bytes: int | None,
    engine_bytes: Callable[[int], int] = lambda num_threads: 0,
    *,
    is_asked: bool = False,
    bf16_bytes: int | None = None,
) -> tuple[int, str]:
    """(workers, the line that says why): one for each `num_threads` cores, if memory allows.

    Each worker holds the whole model, and with its part of the cores, so many threads, up to
    `engine_bytes` of keys, values and what is packed anew. `bf16_bytes`: the weights in that, where
    they are not. Raises DeviceError where not even one fits, with all of that if it `is_asked` for,
    else without.
    """
    workers = most = max(1, num_cores // num_threads)
    why = f"{num_cores} cores // {num_threads} thread(s) = {workers}"
    if available_bytes is None or weights_bytes is None:
        return workers, f"{workers} workers: {why}."
    model = _at_work_bytes(weights_bytes)
    if model > available_bytes:
        fits = bf16_bytes is not None and _at_work_bytes(bf16_bytes) <= available_bytes
        raise DeviceError(
            f"The model does not fit into memory: weights {gib(weights_bytes)}, with what it works"
            f" in {gib(model)}, of {gib(available_bytes)} available."
            f" {'Use --precision bf16, or take' if fits else 'Take'} a smaller model."
        )

    def together(workers: int) -> int:
        return sum(model + engine_bytes(threads) for threads in threads_of(workers, num_cores))

    while workers > 1 and together(workers) > available_bytes:
        workers -= 1
    needed = together(workers)
    if needed > available_bytes and is_asked:
        raise DeviceError(
            f"The model and --kv_cache_bytes do not fit into memory: {gib(needed)} together,"
            f" of {gib(available_bytes)} available."
        )
    if workers < most:
        why += f", but memory holds {workers}"
    if needed > available_bytes:
        why += (
            f"; with all that it may take for keys and values it needs {gib(needed)}, and"
            f" there are {gib(available_bytes)}: --kv_cache_bytes limits that"
        )
    elif workers < most:
        why += f": {gib(needed)} together, of {gib(available_bytes)} available"
    return workers, f"{workers} workers: {why}."


def _at_work_bytes(weights_bytes: int) -> int:
    return int(1.1 * weights_bytes) + (3 << 28)


def check_memory(
    num_workers: int,
    memory_bytes: int | None,
    weights_bytes: int,
    bf16_bytes: int | None = None,
) -> None:
    """Raises DeviceError where the weights alone, once for each worker, exceed all there is.

    `bf16_bytes`: the weights in that, where they are not.
    """
    total_bytes = num_workers * weights_bytes
    if memory_bytes is None or total_bytes <= memory_bytes:
        return
    fitting = memory_bytes // weights_bytes
    ways = [f"--num_workers {fitting} or fewer"] if fitting else []
    if bf16_bytes is not None and num_workers * bf16_bytes <= memory_bytes:
        ways.append("--precision bf16")
    way = f"Use {' or '.join(ways)}, or take" if ways else "Take"
    raise DeviceError(
        f"The model does not fit into memory on the CPU: {num_workers} worker(s) × weights"
        f" {gib(weights_bytes)} = {gib(total_bytes)}, of {gib(memory_bytes)} in all. {way} a"
        " smaller model, or GPUs."
    )


def _activation_bytes(model: ModelSize, num_ways: int) -> int:
    """Hidden states and the MLP of one prefill pass, the context."""
    width = 4 * model.hidden_size + 2 * -(-model.intermediate_size // num_ways)
    return CONTEXT_BYTES + PREFILL_TOKENS * width * model.dtype_bytes


def _seconds_per_request(model: ModelSize, demand: Demand, at_once: int, num_ways: int) -> float:
    """Of one worker that has `at_once` requests in flight and splits each layer `num_ways`."""
    parameters = model.weights_bytes / model.dtype_bytes
    prefill_s = 2 * parameters * demand.prompt_tokens / (num_ways * _FLOPS)
    cache_bytes = at_once * demand.tokens_per_request * model.kv_bytes_per_token()
    step_s = (model.weights_bytes + cache_bytes) / (num_ways * _BYTES_PER_S)
    if num_ways > 1:
        moved = 2 * model.num_layers * model.hidden_size * model.dtype_bytes
        moved_bytes = moved * 2 * (num_ways - 1) / num_ways
        prefill_s += demand.prompt_tokens * moved_bytes / _LINK_BYTES_PER_S
        step_s += 2 * model.num_layers * _ALL_REDUCE_S
        step_s += at_once * moved_bytes / _LINK_BYTES_PER_S
    return prefill_s + demand.answer_tokens * step_s / at_once


def _not_dividing(model: ModelSize, num_gpus: int) -> str:
    sizes = [str(size) for size in range(2, num_gpus + 1) if not divides(model, size)]
    if not sizes:
        return ""
    return (
        f"\n  {', '.join(sizes)} GPUs a worker: {model.num_attention_heads} attention heads"
        f" ({model.num_key_value_heads} key/value) don't split so."
    )
