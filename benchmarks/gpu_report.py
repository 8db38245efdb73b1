"""What `gpu.py` prints and keeps of a cell: times, ratios, part of the roofline, correctness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from gpu_arms import Host, Ours
from gpu_check import gaps
from gpu_continuous import Continuous
from gpu_trials import Answers, Trial, ratio
from gpu_work import Cell, Machine, Size, roofline
from ragfleet.engines.protocol import Prepared
from workloads import count_tokens

AIMS: Final = {"continuous": 3.0, "naive": 20.0}
"""How many times faster than these ours shall be where 16 requests share a context."""
AIM_SHARE: Final = 16
CHECKED: Final = 2
"""Answers of each arm that are fed to the plain forward in each cell."""


def announce(name: str, cell: Cell, requests: Sequence[Prepared]) -> None:
    counts = count_tokens(requests)
    print(
        f"\n{name}, share {cell.share}, contexts of {cell.context_tokens}: {len(requests)}"
        f" requests, {counts.all:,} prompt tokens, {counts.shared:,} of them different",
        flush=True,
    )


def report(
    host: Host, size: Size, machine: Machine, cell: Cell, trials: Sequence[Trial]
) -> dict[str, Any]:
    """Print a cell, and give it for the JSON."""
    requests = trials[0].requests
    slots = host.loop.batch_size if host.loop is not None else len(requests)
    bound = roofline(
        size, requests, machine, slots=slots, itemsize=torch.finfo(host.model.dtype).bits // 8
    )
    by_name = {trial.arm.name: trial for trial in trials}
    print(
        f"  roofline {bound.seconds:.2f} s (arithmetic {bound.arithmetic_s:.2f} s, traffic"
        f" {bound.traffic_s:.2f} s)\n  {'arm':11}{'requests':>9}{'rounds':>7}{'seconds':>9}"
        f"{'records/s':>10}{'x naive':>9}{'x contin.':>10}{'% roof':>8}{'gap':>8}  first as naive"
    )
    arms = {}
    for name, trial in by_name.items():
        arms[name] = found = judge(host, trial, by_name, bound.seconds)
        print(f"  {name:11}{line_of(found, len(requests))}", *trial.notes, sep="; ", flush=True)
    aims = aims_of(cell, arms)
    for line in aims:
        print(f"  {line}", flush=True)
    counts = count_tokens(requests)
    return {
        "cell": vars(cell),
        "requests": len(requests),
        "prompt_tokens": {"all": counts.all, "shared": counts.shared},
        "roofline": vars(bound),
        "arms": arms,
        "aims": aims,
        "notes": host.loop.notes if host.loop is not None else [],
    }


def judge(host: Host, trial: Trial, all_: dict[str, Trial], bound_s: float) -> dict[str, Any]:
    naive, other = all_.get("naive"), all_.get("continuous")
    median = trial.median_s
    both = [key for key in trial.answers if naive is not None and key in naive.answers]
    alike = sum(trial.answers[key][0] == naive.answers[key][0] for key in both) if naive else 0
    answered = [request for request in trial.requests if request.key in trial.answers][:CHECKED]
    gap = None
    if answered:
        with host.as_made() as model:
            gap = max(gaps(model, answered, trial.answers))
    return {
        "requests": trial.count,
        "seconds": trial.seconds,
        "median_s": median,
        "x_naive": ratio(trial.seconds, naive.seconds) if naive else None,
        "x_continuous": ratio(trial.seconds, other.seconds) if other else None,
        "part_of_roofline": bound_s / median if median else None,
        "largest_gap": gap,
        "first_as_naive": [alike, len(both)],
        "notes": trial.notes,
        "attention": trial.arm.attention if isinstance(trial.arm, Continuous) else None,
        "read_tokens": trial.arm.read_tokens if isinstance(trial.arm, Ours) else None,
    }


def beside(trial: Trial, others: Mapping[str, tuple[list[float], Answers]]) -> dict[str, Any]:
    """Print how many times faster `trial` is than each of the others, and give it for the JSON."""
    ratios = {}
    for other, (seconds, answers) in others.items():
        ratios[other] = ratio(trial.seconds, seconds)
        common = [key for key in answers if key in trial.answers]
        alike = sum(answers[key][0] == trial.answers[key][0] for key in common)
        print(
            f"  {_number(ratios[other], 5, 2)} x {other}, first tokens alike {alike}/{len(common)}"
        )
    print("".join(f"  {note}\n" for note in trial.notes), end="", flush=True)
    found = {"seconds": trial.seconds, "median_s": trial.median_s, "requests": trial.count}
    return found | {"notes": trial.notes, "x_others": ratios}


def line_of(found: dict[str, Any], total: int) -> str:
    seconds, part = found["median_s"], found["part_of_roofline"]
    return (
        f"{found['requests']:9}{len(found['seconds']):7}{_number(seconds, 9, 2)}"
        f"{_number(total / seconds if seconds else None, 10, 1)}{_number(found['x_naive'], 9, 2)}"
        f"{_number(found['x_continuous'], 10, 2)}{_number(part and 100 * part, 8, 1)}"
        f"{_number(found['largest_gap'], 8, 3)}  {'/'.join(map(str, found['first_as_naive']))}"
    )


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def aims_of(cell: Cell, arms: dict[str, Any]) -> list[str]:
    ours = arms.get("ours", {})
    lines = []
    for name, aim in AIMS.items() if cell.share == AIM_SHARE else ():
        found = ours.get(f"x_{name}")
        if found is not None:
            word = "reached" if found >= aim else "MISSED"
            lines.append(f"aim {aim:g} x {name}: {found:.2f}, {word}")
    return lines


def recap(name: str, records: Sequence[dict[str, Any]]) -> None:
    """A line for each cell of a size, for whoever sees the end of the output alone."""
    print(f"\n{name}: ours", flush=True)
    for record in records:
        cell, ours = record["cell"], record["arms"].get("ours", {})
        print(
            f"  share {cell['share']:2}, contexts of {cell['context_tokens']:4}:"
            f" {_number(ours.get('x_naive'), 6, 2)} x naive,"
            f" {_number(ours.get('x_continuous'), 6, 2)} x continuous,"
            f" {_number(100 * (ours.get('part_of_roofline') or 0), 5, 1)} % of the roofline,"
            f" gap {_number(ours.get('largest_gap'), 5, 3)}",
            flush=True,
        )


def add_to(file: Path | None, record: dict[str, Any]) -> None:
    """A cell once more takes the place of what stands there."""
    if file is None:
        return
    whole = json.loads(file.read_text())
    others = [one for one in whole["cells"] if key_of(one) != key_of(record)]
    whole["cells"] = [*others, record]
    file.write_text(json.dumps(whole, indent=1) + "\n")


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["size"], record["cell"]["share"], record["cell"]["context_tokens"])
