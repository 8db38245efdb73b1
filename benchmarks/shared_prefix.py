"""The shared-prefix loop against plain generation, on the CPU.

    python benchmarks/shared_prefix.py compare [--quick] [--arch llama] [--shape shared]
    python benchmarks/shared_prefix.py memory

`compare` runs its arms interleaved in one process, on the same token ids (`workloads.py`):

  naive    `generate`, batch size 1, file order, every record: what one writes first
  static   `generate`, batches of like lengths, each key once
  ours     the transformers engine as it is by default, each key once, prefixes together

`--naive_every N` times the naive arm on every N-th record and scales it by its prompt and answer
tokens; answers are compared on those records. The floor is the arithmetic that the prompts need,
each shared token read once, at the speed of this machine's matrix product, measured at the start of
the same run. `memory`: contexts of 100 to 3,000 tokens within a budget. Two workers against one:
`two_workers.py`; beside vLLM: `throughput.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As workers have it; before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers

from ragfleet.engines.protocol import Completion, EngineSpec, Prepared, PromptSettings
from ragfleet.engines.shared_prefix.loop import SharedPrefixLoop
from ragfleet.engines.transformers import TransformersEngine
from ragfleet.prompts import DEFAULT_SYSTEM_PROMPT
from workloads import (
    ARCHITECTURES,
    SHAPES,
    WorkloadSpec,
    count_tokens,
    distinct,
    grouped,
    make_model,
    make_records,
    tokenised,
)

MODELS = Path(tempfile.gettempdir()) / "ragfleet-benchmark-models"
Answers = dict[bytes, tuple[int, ...]]


# ---- arms


def make_engine(
    model_dir: Path, spec: WorkloadSpec, threads: int, args: argparse.Namespace, **more: Any
) -> TransformersEngine:
    engine = TransformersEngine(
        EngineSpec(
            model_dir=model_dir,
            sampling=spec.sampling,
            prompts=PromptSettings(system_prompt=DEFAULT_SYSTEM_PROMPT),
            precision=args.precision,
            num_threads=threads,
            **more,
        )
    )
    info = engine.start()
    if args.verbose:
        print(info, file=sys.stderr)
    return engine


def drive(
    engine: TransformersEngine, requests: Sequence[Prepared], afresh: bool = False
) -> Answers:
    """As the worker does: fill while there is room, step. `afresh`: no prefix is known yet."""
    if afresh and isinstance(engine._loop, SharedPrefixLoop):
        engine._loop._scheduler.take_back()
    answers: Answers = {}
    waiting = list(reversed(requests))
    while waiting or len(answers) < len(requests):
        while waiting and engine.has_room(waiting[-1]):
            engine.submit(waiting.pop())
        for outcome in engine.step(1.0):
            assert isinstance(outcome, Completion), outcome
            answers[outcome.key] = tuple(outcome.token_ids)
    return answers


def naive(model: Any, requests: Sequence[Prepared], max_new_tokens: int, eos: int) -> Answers:
    answers: Answers = {}
    for request in requests:
        ids = torch.tensor([list(request.token_ids)])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos,
                pad_token_id=0,
            )
        answers[request.key] = tuple(t for t in out[0, ids.shape[1] :].tolist() if t != eos)
    return answers


def load_plain(model_dir: Path, precision: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(model_dir),
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
        local_files_only=True,
    )
    return model.eval()


# ---- the limit


def matrix_gflops(dtype: torch.dtype) -> float:
    """Of a large matrix product: the best of ten."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    best = min(timed(lambda: torch.mm(a, b))[0] for _ in range(10))
    return 2 * 2048**3 / best / 1e9


def copy_gbytes() -> float:
    """Bytes read and written in a second by a copy that no cache holds."""
    a, b = torch.empty(64 << 20), torch.empty(64 << 20)
    best = min(timed(lambda: b.copy_(a))[0] for _ in range(5))
    return 2 * a.nbytes / best / 1e9


def arithmetic(model: Any, requests: Sequence[Prepared], new_tokens: int) -> float:
    """Floating-point operations that the answers to `requests` need, shared tokens read once."""
    config = model.config
    layers = list(model.get_decoder().layers)
    per_layer = sum(p.numel() for p in layers[0].parameters() if p.dim() == 2)
    kv = sum(getattr(layers[0].self_attn, n).weight.numel() for n in ("k_proj", "v_proj"))
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * layers[0].self_attn.head_dim
    counts = count_tokens(requests)
    once = distinct(requests)
    # A prompt token goes through all layers, in the last one only for its keys and values.
    linear = counts.shared * (per_layer * (len(layers) - 1) + kv)
    linear += len(once) * new_tokens * (per_layer * len(layers) + head)
    mean = counts.distinct / len(once)
    seen = counts.shared * mean / 2 + len(once) * new_tokens * mean
    return 2 * linear + 4 * width * len(layers) * seen


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


# ---- compare


