"""The arms of `gpu.py`: one model object, and the ways to answer with it.

Owns the model of random weights, made on its device, and the `Host` that lends it to one arm at a
time: ours changes the model's attention, and the others get it as transformers made it. Knows
nothing of rounds and tables.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import transformers
from transformers import GenerationConfig

from gpu_trials import Answers
from gpu_work import Machine, Size, answer_tokens
from ragfleet.engines import decoding
from ragfleet.engines.batched import BatchedLoop
from ragfleet.engines.protocol import (
    Completion,
    EngineSpec,
    Prepared,
    PromptSettings,
    SamplingParams,
)
from ragfleet.engines.shared_prefix import scheduler as scheduling
from ragfleet.engines.shared_prefix.loop import SharedPrefixLoop, make_loop

KV_SHARE: Final = 0.4
"""Of the memory that is free beside the weights: ours, for keys and values."""
CONFIGS: Final = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mistral": "MistralConfig",
}


class NoTokenizer:
    """What the loops ask of a tokenizer. Nothing ends an answer but its length."""

    eos_ids: tuple[int, ...] = ()
    pad_id = 0

    def decode(self, ids: Sequence[int]) -> str:
        return ""


# ---- the model and the machine


def make_model(size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """Random weights, drawn where they stay."""
    config = getattr(transformers, CONFIGS[size.arch])(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        tie_word_embeddings=size.tied,
        initializer_range=size.initializer_range,
        max_position_embeddings=16_384,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **({"sliding_window": None} if size.arch == "mistral" else {}),
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval().requires_grad_(False)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - start, result


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of ten of a large matrix product and a large copy."""
    on_gpu = device.type == "cuda"
    side, count = (8192, 1 << 29) if on_gpu else (1024, 1 << 24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = min(timed(device, lambda: torch.mm(a, b))[0] for _ in range(10))
    source = torch.empty(count, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    copy_s = min(timed(device, lambda: target.copy_(source))[0] for _ in range(10))
    return Machine(flops=2 * side**3 / product_s, bytes_per_s=2 * source.nbytes / copy_s)


# ---- answers of the length that was asked for


@contextlib.contextmanager
def own_lengths() -> Iterator[None]:
    """Rows of both loops end at their request's `answer_tokens`, as others do at an end marker."""
    take = decoding.RowEnder.take

    def take_and_end(self: Any, row: Any, tokens: Any, broken: Any) -> None:
        left = answer_tokens(row.prepared) - row.num_tokens
        take(self, row, tokens[:left], broken[:left])
        if row.num_tokens >= answer_tokens(row.prepared):
            row.stopped = row.done = True

    decoding.RowEnder.take = take_and_end  # type: ignore[method-assign]
    try:
        yield
    finally:
        decoding.RowEnder.take = take  # type: ignore[method-assign]


@contextlib.contextmanager
def nothing_shared() -> Iterator[None]:
    """The scheduler finds no common begin worth a node: each prompt is read whole."""
    module: Any = scheduling
    found = module.shared_ends
    module.shared_ends = lambda *_, **__: []
    try:
        yield
    finally:
        module.shared_ends = found


def drive(loop: Any, requests: Sequence[Prepared]) -> Answers:
    """As the worker does: submit while there is room, step."""
    answers: Answers = {}
    waiting = list(reversed(requests))
    with own_lengths():
        try:
            while len(answers) < len(requests):
                while waiting and loop.has_room(waiting[-1]):
                    loop.submit(waiting.pop())
                for outcome in loop.step(1.0):
                    if not isinstance(outcome, Completion):
                        raise ValueError(outcome.error)
                    answers[outcome.key] = list(outcome.token_ids)
        except Exception:
            forget(loop, requests)
            raise
    return answers


def forget(loop: Any, requests: Sequence[Prepared]) -> None:
    """Leave nothing of a run that failed to the next one."""
    for request in requests:
        loop.abort(request.key)
    for _ in requests:
        if getattr(loop, "_rows", None):
            loop.step(0)


class Host:
    """A model, and our loop on it: `start`, arms in any order, `close`."""

    def __init__(
        self, model: Any, *, most_tokens: int, most_new: int, slots: int | None, static: int | None
    ) -> None:
        """`most_tokens` of a prompt with its answer; `slots`, `static`: None for the default."""
        self.model = model
        self.device: torch.device = model.device
        self.on_gpu = self.device.type == "cuda"
        self.is_toy = not self.on_gpu or model.num_parameters() < 100e6
        self.loop: SharedPrefixLoop | None = None
        self.notes: list[str] = []
        self._most_tokens = most_tokens
        spec: dict[str, Any] = {
            "model_dir": None,
            "sampling": SamplingParams(max_new_tokens=most_new),
            "prompts": PromptSettings(system_prompt=""),
            "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype],
            "num_gpus": int(self.on_gpu),
            "num_threads": torch.get_num_threads(),
        }
        self._static = EngineSpec(batch_size=static, **spec)
        self._ours = EngineSpec(
            batch_size=slots,
            prefix_sharing="on",  # type: ignore[arg-type]  # once a bool: true as well
            kv_cache_bytes=self._budget(),
            **spec,
        )
        self.plain = self._batches(self._static)

    def _budget(self) -> int | None:
        self.free()
        return int(KV_SHARE * torch.cuda.mem_get_info(self.device)[0]) if self.on_gpu else None

    def _batches(self, spec: EngineSpec) -> BatchedLoop:
        return BatchedLoop(spec, self.model, NoTokenizer(), (), lambda _: None)  # type: ignore[arg-type]

    def start(self) -> None:
        """Make our loop. Raises `support.Unsupported` where it can't be."""
        self.loop = make_loop(
            self._ours,
            self.model,
            NoTokenizer(),  # type: ignore[arg-type]
            (),
            self._most_tokens,
            self._batches(self._ours),
            lambda _: None,
        )
        self.notes = list(self.loop.notes)

    def close(self) -> None:
        """The model as it was."""
        if self.loop is not None:
            self.loop._forward.undo()
            self.loop.close()
            self.loop = None
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def as_made(self) -> Iterator[Any]:
        """The model for another arm, as transformers made it."""
        with self.loop._forward.plain() if self.loop is not None else contextlib.nullcontext():
            yield self.model


# ---- arms


class WholeArm:
    """What arms have in common, those that answer all and build nothing of their own."""

    name: str
    part: int | None = None

    def group(self, share: int) -> int:
        return share

    def open(self, requests: Sequence[Prepared]) -> None:
        pass

    def close(self) -> None:
        pass

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        raise NotImplementedError


class OnHost(WholeArm):
    """With the host's model."""

    def __init__(self, host: Host) -> None:
        self.host = host


class Naive(OnHost):
    """`generate`, one by one."""

    name, part = "naive", 1

    def open(self, requests: Sequence[Prepared]) -> None:
        # The first call of `generate` takes seconds more than those that follow.
        with self.host.as_made():
            self._answer(requests[0], 2)

    def group(self, share: int) -> int:
        return 1

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        with self.host.as_made():
            return timed(self.host.device, lambda: {r.key: self._answer(r) for r in requests})

    @torch.inference_mode()
    def _answer(self, request: Prepared, most: int | None = None) -> list[int]:
        ids = torch.tensor([list(request.token_ids)], device=self.host.device)
        out = self.host.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=most or answer_tokens(request),
            pad_token_id=0,
        )
        answer: list[int] = out[0, ids.shape[1] :].tolist()
        return answer


class Static(OnHost):
    """The package's plain batches of like lengths."""

    name = "static"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.part: int = host.plain.batch_size

    def group(self, share: int) -> int:
        return self.part

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        ordered = sorted(requests, key=lambda request: -len(request.token_ids))
        with self.host.as_made():
            self.host.free()
            return timed(self.host.device, lambda: drive(self.host.plain, ordered))


class Ours(OnHost):
    """The shared-prefix loop; `shares` False: the same loop, each prompt read whole."""

    def __init__(self, host: Host, shares: bool) -> None:
        super().__init__(host)
        self.shares = shares
        self.read_tokens = 0
        """Prompt tokens that the last run computed."""
        self.name = "ours" if shares else "unshared"
        assert host.loop is not None

    def run(self, requests: Sequence[Prepared]) -> tuple[float, Answers]:
        loop = self.host.loop
        assert loop is not None
        loop._scheduler.take_back()  # no prefix is known yet
        failures, read = loop._num_failures, loop._scheduler.read_tokens
        with contextlib.nullcontext() if self.shares else nothing_shared():
            result = timed(self.host.device, lambda: drive(loop, requests))
        if loop._num_failures > failures or loop._is_plain:
            raise RuntimeError("a pass failed and plain batches took over: see the log")
        self.read_tokens = loop._scheduler.read_tokens - read
        return result
