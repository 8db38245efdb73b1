"""Whether the arms of `gpu.py` answer right, and where ours spends its time.

In fp32 all arms must give naive's tokens. In bf16 two right ways differ in rounding, and a near-tie
turns into another token; so there each answer is fed to a plain forward of the same weights in
fp32, which sides with nobody's rounding, and each of its tokens must have a logit near the largest
one: `gaps`. Naive's own gaps show what rounding does.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from gpu_arms import CONFIGS, Host, Naive, Ours, Static, make_model
from gpu_continuous import Continuous
from gpu_trials import Answers, Arm
from gpu_work import Cell, Size, answer_tokens, make_requests
from ragfleet.engines.protocol import Prepared
from ragfleet.engines.shared_prefix.loop import Unsupported

LARGEST_GAP: Final = 0.25
"""In bf16, in standard deviations of a position's logits. A token from anywhere has about four."""
SMALL: Final = Size(
    hidden=256,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    intermediate=512,
    vocab=2048,
    initializer_range=0.1,
)
CELL: Final = Cell(share=4, context_tokens=150, num_requests=24, answer_tokens=(4, 24))
TINY_CELL: Final = Cell(
    share=4, context_tokens=50, num_requests=12, head_tokens=20, answer_tokens=(2, 6)
)


@torch.inference_mode()
def gaps(model: Any, requests: Sequence[Prepared], answers: Answers) -> list[float]:
    """Of each token of the answers: how far its logit is below the largest, over the spread."""
    found: list[float] = []
    for request in requests:
        answer = answers[request.key]
        ids = torch.tensor([[*request.token_ids, *answer[:-1]]], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
        chosen = logits.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
        found += ((logits.amax(-1) - chosen) / logits.std(-1)).tolist()
    return found


def check(device: torch.device, *, tiny: bool) -> bool:
    """Correctness alone, of all architectures; prints as it goes."""
    cell = TINY_CELL if tiny else CELL
    right = True
    for dtype in (torch.float32, torch.bfloat16):
        for arch in CONFIGS:
            size = dataclasses.replace(SMALL, arch=arch, tied=arch.startswith("qwen"))
            model = make_model(size, dtype, device)
            most_new = cell.answer_tokens[1]
            host = Host(model, most_tokens=cell.most_tokens, most_new=most_new, slots=8, static=8)
            print(f"{arch}, {str(dtype).removeprefix('torch.')}:", flush=True)
            right &= _check_one(host, make_requests(cell, size.vocab))
            host.close()
    print("right" if right else "WRONG", flush=True)
    return right


def _check_one(host: Host, requests: Sequence[Prepared]) -> bool:
    exact = copy.deepcopy(host.model).float()
    arms: list[Arm] = [Naive(host), Static(host), Continuous(host, stock=True)]
    if host.model.dtype == torch.bfloat16:  # flash attention knows no fp32
        arms.append(Continuous(host, stock=False))
    right = True
    try:
        host.start()
        arms += [Ours(host, False), Ours(host, True)]
    except Unsupported as error:
        print(f"  ours is not there: {error}", flush=True)
        right = False
    expected: Answers = {}
    for arm in arms:
        arm.open(requests)
        try:
            _, answers = arm.run(requests)
        except Exception as error:  # an arm's library can raise anything; the others go on
            print(f"  {arm.name:11} failed: {type(error).__name__}: {error}", flush=True)
            right &= not _is_ours(arm)
            continue
        finally:
            arm.close()
        expected = expected or answers
        right &= _report(host, exact, arm, requests, answers, expected) or not _is_ours(arm)
    return right


def _is_ours(arm: Arm) -> bool:
    """What this project answers for."""
    return isinstance(arm, (Ours, Static))


def _report(
    host: Host,
    exact: Any,
    arm: Arm,
    requests: Sequence[Prepared],
    answers: Answers,
    expected: Answers,
) -> bool:
    same = sum(answers[request.key] == expected[request.key] for request in requests)
    found = gaps(exact, requests, answers)
    is_right = all(len(answers[r.key]) == answer_tokens(r) for r in requests)
    is_right &= max(found) <= LARGEST_GAP
    if host.model.dtype == torch.float32:
        is_right &= same == len(requests)
    print(
        f"  {arm.name:11} {same}/{len(requests)} as naive, gaps at most {max(found):.3f},"
        f" {statistics.mean(found):.5f} on average{'' if is_right else ': WRONG'}",
        flush=True,
    )
    return is_right


# ---- where the time goes


def profile(host: Host, requests: Sequence[Prepared], file: Path) -> None:
    """torch.profiler's tables of a pass that reads prompts, and of one that only decodes.

    As many requests as there are slots: once all are read, passes are rows alone.
    """
    loop = host.loop
    assert loop is not None
    scheduler = loop._scheduler
    scheduler.take_back()
    for request in requests[: loop.batch_size]:
        loop.submit(request)
    loop.step(0)  # step(0) is one pass, or one burst of decoding
    tables = [f"# a pass that reads prompts\n{_table(host, lambda: loop.step(0))}"]
    while scheduler.num_waiting or scheduler._reading:
        loop.step(0)
    loop.step(0)
    tables.append(f"# a pass, or a burst, of decoding\n{_table(host, lambda: loop.step(0))}")
    while loop._rows:
        loop.step(1)
    file.write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def _table(host: Host, call: Any) -> str:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if host.on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        call()
        if host.on_gpu:
            torch.cuda.synchronize(host.device)
    key = "self_device_time_total" if host.on_gpu else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=key, row_limit=40)
    return table
