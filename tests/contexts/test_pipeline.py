"""The whole pipeline as a user runs it: killed and run again, edited and run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from making import EXAMPLES, ROOT, read_rows, write_corpus

from ragfleet import RunConfig, pipeline
from ragfleet.cli import main
from ragfleet.context_room import context_room
from ragfleet.engines.protocol import Failure, PromptSettings, Request, SamplingParams
from ragfleet.identity import now
from ragfleet.launch import RunPaths
from ragfleet.pipeline import PipelineOptions, missing_corpora
from ragfleet.preparation import pocket_folder, prepare
from ragfleet.prompts import DEFAULT_SYSTEM_PROMPT
from ragfleet.run_lock import RunLock
from ragfleet.tokens import load_tokenizer, prepare_prompt

SCRIPT = ROOT / "utils" / "RAGutils" / "queryResultByInfer" / "run_complete_pipeline.sh"
TIMES = {"retrieval_time": 0, "inference_time": 0, "total_time": 0, "worker_rank": None}


def settings(folder: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHON": sys.executable,
        "ENGINE": "echo",
        "QUERIES_FILE": str(folder / "queries.jsonl"),
        "CORPUS_PATH": str(folder / "corpus"),
        "CONTEXTS_FILE": str(folder / "contexts.jsonl"),
        "OUTPUT_FILE": str(folder / "results.jsonl"),
        "TEMPERATURE": "0",
        "MAX_TOKENS": "500",
        "MODEL_PATH": "",
        **more,
    }


def start(folder: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT)],
        env=settings(folder, **more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, **more: str) -> str:
    process = start(folder, **more)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    return out


def untimed(path: Path) -> list[dict[str, Any]]:
    return [row | TIMES for row in read_rows(path)]


def anywhere(path: Path) -> list[dict[str, Any]]:
    """The same of a run in any folder, which a failure row names that lacks a corpus."""
    return json.loads(json.dumps(untimed(path)).replace(str(path.parent), "."))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    shutil.copytree(
        EXAMPLES / "corpus", tmp_path / "corpus", ignore=shutil.ignore_patterns(".index")
    )
    shutil.copy(EXAMPLES / "queries.jsonl", tmp_path)
    return tmp_path


def test_edit_one_document_and_run_again(demo: Path) -> None:
    out = finish(demo)
    assert "Stage 1 of 3, corpora: all there" in out
    before = {row["id"]: row for row in read_rows(demo / "results.jsonl")}
    assert len(before) == 107
    assert sum(not row["success"] for row in before.values()) == 1
    path = demo / "corpus" / "numpy" / "1.16.6.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    edited = next(row for row in rows if row["path"] == "numpy.linalg.inv")
    edited["doc"] = edited["doc"].replace("inverse", "reciprocal", 1)
    del edited["doc_sha1"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    used = {
        name
        for name, row in before.items()
        if any(item["path"] == "numpy.linalg.inv" for item in row.get("documents", []))
    }
    out = finish(demo)
    after = {row["id"]: row for row in read_rows(demo / "results.jsonl")}
    timed = {name: row["inference_time"] for name, row in before.items()}
    again = {name for name, row in after.items() if row["inference_time"] != timed[name]}
    assert used
    assert again <= used
    assert {name for name in used if before[name] != after[name]} == used
    assert f"{len(used)} of the earlier ones touched by a change" in out
    # The same again: nothing is retrieved, nothing is generated.
    contexts = (demo / "contexts.jsonl").read_bytes()
    out = finish(demo)
    assert "0 distinct questions retrieved" in out
    assert (demo / "contexts.jsonl").read_bytes() == contexts
    assert untimed(demo / "results.jsonl") == [row | TIMES for row in after.values()]


def test_killed_at_random_moments(demo: Path) -> None:
    whole = demo / "whole"
    shutil.copytree(demo / "corpus", whole / "corpus")
    shutil.copy(demo / "queries.jsonl", whole)
    started = time.monotonic()
    finish(whole)
    seconds = time.monotonic() - started
    moments = random.Random(5)
    for _ in range(3):
        process = start(demo)
        time.sleep(moments.uniform(0.1, 0.9) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(demo)
    assert anywhere(demo / "results.jsonl") == anywhere(whole / "results.jsonl")
    assert anywhere(demo / "contexts.jsonl") == anywhere(whole / "contexts.jsonl")


def test_what_is_wrong_is_said_before_anything_runs(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--queries_file", str(demo / "queries.jsonl"), "--corpus_path", str(demo / "corpus")]
    flags += ["--output_file", str(demo / "r.jsonl")]
    assert main(["pipeline", *flags, "--model_path", str(demo / "no-model")]) == 2
    assert "no model folder" in capsys.readouterr().err
    assert not (demo / "r.contexts.jsonl").exists()
    assert main(["pipeline", "--queries_file", "none", *flags[2:], "--engine", "echo"]) == 2
    assert "no queries file none" in capsys.readouterr().err


def test_a_refused_run_changes_nothing(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above all not the contexts of the finished run, which its results are verified against."""
    queries, output, contexts = (demo / name for name in ("queries.jsonl", "a.jsonl", "c.jsonl"))
    flags = ["pipeline", "--corpus_path", str(demo / "corpus"), "--queries_file", str(queries)]
    flags += ["--build_corpora=missing", "--engine=echo", "--output_file", str(output)]
    flags += ["--max_samples=5"]
    assert main([*flags, "--temperature=0"]) == 0
    before = files(demo)
    assert main([*flags, "--temperature=0.5", "--max_documents=1"]) == 2
    assert "belongs to a run with other settings" in capsys.readouterr().err
    assert files(demo) == before
    assert main(["verify", str(demo / "a.contexts.jsonl"), str(output)]) == 0

    # So it is where a corpus would be made first.
    with queries.open("a", encoding="utf-8") as file:
        file.write('{"query": "q", "dependencies": {"nowhere": "1.0"}}\n')
    (demo / "foreign.jsonl").write_text("mine\n")
    before = files(demo)
    for name, more, reason in [
        ("foreign.jsonl", [], "no run of ragfleet made it"),
        ("queries.jsonl", [], "--output_file is the queries file itself"),
        ("queries.jsonl", ["--overwrite"], "--output_file is the queries file itself"),
        ("c.jsonl", [], "--output_file is the contexts file itself"),
        ("d.jsonl", ["--contexts_file", str(queries)], "--contexts_file is the queries file"),
        ("d.jsonl", ["--contexts_file", str(demo / "foreign.jsonl")], "not made by this command"),
    ]:
        options = [*flags, "--contexts_file", str(contexts), "--output_file", str(demo / name)]
        assert main([*options, *more]) == 2
        err = capsys.readouterr().err
        assert reason in err
        assert "Stage 1" not in err
        assert files(demo) == before


