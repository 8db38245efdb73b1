"""How fast engines answer the same work, side by side in one run.

    python benchmarks/throughput.py --quick [--vllm_python .venv-vllm/bin/python]
    python benchmarks/throughput.py [--rows shared …] [--arms …] [--rounds 3] [--json FILE]

Makes its work from documentation text (`workloads.py`), tokenises it once, and has every arm, a
process of its own with the same threads and model, answer these ids in turn:

  naive                  transformers `generate`, batch size 1, file order
  static                 `generate`, batches of 16 of like lengths, equal requests once
  raw vLLM: file         `vllm.LLM.generate` in file order, its prefix cache on
  raw vLLM: dedup        the same, equal requests once
  raw vLLM: best         equal requests once and those of one context together
  ours on transformers   equal requests once, in the order of ragfleet's planner, through the engine
  ours on vLLM           the same on vLLM
  …, a core each         a process of one thread for each core, as --num_workers auto starts them;
                         prefix groups are shared out whole, the slowest process counts (only
                         where --arms names them)

Loading is not counted, prefix caches are emptied before each pass, arms take turns in a round.
naive and static answer a part of the requests, naive another one in each round, and their time is
scaled to all by tokens (one of an answer counts 20 times, about what it costs them); they are asked
in the rows `shared` and `unshared` only, for other rows have the same requests in another order or
sampled ones. `floor` is the arithmetic that the prompts need, each shared token read once, at the
speed of this machine's own matrix product, measured first; `% of floor` is that over an arm's time.
`identical` compares greedy answers, token for token, with naive's; seeded ones of ours on vLLM with
ours on transformers (raw vLLM ends at seeds on the CPU, in 0.32). Arms on vLLM need the interpreter
of an environment that has it: `make test-vllm` makes .venv-vllm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from arm_processes import (
    ROOT,
    ArmEnded,
    ArmProcess,
    Work,
    Workers,
    closing_all,
)
from ragfleet import RunConfig
from ragfleet.engines.protocol import Prepared
from ragfleet.plan import CostModel
from ragfleet.planning import index_contexts, selection_of
from ragfleet.tokens import load_tokenizer
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
    write_records,
)

MODELS: Final = Path(tempfile.gettempdir()) / "ragfleet-benchmark-models"
RUNNING: Final = 256
"""Requests that vLLM runs at a time on the CPU; the cache must hold their own parts too."""


@dataclass(frozen=True)
class Row:
    """A workload, and how much of its distinct context tokens the KV cache has room for."""

    spec: WorkloadSpec
    cache_share: float | None = None
    """None: all of it."""


ROWS: Final = {
    "shared": Row(SHAPES["shared"]),
    "little cache": Row(SHAPES["shared"], cache_share=0.25),
    "grouped": Row(SHAPES["grouped"]),
    "unshared": Row(SHAPES["unshared"]),
    "seeded": Row(dataclasses.replace(SHAPES["shared"], temperature=0.1, seed=1)),
    "unseeded": Row(dataclasses.replace(SHAPES["shared"], temperature=0.1, seed=None)),
}
ARMS: Final = {  # arm → (its process, the order it answers in)
    "naive": ("naive", "sample"),
    "static": ("static", "batches"),
    "raw vLLM: file": ("raw vLLM", "file"),
    "raw vLLM: dedup": ("raw vLLM", "dedup"),
    "raw vLLM: best": ("raw vLLM", "best"),
    "ours on transformers": ("ours on transformers", "planned"),
    "ours on vLLM": ("ours on vLLM", "planned"),
    "raw vLLM: best, a core each": ("raw vLLM", "best"),
    "ours on transformers, a core each": ("ours on transformers", "planned"),
}
EACH: Final = ", a core each"
"""Arms of as many processes as there are threads, each with one of them."""
DEDUP_ROWS: Final = ("shared", "little cache")
"""Where the gains of dedup and of order are shown apart; elsewhere one of the two is nothing."""
PLAIN_ROWS: Final = ("shared", "unshared")
"""Where naive and static are asked."""


# ---- the work


def make_work(row: Row, args: argparse.Namespace, model_dir: Path, folder: Path) -> Work:
    spec = row.spec
    records = make_records(spec)
    requests = tokenised(records, model_dir, spec.sampling, spec.seed if spec.temperature else None)
    place: dict[bytes, int] = {}
    for number, request in enumerate(requests):
        place.setdefault(request.key, number)
    once = distinct(requests)
    by_length = sorted(once, key=lambda request: -len(request.token_ids))
    batches = [by_length[start : start + 16] for start in range(0, len(by_length), 16)]
    orders = {
        "file": list(range(len(requests))),
        "dedup": [place[request.key] for request in once],
        "best": [place[request.key] for request in grouped(once)],
        "planned": planned(records, spec, folder),
        "sample": list(range(len(requests))),
        "batches": [place[r.key] for batch in batches[:: args.static_every] for r in batch],
    }
    longest = max(len(request.token_ids) for request in requests) + spec.max_new_tokens
    max_model_len = -(-longest // 128) * 128
    counts = count_tokens(requests)
    cache_tokens = int(1.2 * counts.shared) + RUNNING * (spec.max_new_tokens + 256)
    if row.cache_share is not None:
        tokenizer = load_tokenizer(model_dir)
        contexts = {record["context"] for record in records}
        all_tokens = sum(len(tokenizer.encode(context, False)) for context in contexts)
        cache_tokens = max(int(row.cache_share * all_tokens), max_model_len + 256)
    kv_bytes = cache_tokens * kv_bytes_per_token(model_dir)
    return Work(requests, orders, counts, kv_bytes, max_model_len)


def planned(records: Sequence[dict[str, Any]], spec: WorkloadSpec, folder: Path) -> list[int]:
    """What one worker is given, in the order of its chunks: the package's own index and plan."""
    contexts = folder / "contexts.jsonl"
    write_records(records, contexts)
    config = RunConfig(
        contexts_file=contexts,
        output_file=folder / "results.jsonl",
        model_path="-",
        temperature=spec.temperature,
        max_new_tokens=spec.max_new_tokens,
    )
    indexed = index_contexts(selection_of(config, 1, []), bytes(16))
    plan = indexed.plan(
        indexed.requests, "dynamic", CostModel(answer_tokens=float(spec.max_new_tokens))
    )
    rows = [plan.order[int(chunk["start"]) : int(chunk["stop"])] for chunk in plan.chunks]
    return [int(row) for chunk in rows for row in chunk]


