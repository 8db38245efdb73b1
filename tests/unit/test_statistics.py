"""The printed figures: the documented block to the letter, and sums that add up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ragfleet.estimates import Estimate, Prefill
from ragfleet.monitor.statistics import full_text, overall_block, verdict, worker_block
from ragfleet.summary import Generation, MergeStatistics, RunSummary, WorkerStatistics


def summary_of(statistics: MergeStatistics, **others: Any) -> RunSummary:
    selected = statistics.rows + statistics.dropped + statistics.missing
    given_ = {"num_lines": selected, "num_selected": selected, "output_file": Path("out.jsonl")}
    return RunSummary(statistics=statistics, **{**given_, **others})


def test_a_workers_block_is_the_documented_one_to_the_letter() -> None:
    worker = WorkerStatistics(0, 245, 5, 245 * 1.23, ["output_rank0.jsonl"])
    assert worker_block(worker) == (
        "Worker 0 INFERENCE STATISTICS\n"
        "============================================================\n"
        "Total contexts processed: 250\n"
        "Successful inferences: 245\n"
        "Errors: 5\n"
        "Success rate: 98.0%\n"
        "Average inference time: 1.23s\n"
        "Results saved to: output_rank0.jsonl"
    )


def test_a_worker_with_nothing_or_several_shards() -> None:
    text = worker_block(WorkerStatistics(3))
    assert "Total contexts processed: 0\n" in text
    assert "Success rate: 100.0%\n" in text
    assert "Average inference time: 0.00s\n" in text
    text = worker_block(WorkerStatistics(3, 0, 2, 0.0, ["a_rank3.jsonl", "a_rank3.1.jsonl"]))
    assert "Success rate: 0.0%\n" in text
    assert text.endswith("Results saved to: a_rank3.jsonl, a_rank3.1.jsonl")


def test_times_are_of_successes_only() -> None:
    assert WorkerStatistics(0, 2, 8, 3.0).mean_inference_time_s == 1.5


def test_the_overall_block_to_the_letter() -> None:
    statistics = MergeStatistics(
        rows=1100,
        succeeded=1090,
        failed=10,
        generated=1050,
        duplicates=42,
        not_sent=8,
        dropped=3,
        errors={"oom": 2, "invalid_record": 4, "context_failed": 4},
        cut_at_max_new_tokens=109,
        empty_answers=1,
        prompt_tokens=123456,
        completion_tokens=7890,
    )
    summary = summary_of(
        statistics,
        num_lines=5000,
        answered_now=1000,
        resumed=50,
        superfluous=7,
        stolen_chunks=2,
        restarts=1,
        wall_s=200.0,
    )
    assert overall_block(summary).splitlines() == [
        "OVERALL STATISTICS",
        "=" * 60,
        "Selected lines: 1,103 of 5,000",
        "  = 1,090 succeeded + 10 failed + 3 dropped",
        "  = 1,000 generated in this start + 50 resumed + 42 duplicates + 8 not sent + 3 dropped",
        "Failed: context_failed 4, invalid_record 4, oom 2",
        "Cut at max_new_tokens: 109 (10.0%)",
        "Empty answers: 1",
        "Tokens: 123,456 of prompts, 7,890 generated",
        "Wall time of this start: 200.0s",
        "Throughput: 5.00 contexts/s, 0.200s wall time per context",
        "Chunks stolen: 2; restarts: 1",
        "Answers in the shards that no selected line asks for: 7",
    ]
    assert verdict(summary) == (
        "FINISHED WITH 10 FAILURES of 1,103 selected (of 5,000 lines):"
        " context_failed 4, invalid_record 4, oom 2 → out.jsonl"
        " (--retry_failed generates failed requests again)"
    )
    statistics.errors["too_long"] = 1
    assert verdict(summary).endswith(
        " (--retry_failed generates failed requests again; what is too_long for a local model needs"
        " --truncate_context head or tail too)"
    )


def test_what_did_not_happen_is_not_mentioned() -> None:
    statistics = MergeStatistics(rows=3, succeeded=3, generated=3)
    text = overall_block(summary_of(statistics, resumed=3))
    for word in ("Failed", "Cut", "Empty", "Tokens", "Throughput", "dropped", "no selected line"):
        assert word not in text
    assert verdict(summary_of(statistics)) == "FINISHED: 3 of 3 selected answered → out.jsonl"


def test_a_retry_is_offered_only_where_it_can_help() -> None:
    statistics = MergeStatistics(
        rows=2, succeeded=1, failed=1, generated=1, not_sent=1, errors={"invalid_record": 1}
    )
    assert "retry" not in verdict(summary_of(statistics))


def test_all_blocks_stand_by_rank_and_the_verdict_is_last() -> None:
    workers = {
        rank: WorkerStatistics(rank, 1, 0, 1.0, [f"o_rank{rank}.jsonl"]) for rank in (10, 2, 0)
    }
    statistics = MergeStatistics(rows=3, succeeded=3, generated=3, workers=workers)
    text = full_text(summary_of(statistics))
    heads = re.findall(r"^(Worker \d+|OVERALL|FINISHED)", text, re.MULTILINE)
    assert heads == ["Worker 0", "Worker 2", "Worker 10", "OVERALL", "FINISHED"]
    assert text.splitlines()[-1] == verdict(summary_of(statistics))


counts = st.integers(0, 10**6)


@given(counts, counts, counts, counts, counts, st.data())
def test_both_sums_come_to_the_selected_lines(
    now: int, resumed: int, duplicates: int, not_sent: int, dropped: int, data: st.DataObject
) -> None:
    rows = now + resumed + duplicates + not_sent
    failed = data.draw(st.integers(not_sent, rows))
    statistics = MergeStatistics(
        rows=rows,
        succeeded=rows - failed,
        failed=failed,
        generated=now + resumed,
        duplicates=duplicates,
        not_sent=not_sent,
        dropped=dropped,
        errors={"x": failed} if failed else {},
    )
    summary = summary_of(statistics, answered_now=now, resumed=resumed, wall_s=1.0)
    lines = overall_block(summary).splitlines()
    for line in lines[3:5]:
        numbers = [int(text.replace(",", "")) for text in re.findall(r"[\d,]+", line)]
        assert sum(numbers) == summary.num_selected
    assert verdict(summary).startswith("FINISHED WITH" if failed else "FINISHED:")


def test_exit_codes() -> None:
    fine = MergeStatistics(rows=1, succeeded=1, generated=1)
    bad = MergeStatistics(rows=1, failed=1, generated=1, errors={"oom": 1})
    assert summary_of(fine, fail_on_errors=True).exit_code == 0
    assert summary_of(bad).exit_code == 0
    assert summary_of(bad, fail_on_errors=True).exit_code == 3


def test_results_are_read_one_by_one_even_numbers_that_no_float_holds(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(
        '{"id":1,"answer":"答"}\n{"id":2,"n":1e400,"m":'.encode() + b"9" * 5000 + b"}\n"
    )
    rows = summary_of(MergeStatistics(), output_file=path).results()
    assert next(rows) == {"id": 1, "answer": "答"}
    assert next(rows)["n"] == float("inf")
    assert json.dumps(list(rows)) == "[]"


def test_what_came_true_of_the_plan() -> None:
    planned = Prefill(
        prompts=Estimate(220_000, 1_000),
        shared=Estimate(60_000, 500),
        planned=Estimate(61_234, 512),
        num_too_long=None,
        num_sampled=256,
        is_exact=False,
    )
    done = Generation(
        num_workers=4, makespan_s=102.0, busy_s=400.0, prompt_tokens=221_000, cached_tokens=160_000
    )
    statistics = MergeStatistics(rows=1, succeeded=1, generated=1)
    lines = overall_block(summary_of(statistics, prefill=planned, generation=done)).splitlines()
    assert (
        "Prefill: 61,000 of 221,000 prompt tokens computed (27.6%), 61,230 ± 510 planned" in lines
    )
    assert (
        "Generation: 102.0s, 2.0% above the bound of 100.0s (had its 4 workers never been idle)"
        in lines
    )
    assert "Degraded" not in "\n".join(lines)
    done.uncounted, done.degraded = 1, ["plain batches: MLA\x1b[2J"]
    text = overall_block(summary_of(statistics, prefill=planned, generation=done))
    assert "221,000 prompt tokens; how many were computed, the engine does not say" in text
    assert "\nDegraded: plain batches: MLA" in text
    assert "\x1b" not in text
    text = overall_block(summary_of(statistics, generation=Generation()))
    assert "Prefill" not in text
    assert "Generation" not in text
