"""The shared-prefix loop on one GPU, beside what transformers itself offers there.

    python benchmarks/gpu.py check
    python benchmarks/gpu.py table [--sizes 1b 8b] [--shares 1 4 16] [--contexts 512 4096]
    python benchmarks/gpu.py table --tiny          all of it with toy sizes, on the CPU

`table`: random models of Llama's 1 B and 8 B shapes in bf16, a process each, made on the GPU. All
arms answer the same random token ids (`gpu_work.py`) with the same model object, in turns:

  naive       `generate`, batch size 1
  static      the package's plain batches of like lengths
  continuous  transformers' continuous batching; where the flash-attn package is missing, with the
              same kernel out of torch in its place (`gpu_flash.py`)
  stock       the same with the attention that transformers chooses by itself; only if asked for
  unshared    our loop, each prompt read whole
  ours        our loop
  vllm        raw `LLM.generate`; only if asked for, and when all those above are done
  ours_on_vllm  this package's engine on it, likewise

Random weights end no answer, so each request says how long its answer is, and all arms stop
there. Arms answer all requests in each of three rounds, and in each round other ids, which no cache
knows. But naive answers one and static a batch, and their time is scaled by tokens
(`gpu_trials.py`). These two and `unshared` take three rounds only where the aims are, for their
work knows no shares.
`--seconds` is for all of it: what it does not hold is left out. Ours has four tenths of the free
memory for keys and values, continuous batching six tenths of the rest.

`% of roofline`: the longer one of the arithmetic at the speed of a large matrix product and of the
traffic at that of a large copy, both measured first, each shared token read once, over the time.
`gap`: how far the logit of a chosen token is below the largest one in the model's plain forward,
in standard deviations, at most (naive's own: what rounding does); a wrong token has about four.
`check` is correctness alone, in fp32 and bf16, for four architectures; there gaps in bf16 are those
in an fp32 copy of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

# As workers have it; before torch starts its threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers

from gpu_arms import Host, Naive, Ours, Static, make_model, measure_machine
from gpu_check import check, profile
from gpu_continuous import Continuous
from gpu_report import AIM_SHARE, add_to, announce, beside, recap, report
from gpu_trials import Answers, Arm, Trial, measure
from gpu_work import SIZES, Cell, Size, in_other_ids, make_requests
from ragfleet.engines.protocol import Prepared
from ragfleet.engines.shared_prefix.loop import Unsupported

ARMS: Final = ("naive", "static", "continuous", "unshared", "ours")
VLLM_ARMS: Final = ("vllm", "ours_on_vllm")
ALL_ARMS: Final = (*ARMS, "stock", *VLLM_ARMS)
SHARE_NOTHING: Final = ("naive", "static", "unshared")
"""One round of these is enough where the aims are not: what they do knows no shares."""
Done = tuple[Cell, dict[str, Any], dict[str, tuple[list[float], Answers]]]
"""A cell, what was kept of it, and each arm's times and answers."""
GRACE_S: Final = 45
"""A size that takes so much longer than it may is ended: an arm hangs."""
VLLM_PART: Final = 0.3
"""Of the time, for each arm of vLLM's: it compiles and captures for a minute."""


# ---- one size, in a process of its own