def compare(args: argparse.Namespace) -> dict[str, Any]:
    spec = sized(SHAPES[args.shape], args)
    model_dir = make_model(args.arch, MODELS)
    records = make_records(spec)
    requests = tokenised(records, model_dir, spec.sampling)
    best = grouped(distinct(requests))
    sample = requests[:: args.naive_every]
    torch.set_num_threads(args.threads)
    plain = load_plain(model_dir, args.precision)
    gflops = matrix_gflops(plain.dtype)
    floor_s = arithmetic(plain, requests, spec.max_new_tokens) / gflops / 1e9
    print(
        f"{args.arch}, {args.precision}, {args.threads} threads, {args.shape}: {len(requests)}"
        f" records, {count_tokens(requests)}; matrix product {gflops:.0f} GFLOPS, copy"
        f" {copy_gbytes():.1f} GB/s; arithmetic floor {floor_s:.1f} s"
    )
    ours = make_engine(model_dir, spec, args.threads, args)
    static = make_engine(
        model_dir, spec, args.threads, args, prefix_sharing="off", batch_size=args.static_batch
    )
    arms: dict[str, Callable[[], Answers]] = {
        "naive": lambda: naive(plain, sample, spec.max_new_tokens, 3),
        # The engine sorts a window by length; here it gets them sorted altogether.
        "static": lambda: drive(static, sorted(best, key=lambda r: -len(r.token_ids))),
        "ours": lambda: drive(ours, best, afresh=True),
    }
    scale = work(requests, spec) / work(sample, spec)
    drive(ours, best[:8])  # first calls set up threads and buffers
    naive(plain, sample[:2], 4, 3)
    times: dict[str, list[float]] = {name: [] for name in arms if name in args.arms}
    answers: dict[str, Answers] = {}
    for number in range(args.rounds):
        for name, seconds_of in times.items():
            seconds, answers[name] = timed(arms[name])
            seconds_of.append(seconds * (scale if name == "naive" else 1))
            print(f"  round {number + 1} {name}: {seconds_of[-1]:.1f} s", flush=True)
    result: dict[str, Any] = {"floor_s": floor_s, "gflops": gflops, "times_s": times}
    reference = answers.get("naive", answers["ours"])
    for name, seconds_of in times.items():
        median = statistics.median(seconds_of)
        ratios = [n / s for n, s in zip(times.get("naive", seconds_of), seconds_of, strict=True)]
        common = reference.keys() & answers[name].keys()
        same = sum(reference[key] == answers[name][key] for key in common)
        print(
            f"{name:8} {median:7.1f} s  {statistics.median(ratios):5.2f} x naive"
            f"  {100 * floor_s / median:3.0f} % of the floor's speed"
            f"  identical {same}/{len(common)}"
        )
        result[name] = {"median_s": median, "ratio": statistics.median(ratios), "same": same}
    print(ours._loop.summary())  # type: ignore[union-attr]
    return result


def work(requests: Sequence[Prepared], spec: WorkloadSpec) -> float:
    """What the naive arm's time grows with; a decoded token costs it as much as 20 read ones."""
    return sum(len(r.token_ids) + 20 * spec.max_new_tokens for r in requests)


# ---- memory


def memory(args: argparse.Namespace) -> dict[str, Any]:
    spec = sized(SHAPES["mixed"], args)
    model_dir = make_model("llama", MODELS)
    requests = grouped(distinct(tokenised(make_records(spec), model_dir, spec.sampling)))
    lengths = [len(r.token_ids) for r in requests]
    print(f"{len(requests)} prompts of {min(lengths)} to {max(lengths)} tokens")
    engine = make_engine(model_dir, spec, args.threads, args, kv_cache_bytes=args.kv_cache_bytes)
    loaded = peak_rss()
    seconds, _ = timed(lambda: drive(engine, requests))
    loop = engine._loop
    print(loop.summary())  # type: ignore[union-attr]
    print(
        f"budget {args.kv_cache_bytes:,} bytes, allocated {loop._cache.num_bytes:,};"  # type: ignore[union-attr]
        f" peak memory {peak_rss():,} bytes, {loaded:,} of them after loading; {seconds:.1f} s"
    )
    return {"seconds": seconds, "peak_rss": peak_rss(), "loaded_rss": loaded}


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sized(spec: WorkloadSpec, args: argparse.Namespace) -> WorkloadSpec:
    if not args.quick:
        return spec
    return dataclasses.replace(
        spec, num_records=spec.num_records // 4, num_contexts=spec.num_contexts // 4
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compare", "memory"))
    parser.add_argument("--quick", action="store_true", help="a quarter of the records")
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="llama")
    parser.add_argument("--shape", choices=list(SHAPES), default="shared")
    parser.add_argument("--arms", nargs="+", default=["naive", "static", "ours"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--naive_every", type=int, default=4)
    parser.add_argument("--static_batch", type=int, default=16)
    parser.add_argument("--kv_cache_bytes", type=int, default=200_000_000)
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    result = compare(args) if args.what == "compare" else memory(args)
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        result |= {"args": vars(args), "versions": versions, "machine": platform.processor()}
        args.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
