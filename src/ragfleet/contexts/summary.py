"""What a run of `ragfleet contexts` did, in numbers and in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragfleet.contexts.queries import Query
from ragfleet.contexts.store import CorpusStore
from ragfleet.corpus.download import normal_name


@dataclass
class ContextsSummary:
    """What a run did. `kept` counts distinct questions whose rows were still good; what failed is
    tried again each time, for that costs nothing."""

    output_file: Path
    num_rows: int = 0
    num_failed: int = 0
    num_distinct: int = 0
    kept: int = 0
    stale: int = 0
    retrieved: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    tokens: str = ""
    worker_bytes: int = 0
    unmatched: int = 0
    """Rows whose target has no document, so that it was searched for."""
    nearest: int = 0
    """Rows for which a version other than the one they name was taken."""

    def lines(self) -> list[str]:
        kinds = ", ".join(f"{count:,} by {kind}" for kind, count in self.kinds.most_common())
        num_good = self.num_rows - self.num_failed
        lines = [
            f"{self.num_rows:,} rows in {self.output_file}: {num_good:,} with a context"
            + (f" ({kinds})." if kinds else "."),
            f"{self.retrieved:,} distinct questions retrieved, {self.kept:,} kept from before"
            + (f", {self.stale:,} of the earlier ones touched by a change" if self.stale else "")
            + f"; {self.seconds:.1f} s; {self.worker_bytes >> 20:,} MiB per worker.",
            f"Tokens are {self.tokens}.",
        ]
        if self.unmatched:
            lines.append(
                f"Rows whose target_api no document is about, searched for instead:"
                f" {self.unmatched:,}."
            )
        if self.nearest:
            lines.append(
                f"Rows given the NEAREST version, not the one they name: {self.nearest:,}"
                " (`resolved_versions` says which)."
            )
        if self.num_failed:
            reasons = ", ".join(f"{count:,} {kind}" for kind, count in self.errors.most_common())
            lines.append(f"{self.num_failed:,} rows FAILED: {reasons}. Each says why in `error`.")
        return lines

    def count(self, row: dict[str, Any], query: Query, store: CorpusStore) -> None:
        """One row of the output."""
        self.num_rows += 1
        if not row["success"]:
            self.num_failed += 1
            self.errors[row.get("error_type", "")] += 1
            return
        kind = row.get("match_kind", "")
        self.kinds[kind] += 1
        self.unmatched += kind == "search" and bool(query.target_api)
        self.nearest += any(
            versions and not store.has(package, versions)
            for package, versions in query.dependencies.items()
            if normal_name(package) in row.get("resolved_versions", {})
        )
