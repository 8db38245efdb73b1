"""The figures of a finished run as text: a documented block per worker, one in all, a verdict."""

from __future__ import annotations

from ragfleet.plain_text import one_line
from ragfleet.summary import RunSummary, WorkerStatistics

_RULE = "=" * 60


def worker_block(worker: WorkerStatistics) -> str:
    """The documented form, to the letter."""
    rate = worker.succeeded / worker.processed if worker.processed else 1.0
    return "\n".join(
        [
            f"Worker {worker.rank} INFERENCE STATISTICS",
            _RULE,
            f"Total contexts processed: {worker.processed}",
            f"Successful inferences: {worker.succeeded}",
            f"Errors: {worker.failed}",
            f"Success rate: {100 * rate:.1f}%",
            f"Average inference time: {worker.mean_inference_time_s:.2f}s",
            f"Results saved to: {', '.join(worker.shards)}",
        ]
    )


def overall_block(summary: RunSummary) -> str:
    """Everything adds up to the selected lines."""
    statistics = summary.statistics
    lines = [
        "OVERALL STATISTICS",
        _RULE,
        f"Selected lines: {summary.num_selected:,} of {summary.num_lines:,}",
        f"  = {statistics.succeeded:,} succeeded + {statistics.failed:,} failed"
        + (f" + {statistics.dropped:,} dropped" if statistics.dropped else ""),
        f"  = {summary.answered_now:,} generated in this start + {summary.resumed:,} resumed"
        f" + {statistics.duplicates:,} duplicates + {statistics.not_sent:,} not sent"
        + (f" + {statistics.dropped:,} dropped" if statistics.dropped else ""),
    ]
    if statistics.errors:
        lines.append(f"Failed: {_kinds(statistics.errors)}")
    if statistics.cut_at_max_new_tokens:
        share = statistics.cut_at_max_new_tokens / statistics.succeeded
        lines.append(
            f"Cut at max_new_tokens: {statistics.cut_at_max_new_tokens:,} ({100 * share:.1f}%)"
        )
    if statistics.empty_answers:
        lines.append(f"Empty answers: {statistics.empty_answers:,}")
    if statistics.completion_tokens:
        lines.append(
            f"Tokens: {statistics.prompt_tokens:,} of prompts,"
            f" {statistics.completion_tokens:,} generated"
        )
    if summary.cost is not None:
        lines.append(
            f"Cost: {summary.cost:,.4f} for the answers above, at the given prices (what was sent"
            " again or cut off may have been charged too)"
        )
    lines += _planned_and_done(summary)
    lines.append(f"Wall time of this start: {summary.wall_s:.1f}s")
    if summary.answered_now and summary.wall_s > 0:
        lines.append(
            f"Throughput: {summary.answered_now / summary.wall_s:.2f} contexts/s,"
            f" {summary.wall_s / summary.answered_now:.3f}s wall time per context"
        )
    lines.append(f"Chunks stolen: {summary.stolen_chunks:,}; restarts: {summary.restarts}")
    if summary.superfluous:
        lines.append(
            f"Answers in the shards that no selected line asks for: {summary.superfluous:,}"
        )
    return "\n".join(lines)


def _planned_and_done(summary: RunSummary) -> list[str]:
    """What came true of the plan: prompt tokens computed, and the makespan against its bound."""
    done, lines = summary.generation, []
    planned = "" if summary.prefill is None else f", {summary.prefill.planned} planned"
    if done.prompt_tokens and not done.uncounted:
        computed = done.prompt_tokens - done.cached_tokens
        share = computed / done.prompt_tokens
        lines.append(
            f"Prefill: {computed:,} of {done.prompt_tokens:,} prompt tokens computed"
            f" ({share:.1%}){planned}"
        )
    elif done.prompt_tokens:
        lines.append(
            f"Prefill: {done.prompt_tokens:,} prompt tokens; how many were computed, the engine"
            f" does not say{planned}"
        )
    lines += [f"Degraded: {one_line(reason)}" for reason in done.degraded]
    if done.lower_bound_s > 0 and done.num_workers > 1:
        over = done.makespan_s / done.lower_bound_s - 1
        lines.append(
            f"Generation: {done.makespan_s:.1f}s, {over:.1%} above the bound of"
            f" {done.lower_bound_s:.1f}s (had its {done.num_workers} workers never been idle)"
        )
    return lines


def verdict(summary: RunSummary) -> str:
    """The last line."""
    statistics = summary.statistics
    of_all = (
        f" (of {summary.num_lines:,} lines)" if summary.num_selected != summary.num_lines else ""
    )
    if not statistics.failed:
        return (
            f"FINISHED: {statistics.succeeded:,} of {summary.num_selected:,} selected{of_all}"
            f" answered → {summary.output_file}"
        )
    again = " (--retry_failed generates failed requests again"
    if statistics.errors.get("too_long"):
        again += "; what is too_long for a local model needs --truncate_context head or tail too"
    again += ")"
    return (
        f"FINISHED WITH {statistics.failed:,} FAILURES of {summary.num_selected:,} selected"
        f"{of_all}:"
        f" {_kinds(statistics.errors)} → {summary.output_file}"
        f"{again if statistics.failed > statistics.not_sent else ''}"
    )


def full_text(summary: RunSummary) -> str:
    blocks = [worker_block(worker) for _, worker in sorted(summary.statistics.workers.items())]
    return "\n\n".join([*blocks, overall_block(summary), verdict(summary)])


def _kinds(errors: dict[str, int]) -> str:
    ordered = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{one_line(name)} {count:,}" for name, count in ordered)
