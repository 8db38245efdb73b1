"""The lines a run begins with: what is asked, of what, how, where. Text only."""

from __future__ import annotations

import platform

import ragfleet
from ragfleet.estimates import Prefill
from ragfleet.index import Kind
from ragfleet.plain_text import one_line
from ragfleet.plan import Plan
from ragfleet.planning import Finished, Indexed
from ragfleet.precision import resolve_precision
from ragfleet.preparation import Preparation, pocket_folder


def header_lines(
    preparation: Preparation,
    indexed: Indexed,
    plan: Plan,
    finished: Finished,
    prefill: Prefill | None = None,
) -> list[str]:
    config = preparation.config
    lines = [
        f"ragfleet {ragfleet.__version__} · run {preparation.identity.run_key.hex()[:6]}"
        f" · {platform.node()}",
        _row("Input", *input_lines(indexed)),
        _row("Model", _model(preparation)),
        _row("Sampling", _sampling(preparation)),
        _row("Workers", *_workers(preparation, plan)),
        *([_row("Prefill", *prefill_lines(prefill))] if prefill is not None else []),
        _row(
            "Output",
            f"{config.output_file} (written at the end), shards beside it:"
            f" {config.output_file.stem}_rank*.jsonl;"
            f" logs: {preparation.paths.directory.name}/logs",
        ),
    ]
    notes = list(preparation.notes)
    if finished.num_invalid:
        notes.append(f"{finished.num_invalid:,} lines of the shards are no results; ignored.")
    if finished.num_superfluous:
        notes.append(
            f"{finished.num_superfluous:,} finished answers in the shards belong to records that"
            " are not selected now; they stay there."
        )
    lines += [_row("Note" if number == 0 else "", note) for number, note in enumerate(notes)]
    return lines


def input_lines(indexed: Indexed) -> list[str]:
    """What is in the contexts file, and what is wrong with it."""
    index = indexed.index
    total, selected = len(index), indexed.num_selected
    chosen = "all selected" if selected == total else f"{selected:,} of {total:,} selected"
    kinds = [
        index.records["kind"][part.start : part.stop] for part in indexed.selected if len(part)
    ]
    invalid = sum(int((kind == Kind.INVALID).sum()) for kind in kinds)
    failed = sum(int((kind == Kind.FAILED_CONTEXT).sum()) for kind in kinds)
    equal = selected - invalid - failed - int(indexed.requests.sum())
    facts = [f"{index.path}: {total:,} lines, {chosen}"]
    if invalid:
        facts.append(f"{invalid:,} invalid")
    if failed:
        facts.append(f"{failed:,} with a failed context")
    if equal:
        facts.append(f"{equal:,} equal to an earlier one (generated once)")
    if index.num_missing_ids:
        facts.append(f"{index.num_missing_ids:,} without an id")
    if index.num_repeated_ids:
        facts.append(f"{index.num_repeated_ids:,} with an id that an earlier line has too")
    lines = [" · ".join(facts)]
    lines += [f"line {number}: {reason}" for number, reason in index.first_invalid[:3]]
    if len(index.first_invalid) > 3 and invalid > 3:
        lines.append(f"(and {invalid - 3:,} more invalid lines; each gets a failure row)")
    return lines


def prefill_lines(prefill: Prefill) -> list[str]:
    """What has to be computed of the prompts, and what sharing saves of it."""
    prompts, shared = prefill.prompts.total, prefill.shared.total
    less = f" ({1 - shared / prompts:.0%} less)" if 0 < shared < prompts else ""
    source = "counted" if prefill.is_exact else f"from {prefill.num_sampled:,} sampled prompts"
    lines = [f"{prefill.prompts} prompt tokens; each prefix once {prefill.shared}{less}, {source}"]
    if prefill.planned.total > prefill.shared.total * 1.005:
        lines.append(f"as planned {prefill.planned}: prefixes again where a group is cut or apart")
    if prefill.num_too_long is not None and prefill.num_too_long.total:
        lines.append(f"{prefill.num_too_long} prompts are too long for the model with this answer")
    if prefill.num_failing.total:
        lines.append(
            f"{prefill.num_failing} prompts can't be made and get failure rows; the first:"
            f" {one_line(prefill.first_failure or '')}"
        )
    return lines


def resume_line(starts: int, finished: int, to_do: int) -> str:
    if not to_do:
        return f"Nothing to generate: all {finished:,} requests are finished."
    return f"Resuming (start {starts + 1}): {finished:,} kept, {to_do:,} to do."


def leftovers_line(pids: list[int]) -> str:
    names = ", ".join(map(str, pids))
    return f"Ended what an earlier start had left behind when it was killed: process {names}."


def _model(preparation: Preparation) -> str:
    config = preparation.config
    if preparation.engine == "echo":
        base = "echo: no model, answers repeat the query"
    elif preparation.remote is not None:
        remote = preparation.remote
        base = f"{remote.model} · {remote.provider} · {remote.base_url} · {remote.api_format}"
        if remote.api_mode == "batch":
            base += " · in batches"
    elif preparation.model_dir is None:
        base = "none"
    else:
        origin = "on CPU"
        if preparation.allocation.gpus_per_worker:
            own = resolve_precision(config, preparation.model_dir, True)
            origin = (
                "checkpoint's own" if own == preparation.precision else f"the checkpoint has {own}"
            )
        why = f" ({origin})" if config.precision == "auto" else ""
        name = config.model_path
        if preparation.model_dir == pocket_folder():
            name = f"{name}, the demo model of 3.8 M parameters"
        base = f"{name} · {preparation.engine} · {preparation.precision}{why}"
    return f"{config.inference_class} around {base}" if config.inference_class else base


def _sampling(preparation: Preparation) -> str:
    config = preparation.config
    if config.temperature == 0:
        how = "greedy (temperature 0)"
    else:
        seed = "no seed" if config.seed is None else f"seed {config.seed}"
        how = f"temperature {config.temperature:g}, top_p {config.top_p:g}, {seed}"
    stop = f", stop {list(config.stop)}" if config.stop else ""
    return f"{how}, max_new_tokens {config.max_new_tokens}{stop}"


def _workers(preparation: Preparation, plan: Plan) -> list[str]:
    num = preparation.num_workers
    each = preparation.allocation.gpus_per_worker
    where = f"{each} GPU each" if each else "CPU"
    if preparation.remote is not None:
        where = f"up to {preparation.remote.max_concurrency} requests under way"
    groups = f"{len(plan.order):,} requests in {plan.num_groups:,} prefix groups"
    lines = [
        f"{num} × {where}, schedule {preparation.config.schedule} · {groups},"
        f" {len(plan.chunks):,} chunks"
    ]
    return lines + (preparation.allocation.describe().splitlines() if each else [])


def _row(label: str, *lines: str) -> str:
    first, *rest = lines
    return "\n".join([f"{label:<9} {first}", *(f"{'':<9} {line}" for line in rest)])