def model_config(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def kv_bytes_per_token(model_dir: Path) -> int:
    config = model_config(model_dir)
    heads: int = config["num_key_value_heads"]
    return 2 * int(config["num_hidden_layers"]) * heads * int(config["head_dim"]) * 4


def floor_seconds(
    work: Work, spec: WorkloadSpec, model_dir: Path, limits: dict[str, float]
) -> float:
    """Arithmetic at the speed of the matrix product, or reading the weights once a token."""
    config = model_config(model_dir)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = 2 * config["num_key_value_heads"] * config["head_dim"]
    per_layer = hidden * (2 * queries + keys) + 3 * hidden * config["intermediate_size"]
    head = config["vocab_size"] * hidden
    once = len(work.orders["dedup"])
    mean = work.counts.distinct / once
    # In the last layer a prompt's tokens are needed for their keys and values only.
    linear = work.counts.shared * (per_layer * (layers - 1) + hidden * keys)
    linear += once * spec.max_new_tokens * (per_layer * layers + head)
    seen = work.counts.shared * mean / 2 + once * spec.max_new_tokens * mean
    compute_s = (2 * linear + 4 * queries * layers * seen) / limits["gflops"] / 1e9
    weights = 4 * (per_layer * layers + head)
    return max(compute_s, spec.max_new_tokens * weights / limits["copy_gbytes_per_s"] / 1e9)


def cost(requests: Sequence[Prepared], spec: WorkloadSpec) -> int:
    return sum(len(request.token_ids) + 20 * spec.max_new_tokens for request in requests)


# ---- measuring


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    """Of all the row's requests; scaled, where an arm answers a part."""
    prefilled: int | None = None
    answers: dict[bytes, list[int]] = field(default_factory=dict)


def load_arms(
    arms: Sequence[str],
    work: Work,
    spec: WorkloadSpec,
    args: argparse.Namespace,
    model_dir: Path,
    processes: dict[str, ArmProcess | Workers],
    folder: Path,
) -> None:
    """Start what is not there yet, or has other settings, and wait until all have loaded."""
    settings = {
        "model": str(model_dir),
        "threads": args.threads,
        "max_new_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
        "kv_bytes": work.kv_bytes,
        "max_model_len": work.max_model_len,
    }
    for arm in arms:
        process_name = ARMS[arm][0]
        needs = ("model", "threads", "max_new_tokens")
        if "vLLM" in process_name:
            needs = (*needs, "kv_bytes", "max_model_len")
        key = process_of(arm)
        old = processes.get(key)
        if old is not None and any(old.settings[n] != settings[n] for n in needs):
            processes.pop(key).close()
        if key not in processes:
            python = args.vllm_python if "vLLM" in process_name else sys.executable
            made: ArmProcess | Workers
            if arm.endswith(EACH):
                made = Workers(process_name, python, settings, folder, args.threads)
            else:
                made = ArmProcess(process_name, python, settings, folder)
            processes[key] = made
    for arm in arms:  # they load together
        processes[process_of(arm)].warm_up(work, spec)


def measure_row(
    name: str,
    args: argparse.Namespace,
    model_dir: Path,
    processes: dict[str, ArmProcess | Workers],
    folder: Path,
) -> tuple[Work, dict[str, Measured]]:
    row = ROWS[name]
    spec = row.spec
    work = make_work(row, args, model_dir, folder)
    arms = [arm for arm in args.arms if arm != "raw vLLM: dedup" or name in DEDUP_ROWS]
    if name not in PLAIN_ROWS:
        arms = [arm for arm in arms if arm not in ("naive", "static")]
    found: dict[str, Measured] = {arm: Measured() for arm in arms}
    load_arms(arms, work, spec, args, model_dir, processes, folder)
    ended: set[str] = set()
    for number in range(args.rounds):
        for arm in arms:
            process_name, order_name = ARMS[arm]
            key = process_of(arm)
            if key in ended:
                continue
            if number and process_name in ("naive", "static") and args.quick:
                continue
            order = work.orders[order_name]
            if order_name == "sample":  # another part each round: after n rounds it was all
                order = order[number % args.naive_every :: args.naive_every]
            try:
                result = processes[key].answer(work, spec, order)
            except ArmEnded as error:  # the others go on; the next row starts it again
                print(f"  {name}, round {number + 1}, {arm}: {error}")
                processes.pop(key).close()
                ended.add(key)
                continue
            scale = 1.0
            if process_name in ("naive", "static"):
                whole = work.requests if process_name == "naive" else distinct(work.requests)
                scale = cost(whole, spec) / cost([work.requests[n] for n in order], spec)
            measured = found[arm]
            measured.seconds.append(result["seconds"] * scale)
            measured.prefilled = result["prefilled"] if scale == 1.0 else None
            for place, answer in zip(order, result["answers"], strict=True):
                measured.answers[work.requests[place].key] = answer
            print(f"  {name}, round {number + 1}, {arm}: {measured.seconds[-1]:.1f} s", flush=True)
    return work, {arm: found[arm] for arm in arms if process_of(arm) not in ended}


def process_of(arm: str) -> str:
    """The process, or processes, that answer for an arm."""
    return ARMS[arm][0] + (EACH if arm.endswith(EACH) else "")


def identical(
    found: dict[str, Measured], arm: str, spec: WorkloadSpec, naive: dict[bytes, list[int]]
) -> str:
    """With naive's answers; where draws are seeded, of ours on vLLM with ours on transformers."""
    expected = naive
    if spec.temperature:
        if spec.seed is None or arm != "ours on vLLM" or "ours on transformers" not in found:
            return "-"
        expected = found["ours on transformers"].answers
    answers = found[arm].answers
    if not expected:
        return "-"
    common = expected.keys() & answers.keys()
    return f"{sum(expected[key] == answers[key] for key in common)}/{len(common)}"


def report(
    name: str,
    work: Work,
    found: dict[str, Measured],
    floor_s: float,
    naive: dict[bytes, list[int]],
) -> list[dict[str, Any]]:
    """Print one row's table, and return it. Ratios are medians of the rounds' own ratios."""
    spec = ROWS[name].spec
    counts = work.counts
    print(
        f"\n{name}: {len(work.requests)} records, {len(work.orders['dedup'])} distinct; prompt"
        f" tokens {counts.all:,}, distinct {counts.distinct:,}, shared once {counts.shared:,};"
        f" temperature {spec.temperature:g}; floor {floor_s:.1f} s"
    )
    print(f"  {'arm':33} {'s':>7} {'x naive':>8} {'x raw file':>11} {'prefilled':>10}"
          f" {'% of floor':>10}  identical")  # fmt: skip
    lines = []
    for arm, measured in found.items():
        line: dict[str, Any] = {
            "row": name,
            "arm": arm,
            "seconds": measured.seconds,
            "x_naive": ratio(found, "naive", arm),
            "x_raw_file": ratio(found, "raw vLLM: file", arm),
            "prefilled_tokens": measured.prefilled,
            "floor_share": floor_s / statistics.median(measured.seconds),
            "identical": identical(found, arm, spec, naive),
        }
        lines.append(line)
        prefilled = "-" if measured.prefilled is None else f"{measured.prefilled:,}"
        print(
            f"  {arm:33} {statistics.median(measured.seconds):7.1f} {shown(line['x_naive']):>8}"
            f" {shown(line['x_raw_file']):>11} {prefilled:>10} {line['floor_share']:>9.0%}"
            f"   {line['identical']}"
        )
    for label, slow, fast in (
        ("dedup alone", "raw vLLM: file", "raw vLLM: dedup"),
        ("order alone", "raw vLLM: dedup", "raw vLLM: best"),
        ("ours on vLLM : raw in its best order", "raw vLLM: best", "ours on vLLM"),
        ("ours on transformers : raw vLLM in its best order", "raw vLLM: best",
         "ours on transformers"),
        (f"the same, each{EACH}", "raw vLLM: best" + EACH, "ours on transformers" + EACH),
        ("ours on transformers, a core each : raw vLLM in its best order", "raw vLLM: best",
         "ours on transformers" + EACH),
    ):  # fmt: skip
        value = ratio(found, slow, fast)
        if value is not None:
            print(f"    {label}: {value:.2f}")
            lines.append({"row": name, "ratio": label, "value": value})
    return lines


def ratio(found: dict[str, Measured], slow: str, fast: str) -> float | None:
    if slow not in found or fast not in found:
        return None
    a, b = found[slow].seconds, found[fast].seconds
    if len(a) != len(b):  # --quick measures naive once
        return statistics.median(a) / statistics.median(b)
    return statistics.median(one / other for one, other in zip(a, b, strict=True))


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ---- what it was measured on


def circumstances(args: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    ask = "import importlib.metadata as m; print({n: m.version(n) for n in %r})"
    cpu = [line for line in said("lscpu").splitlines() if "Model name" in line]
    versions = {"transformers": said(sys.executable, "-c", ask % (["torch", "transformers"],))}
    if args.vllm_python:
        versions["vllm"] = said(args.vllm_python, "-c", ask % (["torch", "transformers", "vllm"],))
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "versions": versions,
        "commit": said("git", "describe", "--always", "--dirty"),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        **limits,
    }


def scaled(fraction: float) -> None:
    for name, row in ROWS.items():
        spec = dataclasses.replace(
            row.spec,
            num_records=round(row.spec.num_records * fraction),
            num_contexts=round(row.spec.num_contexts * fraction),
        )
        ROWS[name] = dataclasses.replace(row, spec=spec)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a seventh of the records, one round")
    parser.add_argument("--vllm_python", help="interpreter of an environment with vLLM")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    usual = [arm for arm in ARMS if not arm.endswith(EACH)]
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=usual)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="llama")
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--fraction", type=float, help="of the records; default 1, --quick 0.15")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--naive_every", type=int, default=8, help="naive takes each n-th record")
    parser.add_argument("--static_every", type=int, default=3, help="static takes each n-th batch")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    scaled(args.fraction or (0.15 if args.quick else 1.0))
    if args.vllm_python is None and any("vLLM" in arm for arm in args.arms):
        print("vLLM's arms are left out: --vllm_python names no environment with vLLM")
        args.arms = [arm for arm in args.arms if "vLLM" not in arm]
    return args


