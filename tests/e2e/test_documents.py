"""The examples and the documents: what they promise about themselves."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from ragfleet import RunConfig
from ragfleet.config import PlanConfig
from ragfleet.contexts.options import ContextsOptions
from ragfleet.corpus.build import BuildOptions
from ragfleet.pipeline import PipelineOptions

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [
    "id",
    "original_item_id",
    "query_index",
    "dedup_key",
    "query",
    "target_api",
    "dependencies",
    "retrieval_method",
    "context",
    "context_length",
    "retrieval_time",
    "success",
]


def test_example_records_have_the_documented_form() -> None:
    text = (ROOT / "examples" / "contexts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) == len({record["id"] for record in records}) == 327
    for record in records:
        extra = [] if record["success"] else ["error"]
        assert list(record) == FIELDS + extra
        assert record["context_length"] == len(record["context"])
    chinese = [record for record in records if record["id"].startswith("item_zh_")]
    assert len(chinese) == 24
    assert len({(record["query"], record["context"]) for record in chinese}) == 18
    assert {record["retrieval_method"] for record in chinese} == {
        "exact_api_match",
        "rag_string_match",
        "rag_fallback",
    }
    assert "\\u" not in text.splitlines()[-1]


def outline(text: str) -> dict[str, list[object]]:
    """What both languages share: heading levels, table sizes, commands and flags."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    code = [re.sub(r" *#(?!!).*", "", body) for _, body in blocks]
    return {
        "headings": [len(hashes) for hashes in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "table rows": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "code": code,
        "flags": sorted(set(re.findall(r"--[a-z][a-z_]+", prose))),
    }


def test_both_readmes_say_the_same() -> None:
    english = outline((ROOT / "README.md").read_text(encoding="utf-8"))
    chinese = outline((ROOT / "README.zh-CN.md").read_text(encoding="utf-8"))
    for part, content in english.items():
        assert chinese[part] == content, part


@pytest.mark.parametrize("document", ["README.md", "docs/footguns.md", "CHANGELOG.md"])
def test_flags_in_the_documents_exist(document: str) -> None:
    # Not RunConfig's: the TOML file, `ragfleet merge`, the check of slices, vLLM, torchrun.
    others = {"config", "contexts-file", "partial", "skip-inference", "model"}
    others |= {"standalone", "nproc_per_node", "max-restarts"}
    named = set(re.findall(r"--([a-z][a-z_-]+)", (ROOT / document).read_text(encoding="utf-8")))
    settings = (PlanConfig, BuildOptions, ContextsOptions, PipelineOptions)
    assert named - others <= {field.name for kind in settings for field in dataclasses.fields(kind)}


def test_the_script_sets_only_what_exists() -> None:
    script = ROOT / "utils" / "RAGutils" / "queryResultByInfer" / "run_multi_worker_inference.sh"
    settings = re.search(r"^settings=\(([^)]*)\)", script.read_text(), re.MULTILINE)
    assert settings is not None
    names = {name.lower() for name in settings[1].split()} - {"python"}
    assert names <= {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md", "docs/footguns.md"])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