def run_size(args: argparse.Namespace, name: str) -> None:
    until_s = time.monotonic() + args.until - time.time()
    device, size = device_of(args), SIZES[name]
    cells = cells_of(args, size)
    machine = measure_machine(device, torch.bfloat16)
    started_s = time.monotonic()
    model = make_model(size, torch.bfloat16, device)
    model_s = time.monotonic() - started_s
    number = sum(p.numel() for p in model.parameters())
    say(
        f"\n{name}: {number / 1e9:.2f} B weights made in {model_s:.1f} s; matrix product"
        f" {machine.flops / 1e12:.1f} TFLOPS, copy {machine.bytes_per_s / 1e9:.0f} GB/s\n"
    )
    host = Host(
        model,
        most_tokens=max(cell.most_tokens for cell in cells),
        most_new=max(cell.answer_tokens[1] for cell in cells),
        slots=args.slots,
        static=args.static_batch,
    )
    arms = make_arms(host, args.arms)
    if args.profile and host.loop is not None:
        profile(host, make_requests(cells[0], size.vocab), args.profile)
        say(f"  {args.profile}: one pass of reading and one of decoding\n")
    on_vllm = [arm for arm in VLLM_ARMS if arm in args.arms]
    arms_until_s = until_s - VLLM_PART * len(on_vllm) * (until_s - time.monotonic())
    done: list[Done] = []
    for index, cell in enumerate(cells):
        cell_until_s = part_of(arms_until_s, cells[index:])
        prompts = prompts_of(cell, size, args.rounds)
        trials = [Trial(arm, prompts[: 1 + rounds_of(args, arm, cell)], cell.share) for arm in arms]
        announce(name, cell, prompts[1])
        record = {"size": name, "machine": vars(machine), "model_s": model_s}
        if trials:
            measure(trials, until_s=cell_until_s, clock=time.monotonic, say=say)
            record |= report(host, size, machine, cell, trials)
        else:
            record |= {"cell": vars(cell), "requests": len(prompts[1]), "arms": {}}
        add_to(args.json, record)
        done.append((cell, record, {t.arm.name: (t.seconds, t.answers) for t in trials}))
    recap(name, [record for _, record, _ in done])
    if on_vllm:
        host.close()  # first: ours renames layers while it uses them
        model.save_pretrained(args.folder)
        del model, host.model, host.plain, arms, trials
        host.free()
        run_vllm(args, name, on_vllm, done, until_s)


def prompts_of(cell: Cell, size: Size, rounds: int) -> list[list[Prepared]]:
    """Those that warm up, then those of each round."""
    requests = make_requests(cell, size.vocab)
    return [in_other_ids(requests, turn, size.vocab) for turn in range(1 + rounds)]


def part_of(until_s: float, cells: Sequence[Cell]) -> float:
    """Until when the first of `cells` may run, where all have until `until_s`. A longer context
    gets more, though not as much more as it needs, and so do those that the aims are about."""
    costs = [(1 + cell.context_tokens / 4096) * (1 + (cell.share == AIM_SHARE)) for cell in cells]
    now_s = time.monotonic()
    return now_s + (until_s - now_s) * costs[0] / sum(costs)


def rounds_of(args: argparse.Namespace, arm: Arm, cell: Cell) -> int:
    rounds: int = args.rounds
    return 1 if arm.name in SHARE_NOTHING and cell.share != AIM_SHARE else rounds


def make_arms(host: Host, names: Sequence[str]) -> list[Arm]:
    makers: dict[str, Callable[[], Arm]] = {
        "naive": lambda: Naive(host),
        "static": lambda: Static(host),
        "continuous": lambda: Continuous(host, stock=False),
        "stock": lambda: Continuous(host, stock=True),
        "unshared": lambda: Ours(host, False),
        "ours": lambda: Ours(host, True),
    }
    wanted = [name for name in makers if name in names]
    if {"ours", "unshared"} & set(wanted):
        try:
            host.start()
        except Unsupported as error:
            say(f"  ours is left out: {error}\n")
            wanted = [name for name in wanted if name not in ("ours", "unshared")]
    arms: list[Arm] = [makers[name]() for name in wanted]
    for line in (*host.notes, *(f"{a.name}: {a.what}" for a in arms if isinstance(a, Continuous))):
        say(f"  {line}\n")
    return arms


def cells_of(args: argparse.Namespace, size: Size) -> list[Cell]:
    """What the aims are about first, so that it has its time even if others take more."""
    cells = []
    for share in sorted(args.shares, reverse=True):
        for context in sorted(args.contexts):
            number = args.requests or size.requests // (1 if context < 2048 else 4)
            tiny: Any = {"head_tokens": 20, "question_tokens": (4, 9), "answer_tokens": (3, 8)}
            cells.append(
                Cell(
                    share=share,
                    context_tokens=context,
                    num_requests=max(number, share),
                    seed=len(cells),
                    **(tiny if args.tiny else {}),
                )
            )
    return cells