def main() -> None:
    args = parse_args()
    model_dir = make_model(args.arch, MODELS)
    processes: dict[str, ArmProcess | Workers] = {}
    lines: list[dict[str, Any]] = []
    naive_answers: dict[bytes, list[int]] = {}
    with tempfile.TemporaryDirectory() as name, closing_all(processes):
        folder = Path(name)
        (folder / "limits.json").write_text(json.dumps({"threads": args.threads}))
        arm = str(ROOT / "benchmarks" / "throughput_arm.py")
        command = [sys.executable, arm, "limits", str(folder / "limits.json")]
        limits = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        facts = circumstances(args, limits)
        print(
            f"{facts['cpu']}, {args.threads} threads; matrix product {limits['gflops']:.0f} GFLOPS,"
            f" copy {limits['copy_gbytes_per_s']:.1f} GB/s; {args.arch}, fp32, commit"
            f" {facts['commit']}; {args.rounds} round(s)"
        )
        for row in args.rows:
            work, found = measure_row(row, args, model_dir, processes, folder)
            floor_s = floor_seconds(work, ROWS[row].spec, model_dir, limits)
            if "naive" in found:
                naive_answers |= found["naive"].answers
            lines += report(row, work, found, floor_s, naive_answers)
    if args.json:
        args.json.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
