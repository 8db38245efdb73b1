"""The steps that `run`, `plan` and `merge` share: index, select, lead, find what is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ragfleet.config import RunConfig
from ragfleet.identity import Selection
from ragfleet.index import Index, build_index
from ragfleet.merge import MergeJob
from ragfleet.plan import (
    ANSWER_RATIO,
    BYTES_PER_TOKEN,
    CostModel,
    Plan,
    find_leaders,
    plan_dynamic,
    plan_static,
    select,
    selected_mask,
)
from ragfleet.preparation import Preparation
from ragfleet.records import Keyer
from ragfleet.shards import Winners, choose, list_shards, scan_shards


@dataclass(frozen=True)
class Indexed:
    """A contexts file as one run sees it.

    Attributes:
        requests: [num_records] bool, rows to generate: selected, sendable, leading their key.
    """

    selection: Selection
    index: Index
    selected: list[range]
    requests: NDArray[np.bool_]

    @property
    def num_selected(self) -> int:
        return sum(len(part) for part in self.selected)

    def digest(self) -> str:
        """Hash of the selected rows' keys in order: what an output of this selection answers."""
        digest = xxhash.xxh3_128()
        # All of it at once: how many slices the selection comes in must not matter.
        mask = selected_mask(len(self.index), self.selected)
        for name in ("key_hi", "key_lo", "line_hash"):
            digest.update(self.index.records[name][mask].tobytes())
        shown = (self.selection.include_context, self.selection.drop_failed_contexts)
        digest.update(repr(shown).encode())
        return digest.hexdigest()

    def merge_job(self, winners: Winners, mark_unfinished: bool = False) -> MergeJob:
        return MergeJob(
            contexts_file=Path(self.selection.contexts_file),
            contexts_bytes=self.index.num_bytes,
            records=self.index.records,
            selected=self.selected,
            winners=winners,
            include_context=self.selection.include_context,
            drop_failed_contexts=self.selection.drop_failed_contexts,
            mark_unfinished=mark_unfinished,
        )

    def plan(self, to_do: NDArray[np.bool_], schedule: str, costs: CostModel) -> Plan:
        """Plan the rows of `to_do`, a part of `requests`."""
        grouping = self.index.grouping
        if schedule == "static":
            return plan_static(to_do, grouping, self.selected, costs)
        return plan_dynamic(to_do, grouping, self.selection.num_workers, costs)


def selection_of(config: RunConfig, num_workers: int, key_fields: list[str] | None) -> Selection:
    return Selection(
        contexts_file=str(config.contexts_file.absolute()),
        key_fields=key_fields,
        covers_id=config.temperature > 0,
        distinct=config.distinct_samples,
        num_workers=num_workers,
        max_samples_per_worker=config.max_samples_per_worker,
        include_context=config.include_context,
        drop_failed_contexts=config.failed_contexts == "drop",
    )


def index_contexts(
    selection: Selection,
    run_key: bytes,
    on_progress: Callable[[int, float], None] | None = None,
) -> Indexed:
    """Raises InputError."""
    keyer = Keyer(run_key, selection.key_fields, selection.covers_id)
    index = build_index(Path(selection.contexts_file), keyer, on_progress)
    selected = select(len(index), selection.num_workers, selection.max_samples_per_worker)
    mask = selected_mask(len(index), selected)
    requests = find_leaders(index.records, mask, selection.distinct)
    return Indexed(selection, index, selected, requests)


def cost_model(
    preparation: Preparation,
    bytes_per_token: float = BYTES_PER_TOKEN,
    most_tokens: float = np.inf,
) -> CostModel:
    """What is known beforehand of the costs; an earlier start knows how long answers are."""
    before = preparation.run_file.answer_tokens if preparation.run_file is not None else None
    assumed = ANSWER_RATIO * preparation.config.max_new_tokens
    return CostModel(
        answer_tokens=assumed if before is None else before,
        bytes_per_token=bytes_per_token,
        most_tokens=most_tokens,
    )


@dataclass(frozen=True)
class Finished:
    """What the shards hold.

    Attributes:
        shards: files that hold at least one result, or nothing at all.
        num_invalid: lines that are no results.
        num_superfluous: finished keys that no current record asks for; `num_unasked_answers` of
            them did not fail.
    """

    winners: Winners
    shards: tuple[Path, ...]
    num_invalid: int
    num_superfluous: int
    num_unasked_answers: int = 0

    def mask(self, indexed: Indexed, retry_failed: bool = False) -> NDArray[np.bool_]:
        """[num_records] Which requests have their outcome already."""
        rows = np.flatnonzero(indexed.requests)
        records = indexed.index.records[rows]
        found = self.winners.find(records["key_hi"], records["key_lo"])
        has_outcome = found >= 0
        if retry_failed and len(self.winners.answers):
            has_outcome &= self.winners.answers["success"][np.maximum(found, 0)] == 1
        finished = np.zeros(len(indexed.index), dtype=bool)
        finished[rows[has_outcome]] = True
        return finished


def find_finished(indexed: Indexed, output_file: Path) -> Finished:
    """Scan all shards of an output once."""
    scanned = scan_shards(list_shards(output_file))
    winners = choose(scanned)
    requests = indexed.index.records[indexed.requests]
    found = winners.find(requests["key_hi"], requests["key_lo"])
    asked = found[found >= 0]
    with_results = set(np.unique(scanned.answers["shard"]).tolist())
    shards = tuple(
        path
        for number, path in enumerate(scanned.paths)
        if number in with_results or path.stat().st_size == 0
    )
    is_answer = winners.answers["success"] == 1
    return Finished(
        winners,
        shards,
        scanned.num_invalid,
        num_superfluous=len(winners.answers) - len(asked),
        num_unasked_answers=int(is_answer.sum()) - int(is_answer[asked].sum()),
    )