def test_contexts_stay_as_they_are_while_they_are_answered(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, corpus, output = (demo / name for name in ("queries.jsonl", "corpus", "a.jsonl"))
    flags = ["--queries_file", str(queries), "--corpus_path", str(corpus)]
    flags += ["--max_samples=5", "--output_file"]
    answering = ["pipeline", *flags, str(output), "--engine=echo", "--temperature=0"]
    assert main(answering) == 0
    contexts = (demo / "a.contexts.jsonl").read_bytes()
    capsys.readouterr()
    with RunLock(RunPaths(output)):
        assert main([*answering, "--max_documents=1"]) == 2
    err = capsys.readouterr().err
    assert f"{output} is being written by pid {os.getpid()}" in err
    assert "Stage 2" not in err
    assert (demo / "a.contexts.jsonl").read_bytes() == contexts

    started = []

    def run(*arguments: Any) -> None:
        """Another start of the second stage while this one answers what came of it."""
        others = ["contexts", *flags, str(demo / "a.contexts.jsonl"), "--max_documents=1"]
        started.append(main(others))

    monkeypatch.setattr(pipeline, "run", run)
    assert main(answering) == 0
    assert started == [2]
    assert "is making or answering these contexts" in capsys.readouterr().err
    assert (demo / "a.contexts.jsonl").read_bytes() == contexts


def test_contexts_fit_the_model(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No context is made that leaves no room for its question and its answer, unless asked for."""
    monkeypatch.setattr(pipeline, "run", lambda *_: None)
    limit, queries, contexts = 1200, demo / "queries.jsonl", demo / "r.contexts.jsonl"
    flags = ["pipeline", "--queries_file", str(queries), "--corpus_path", str(demo / "corpus")]
    flags += ["--output_file", str(demo / "r.jsonl"), "--build_corpora=never", "--device=cpu"]
    flags += ["--model_path=pocket", f"--max_model_len={limit}", "--num_workers=1"]

    def longest_prompt() -> tuple[int, list[str]]:
        """Of all rows, in tokens; and what is said of those that are too long."""
        tokenizer = load_tokenizer(pocket_folder())
        settings = PromptSettings(system_prompt=DEFAULT_SYSTEM_PROMPT, clock=now())
        longest, too_long = 0, []
        for row in read_rows(contexts):
            made = prepare_prompt(
                Request(
                    key=b"",
                    query=row["query"],
                    context=row["context"],
                    retrieval_method=row["retrieval_method"],
                    record=row,
                ),
                settings,
                tokenizer,
                SamplingParams(max_new_tokens=200),
                limit,
            )
            if isinstance(made, Failure):
                too_long.append(made.error)
            else:
                longest = max(longest, len(made.token_ids))
        return longest, too_long

    assert main([*flags, "--max_new_tokens=200"]) == 0
    assert "Contexts have at most 8" in capsys.readouterr().err
    longest, too_long = longest_prompt()
    assert not too_long
    assert longest > 0.9 * (limit - 200)
    # A question that comes later changes no other context, as long as it is an ordinary one.
    before = contexts.read_bytes().splitlines()
    with queries.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": "x", "query": "How is it? " * 9}) + "\n")
    assert main([*flags, "--max_new_tokens=200"]) == 0
    assert contexts.read_bytes().splitlines()[:-1] == before
    # What is asked for is kept to, and said.
    assert main([*flags, "--max_new_tokens=200", "--max_tokens=1100"]) == 0
    assert "Warning: --max_tokens is 1,100, and the model has" in capsys.readouterr().err
    assert longest_prompt()[1]
    assert main([*flags, "--max_new_tokens=1100"]) == 2
    assert "no room for contexts: of the model's 1,200" in capsys.readouterr().err


def test_questions_of_all_lengths(tmp_path: Path) -> None:
    """A long one gets room as well, up to a quarter of the model; templates count as they are."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ query }} {{ query }} {{ context }} " + "word " * 100)

    def room(*questions: str, **more: Any) -> int:
        config = RunConfig(
            contexts_file=tmp_path / "c.jsonl",
            output_file=tmp_path / "r.jsonl",
            model_path="pocket",
            device="cpu",
            num_workers=1,
            max_new_tokens=96,
            **more,
        )
        found = context_room(prepare(config, {}), [{"query": text} for text in questions])
        assert found is not None
        return found.tokens

    assert room("How?") == room("How?", "How is it?")
    assert room("How?", "word " * 400) < room("How?") - 300
    assert room("word " * 9000) == room("word " * 90_000) == room("How?") - 1024 + 64
    assert room("How?", prompt_template=template) < room("How?") - 100 + 40


def files(folder: Path) -> dict[Path, bytes]:
    """All there is, with its content, but for indexes, which only save work."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".index" not in path.parts
    }


def test_one_config_file(demo: Path) -> None:
    config = demo / "run.toml"
    config.write_text(
        f'queries_file = "{demo / "queries.jsonl"}"\ncorpus_path = "{demo / "corpus"}"\n'
        f'output_file = "{demo / "r.jsonl"}"\nengine = "echo"\nmax_tokens = 300\nmax_samples = 5\n'
    )
    flags = ["--build_corpora=never", "--temperature=0"]
    assert main(["pipeline", "--config", str(config), *flags]) == 0
    assert len(read_rows(demo / "r.jsonl")) == len(read_rows(demo / "r.contexts.jsonl")) == 5


def test_private_packages_are_never_asked_for(tmp_path: Path) -> None:
    """Their names are nobody's business, and a stranger's package of that name is no answer."""
    write_corpus(tmp_path / "corpus", "private", "1.0", [{"path": "private.f", "doc": "d"}])
    queries = tmp_path / "q.jsonl"
    rows = [{"query": "q", "dependencies": {"private": "2.0"}}]
    rows += [{"query": "q", "dependencies": {"numpy": "1.16.6", "broken": "not a version"}}]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PipelineOptions(queries_file=queries, corpus_path=tmp_path / "corpus")
    assert missing_corpora(options) == ["numpy==1.16.6"]
