"""ragfleet: offline batch inference for retrieval-augmented generation.

    from ragfleet import RunConfig, run summary = run(RunConfig(contexts_file="contexts.jsonl",
    output_file="results.jsonl", model_path="…")) for row in summary.results():
        ...

Names are loaded when they are first used, so that `import ragfleet` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragfleet.config import RunConfig as RunConfig
    from ragfleet.engines.query_based import QueryBasedInference as QueryBasedInference
    from ragfleet.errors import RagfleetError as RagfleetError
    from ragfleet.runner import run as run
    from ragfleet.summary import RunSummary as RunSummary

__version__ = "1.4.0"

_HOMES = {
    "QueryBasedInference": "ragfleet.engines.query_based",
    "RagfleetError": "ragfleet.errors",
    "RunConfig": "ragfleet.config",
    "RunSummary": "ragfleet.summary",
    "run": "ragfleet.runner",
}

__all__ = ["QueryBasedInference", "RagfleetError", "RunConfig", "RunSummary", "__version__", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