def run_vllm(
    args: argparse.Namespace,
    name: str,
    wanted: Sequence[str],
    done: Sequence[Done],
    until_s: float,
) -> None:
    """vLLM on the same cells, beside the times that the others had."""
    from gpu_vllm import OursOnVllm, RawVllm

    cells = [cell for cell, _, _ in done]
    most_tokens = max(cell.most_tokens for cell in cells)
    most_new = max(cell.answer_tokens[1] for cell in cells)
    start_s = 0.0
    makers = [make for make in (RawVllm, OursOnVllm) if make.name in wanted]
    for place, make in enumerate(makers):
        others_left = len(makers) - place - 1
        started_s = time.monotonic()
        try:
            arm = make(args.folder, most_tokens, most_new)
        except Exception as error:  # whatever vLLM raises; the other one may go
            traceback.print_exc()
            say(f"\n{name}, {make.name}: failed: {type(error).__name__}: {error}\n")
            gc.collect()
            continue
        now_s = time.monotonic()
        start_s = now_s - started_s  # the next one's is no longer: what is compiled is kept
        arm_until_s = now_s + (until_s - now_s - others_left * start_s) / (1 + others_left)
        say("".join(f"  {note}\n" for note in arm.notes))
        try:
            for index, (cell, record, others) in enumerate(done):
                prompts = prompts_of(cell, SIZES[name], args.rounds)
                trial = Trial(arm, prompts, cell.share)
                announce(f"{name}, {arm.name}", cell, prompts[1])
                cell_until_s = part_of(arm_until_s, cells[index:])
                measure([trial], until_s=cell_until_s, clock=time.monotonic, say=say)
                record["arms"][arm.name] = beside(trial, others)
                others[arm.name] = (trial.seconds, trial.answers)
                add_to(args.json, record)
                if trial.failed:  # its engine may still hold requests of this cell
                    break
        finally:
            arm.end()


# ---- the whole


def table(args: argparse.Namespace) -> int:
    until = time.time() + args.seconds
    header = {"where": where(args), "cells": []}
    if args.json is not None:
        args.json.write_text(json.dumps(header, indent=1) + "\n")
    failed = 0
    for index, name in enumerate(args.sizes):
        parts = [SIZES[one].step_weights ** 0.5 for one in args.sizes[index:]]
        left_s = (until - time.time()) * parts[0] / sum(parts)
        inside = ["--inside", name, "--until", str(time.time() + left_s)]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *sys.argv, *inside, "--folder", folder]
            failed |= run_alone(command, left_s + GRACE_S)
    return failed


def run_alone(command: Sequence[str], limit_s: float) -> int:
    """Its exit status, 1 where it was ended: with all that it started, for vLLM's own process holds
    the GPU beyond the end of the one that began it."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        say(f"\nended, for it was not done {GRACE_S} s after its time\n")
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def where(args: argparse.Namespace) -> dict[str, Any]:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    device = device_of(args)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm": version("vllm") if {*VLLM_ARMS} & {*args.arms} else None,
        "commit": commit or "unknown",
        "environment": {name: os.environ[name] for name in os.environ if name.startswith("VLLM_")},
        "args": {name: str(value) for name, value in vars(args).items()},
    }


def device_of(args: argparse.Namespace) -> torch.device:
    if args.tiny or (args.what == "check" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --tiny runs toy sizes on the CPU")
    return torch.device("cuda", 0)


def say(text: str) -> None:
    print(text, end="", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("check", "table"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--shares", nargs="+", type=int, help="requests of a context")
    parser.add_argument("--contexts", nargs="+", type=int, help="tokens")
    parser.add_argument("--requests", type=int, help="of a cell")
    parser.add_argument("--arms", nargs="+", choices=ALL_ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=480, help="for the whole table")
    parser.add_argument("--slots", type=int, help="of ours; the package's default if left out")
    parser.add_argument("--static_batch", type=int, help="the package's default if left out")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--profile", type=Path, help="where torch.profiler's tables of ours go")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.sizes = ["tiny"]
        args.slots, args.static_batch = args.slots or 8, args.static_batch or 4
    args.shares = args.shares or ([1, 4] if args.tiny else [1, 4, 16])
    args.contexts = args.contexts or ([40] if args.tiny else [512, 4096])
    args.arms = args.arms or [*ARMS, *(["stock"] if args.tiny else [])]
    if {*VLLM_ARMS} & {*args.arms} and importlib.util.find_spec("vllm") is None:
        parser.error("--arms: this interpreter has no vLLM")
    return args


def main() -> int:
    args = parse_args()
    transformers.logging.set_verbosity_error()
    if args.tiny:
        torch.set_num_threads(1)  # more only wait for each other
    if args.inside:
        run_size(args, args.inside)
        return 0
    if args.what == "check":
        return 0 if check(device_of(args), tiny=args.tiny) else 1
    return table(args)


if __name__ == "__main__":
    sys.exit(main())
