"""Looking at a run without running it: its plan, its state, a merge of its shards.

Nothing here loads a model, torch included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ragfleet.accounting import estimate_lines
from ragfleet.beats import read_beats
from ragfleet.config import PlanConfig
from ragfleet.earlier_files import (
    before_replacing,
    extending_refused,
    finished_before,
    lacks_shards,
)
from ragfleet.errors import OutputError, UsageError, WorkersFailed
from ragfleet.estimates import plan_requests
from ragfleet.events import Event, OnEvent, reading
from ragfleet.header import header_lines
from ragfleet.identity import RunFile, read_run_file, write_run_file
from ragfleet.index import Kind
from ragfleet.launch import RunPaths
from ragfleet.launchers.torchrun import detect
from ragfleet.merge import write_results
from ragfleet.plan import Plan, static_slices
from ragfleet.planning import Finished, Indexed, find_finished, index_contexts, selection_of
from ragfleet.preparation import prepare
from ragfleet.privacy import is_private
from ragfleet.run_lock import RunLock, holder_of
from ragfleet.shards import partial_path


def plan_lines(config: PlanConfig, say: OnEvent) -> list[str]:
    """What `infer` would do with this configuration now. Raises UsageError as `infer` would."""
    preparation = prepare(config, os.environ, detect(os.environ))
    selection = selection_of(config, preparation.num_workers, preparation.key_fields)
    indexed = index_contexts(selection, preparation.identity.run_key, reading(say))
    finished = find_finished(indexed, preparation.paths.output_file)
    done, refused = finished.mask(indexed, config.retry_failed), None
    if config.overwrite:
        done = np.zeros_like(done)
    else:
        try:
            done = finished_before(preparation, indexed, finished)
        except UsageError as error:
            refused = str(error)
    if config.overwrite or refused is not None:  # the shards are another run's: nothing to note
        finished = dataclasses.replace(finished, num_invalid=0, num_superfluous=0)
    to_do = indexed.requests & ~done
    plan, prefill = plan_requests(
        preparation,
        indexed,
        to_do,
        config.exact_tokens,
        lambda count: say(Event("reading", f"counted the tokens of {count:,} prompts")),
    )
    lines = header_lines(preparation, indexed, plan, finished, prefill)
    if prefill is None and config.exact_tokens:
        lines.append("Tokens    are not counted: this engine's prompts are not known beforehand.")
    if done.any():
        lines.append(f"Finished  {int(done.sum()):,} requests by earlier starts; they are kept.")
    lines.append("Slices    (selected lines by the documented rule; what a worker generates)")
    costs = plan.slice_costs(preparation.num_workers)
    total_cost = sum(costs) or 1.0
    for worker, part in enumerate(indexed.selected):
        whole = static_slices(len(indexed.index), preparation.num_workers)[worker]
        mine = plan.chunks[plan.chunks["slice"] == worker]
        count = int((mine["stop"] - mine["start"]).sum())
        lines.append(
            f"          worker {worker}: lines {whole.start + 1:,}-{whole.stop:,},"
            f" {len(part):,} selected; generates {count:,} in {len(mine):,} chunks"
            f" ({costs[worker] / total_cost:.1%} of the cost)"
        )
    if len(plan.order):
        lines += balance_lines(plan, preparation.num_workers)
    if preparation.remote is not None:
        first, *more = estimate_lines(
            preparation.remote,
            indexed,
            indexed.requests & ~done,
            config.max_new_tokens,
            preparation.prompts.system_prompt,
        )
        lines += [f"Estimate  {first}", *(f"          {line}" for line in more)]
    if refused is not None:
        first, *more = refused.splitlines()
        lines += [f"Refused   infer would stop: {first}", *(f"          {line}" for line in more)]
    invalid = indexed.index.first_invalid
    lines += [f"Invalid   line {number}: {reason}" for number, reason in invalid[3:]]
    return lines


def balance_lines(plan: Plan, num_workers: int) -> list[str]:
    """How even the slices are, and what no schedule can be below."""
    over = max(plan.slice_costs(num_workers)) / plan.lower_bound_cost - 1
    even = plan.lower_bound_cost * num_workers <= plan.least_cost * (1 + 1e-9)
    why = f"an even share of {plan.least_cost:,.0f}" if even else "the costliest request"
    again = max(0.0, plan.planned_cost / plan.least_cost - 1)
    return [
        "Bound     no schedule ends before one worker has done work for"
        f" {plan.lower_bound_cost:,.0f} tokens ({why}; an answer counts as"
        f" {plan.answer_tokens:,.0f})",
        f"Balance   the busiest slice is planned {max(0.0, over):.1%} above that (before any"
        f" stealing); prefixes that are computed again add {again:.1%} to the work",
    ]


@dataclass(frozen=True)
class OutputOptions:
    """Which run to look at."""

    output_file: Path
    """The --output_file of the run."""


@dataclass(frozen=True)
class MergeOptions(OutputOptions):
    """Merge what the shards of a run hold, without generating anything."""

    partial: bool = False
    """Write what is finished to <stem>.partial.jsonl; the output file is not touched."""


def run_of(output_file: Path) -> tuple[RunPaths, RunFile]:
    whole = output_file.with_name(output_file.name.removesuffix(".partial.jsonl") + ".jsonl")
    paths = RunPaths(output_file.absolute())
    run_file = read_run_file(paths)
    if run_file is None and output_file == partial_path(whole):
        raise OutputError(
            f"{output_file} is a partial merge, which belongs to no run; name the output: {whole}."
        )
    if run_file is None or run_file.selection is None:
        raise OutputError(f"There is no run for {output_file}: {paths.identity} is missing.")
    return paths, run_file


def status_lines(options: OutputOptions) -> list[str]:
    """What is finished, from the shards and beats of a run that may be going on."""
    paths, run_file = run_of(options.output_file)
    assert run_file.selection is not None
    indexed = index_contexts(run_file.selection, bytes.fromhex(run_file.run_key))
    finished = find_finished(indexed, paths.output_file)
    if removed := _without_shards(paths, run_file, indexed, finished):
        return [removed]
    kept, total = int(finished.mask(indexed).sum()), int(indexed.requests.sum())
    succeeded = int(finished.mask(indexed, retry_failed=True).sum())
    lines = [
        f"{options.output_file}: {kept:,} of {total:,} requests finished"
        f" ({kept - succeeded:,} of them failed), {total - kept:,} remain; start {run_file.starts}."
    ]
    merged = run_file.merged
    is_there = paths.output_file.exists()
    is_merged = is_there and merged is not None and merged["digest"] == indexed.digest()
    if merged is not None and is_there:
        lines.append("Merged: " + ("complete." if is_merged else "of an earlier selection."))
    try:
        holder = holder_of(paths)
    except OSError as error:
        lines.append(f"Whether it runs can't be told: {paths.lock}: {error.strerror}.")
    else:
        if holder is not None:
            lines.append(f"Running: {holder}.")
        elif merged is not None and merged["shards_removed"] and not is_merged:
            lines.append(f"Nothing runs. {extending_refused(paths.output_file)}")
        elif kept < total:
            lines.append("Nothing runs; the same infer command goes on with it.")
        elif not is_merged:
            lines.append(
                "Nothing runs; the same infer command or ragfleet merge writes the output."
            )
    beats = paths.launch(run_file.selection.launch_id).beats
    if beats.is_dir():
        for owner, beat in sorted(read_beats(beats).items()):
            lines.append(
                f"worker {owner}: {beat.state}, {beat.succeeded:,} succeeded, {beat.failed:,}"
                f" failed, {beat.in_flight:,} in flight (last word of this process)"
            )
    return lines


def _without_shards(
    paths: RunPaths, run_file: RunFile, indexed: Indexed, finished: Finished
) -> str | None:
    """The line about a run whose shards were removed."""
    output = paths.output_file
    if not lacks_shards(run_file, indexed, finished):
        return None
    if finished.shards and not output.exists():  # replies to a batch, to make it anew
        return None
    total = int(indexed.requests.sum())
    if not output.exists():
        raise OutputError(
            f"{output} is gone, and so are the shards of its {total:,} requests (--remove_shards);"
            " infer with --overwrite makes them anew."
        )
    return f"{output}: all {total:,} requests finished and merged; the shards were removed."


def merge_now(options: MergeOptions) -> str:
    """Merge the shards of a run; returns the line to print.

    Raises:
        WorkersFailed: not everything is finished and --partial is not given.
    """
    paths, _ = run_of(options.output_file)
    # Read under the lock: a start that is just ending merges too, and may remove the shards.
    with contextlib.nullcontext() if options.partial else RunLock(paths):
        return _merge(options)


def _merge(options: MergeOptions) -> str:
    paths, run_file = run_of(options.output_file)
    assert run_file.selection is not None
    indexed = index_contexts(run_file.selection, bytes.fromhex(run_file.run_key))
    finished = find_finished(indexed, paths.output_file)
    if removed := _without_shards(paths, run_file, indexed, finished):
        return removed
    missing = int(indexed.requests.sum()) - int(finished.mask(indexed).sum())
    if options.partial:
        target = partial_path(paths.output_file)
        statistics = write_results(
            indexed.merge_job(finished.winners), target, private=is_private(paths)
        )
        sendable = indexed.index.records["kind"] == Kind.SEND
        return (
            f"{statistics.rows:,} of {indexed.num_selected:,} selected lines → {target}"
            f" ({statistics.missing:,} of {int(sendable.sum()):,} lines to be answered are not yet)"
        )
    if missing:
        raise WorkersFailed(
            f"{missing:,} requests are not finished, so {paths.output_file.name} was not written."
            " Finish the run, or take --partial."
        )
    notes: list[str | None] = []
    statistics = write_results(
        indexed.merge_job(finished.winners),
        paths.output_file,
        lambda new, content: notes.append(before_replacing(paths, run_file, new, content)),
        private=is_private(paths),
    )
    run_file.merged = {
        "statistics": msgspec.to_builtins(statistics, str_keys=True),
        "digest": indexed.digest(),
        "shards_removed": False,
    }
    write_run_file(paths, run_file)
    said = [note for note in notes if note] + [f"{statistics.rows:,} rows → {paths.output_file}"]
    return "\n".join(said)
