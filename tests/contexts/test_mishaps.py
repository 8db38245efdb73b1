"""What goes wrong around contexts and corpora: bad files, full disks, dead processes."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import read_rows, write_corpus, write_sdist

from ragfleet.cli import main
from ragfleet.contexts import generate, retrieve
from ragfleet.contexts.dense import Vectors
from ragfleet.contexts.generate import generate_contexts
from ragfleet.contexts.options import ContextsOptions
from ragfleet.contexts.queries import check_queries, read_queries
from ragfleet.corpus import build, download
from ragfleet.corpus.archives import extract
from ragfleet.corpus.build import BuildOptions, build_all, build_one
from ragfleet.corpus.download import DownloadError, Requirement, parse_requirement
from ragfleet.errors import ConfigError, InputError, OutputError, StorageError

ROW = {"id": "a", "query": "sort an array", "dependencies": {"pkg": "1.0"}}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"path": "pkg.sort", "doc": "Sort an array."}, {"path": "pkg.read", "doc": "Read."}]
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    return tmp_path / "corpus"


def write_queries(folder: Path, *rows: Any) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(folder: Path, **more: Any) -> ContextsOptions:
    settings = {"queries_file": folder / "q.jsonl", "corpus_path": folder / "corpus"}
    return ContextsOptions(**{**settings, "output_file": folder / "out.jsonl", **more})


# ---- queries


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n", 1),
        (json.dumps({**ROW, "query": "x " * 60_000}).encode() + b"\n" + b'{"query": "b"}', 2),
        (b'{"id": 1, "que\n{"query": "b"}\n', 2),
        (json.dumps({"0": ROW, "1": ROW}, indent=1).encode(), 2),
        (json.dumps({"0": ROW}).encode(), 1),
        (json.dumps(ROW, indent=1).encode(), 1),
        (json.dumps([ROW, ROW], indent=1).encode(), 2),
        ('{"query": "怎样"}'.encode(), 1),
    ],
)
def test_forms_of_queries_files(tmp_path: Path, data: bytes, count: int) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(data)
    check_queries(path)
    assert len(list(read_queries(path))) == count


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"query": "怎样排序"}\n'.encode("gbk"), "iconv -f GB18030"),
        ('[{"query": "怎样排序"}]'.encode("gbk"), "iconv -f GB18030"),
        ('{"query": "q"}'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8 .*q.json > "),
        (gzip.compress(b'{"query": "q"}\n', mtime=0), "is gzip-compressed; unpack it first"),
        (b'{"text": "q"}\n{"text": "r"}\n', "none of its queries can be used; `query` is missing"),
        (b"{broken\n", "not valid JSON"),
        (b'[{"query": "q"},', "not valid JSON"),
        (b'[{"query": "\\ud800"}]', "not valid JSON"),
        (b"[]", "has no queries"),
        (b'{"id": "k", "queries": []}', "none of its queries can be used; `queries` is empty"),
        (b"  \n", "is empty"),
        (b'"text"', "is not an object"),
    ],
)
def test_queries_files_that_are_no_good(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=reason):
        check_queries(path)


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "q.json")  # opening it would wait for whoever writes
    with pytest.raises(InputError, match="not a regular file"):
        check_queries(tmp_path / "q.json")


def test_an_item_without_queries_is_a_failure(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, {"id": "k", "queries": []}, {**ROW, "queries": []}, {**ROW, "id": "b"})
    generate_contexts(options(tmp_path))
    rows = read_rows(tmp_path / "out.jsonl")
    assert [(row["id"], row["success"]) for row in rows] == [("k", False), ("a", True), ("b", True)]
    assert (rows[0]["error_type"], rows[0]["error"]) == ("invalid_query", "`queries` is empty")


def test_nothing_from_there_on(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW, ROW)
    with pytest.raises(InputError, match=r"--start_index is 2, and .* has 2 queries"):
        generate_contexts(options(tmp_path, start_index=2))
    assert not (tmp_path / "out.contexts").exists()


# ---- what is there already, what can't be written


def test_a_file_of_somebody_elses_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW)
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="not made by this command"):
        generate_contexts(options(tmp_path))
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"
    (tmp_path / "link.jsonl").symlink_to("elsewhere.jsonl")
    with pytest.raises(OutputError, match="link to nothing"):
        generate_contexts(options(tmp_path, output_file=tmp_path / "link.jsonl"))
    with pytest.raises(OutputError, match="queries file itself"):
        generate_contexts(options(tmp_path, output_file=tmp_path / "q.jsonl"))


def test_a_full_disk(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            generate_contexts(options(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out.jsonl").exists()
    assert generate_contexts(options(tmp_path)).num_rows == 1


def test_what_fails_again_is_not_written_again(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW, {**ROW, "dependencies": {"pkg": "2.0"}})
    log = tmp_path / "out.contexts" / "rows.jsonl"
    generate_contexts(options(tmp_path))
    size, rows = log.stat().st_size, read_rows(tmp_path / "out.jsonl")
    summary = generate_contexts(options(tmp_path))
    assert (summary.kept, summary.retrieved, summary.num_failed) == (1, 0, 1)
    assert log.stat().st_size == size
    assert read_rows(tmp_path / "out.jsonl") == rows


def test_ten_workers_for_one_query(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW)
    assert generate_contexts(options(tmp_path, num_workers=10)).num_rows == 1


def test_one_broken_line_in_a_corpus(tmp_path: Path, corpus: Path) -> None:
    with open(corpus / "pkg" / "1.0.jsonl", "a", encoding="utf-8") as file:
        file.write('{"path": "pkg.x"\n')
    write_queries(tmp_path, ROW)
    said: list[str] = []
    assert generate_contexts(options(tmp_path), said.append).num_failed == 0
    assert any("1.0.jsonl" in text and "1 line" in text for text in said)


@pytest.mark.parametrize("data", ["", '{"x": 1}\n', '{"path": "p", "doc": ""}\n'])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_corpus_without_documents(
    tmp_path: Path,
    corpus: Path,
    data: str,
    embeds: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It costs its own questions their contexts, and nobody else."""
    empty = write_corpus(corpus, "p", "1.0", [])
    empty.write_text(data)
    both = {"pkg": "1.0", "p": "1.0"}
    write_queries(
        tmp_path,
        ROW,
        {"id": "b", "query": "x", "dependencies": {"p": "1.0"}},
        {"id": "c", "query": "sort an array", "dependencies": both},
        {"id": "d", "query": "x", "target_api": "p.f", "dependencies": both},
    )
    if embeds:
        monkeypatch.setattr(retrieve, "make_embedder", lambda *_: Flat())
        monkeypatch.setattr(generate, "check_embedder", lambda *_: None)
        monkeypatch.setenv("TOGETHER_API_KEY", "k")
    source = "togetherai" if embeds else None
    generate_contexts(options(tmp_path, embedding_source=source))
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["success"] for row in rows] == [True, False, True, False]
    assert rows[1]["error_type"] == "no_corpus"
    assert f"p 1.0 has no usable document ({empty})" in rows[1]["error"]
    assert rows[2]["missing_dependencies"] == ["p"]
    main(["corpus", "check", str(corpus)])
    assert "p==1.0 (docstring): 0 documents" in (out := capsys.readouterr().out)
    assert out.count("WARNING: without documents") == 1
    # Once it has documents, what lacked them is retrieved again.
    write_corpus(corpus, "p", "1.0", [{"path": "p.f", "doc": "Sort x."}])
    assert generate_contexts(options(tmp_path, embedding_source=source)).num_failed == 0
    assert "missing_dependencies" not in read_rows(tmp_path / "out.jsonl")[2]


class Flat:
    """An embedder to which all texts mean the same."""

    name = "flat"

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.ones((len(texts), 3), np.float32)


def test_no_room(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW)
    generate_contexts(options(tmp_path, max_tokens=2))
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert "no document fits into --max_tokens 2" in row["error"]


def test_indexes_that_are_damaged_or_cannot_be_kept(tmp_path: Path, corpus: Path) -> None:
    write_queries(tmp_path, ROW)
    generate_contexts(options(tmp_path))
    expected = read_rows(tmp_path / "out.jsonl")[0]["documents"]
    for path in (corpus / ".index").rglob("*.npy"):
        path.write_bytes(b"damaged")
    said: list[str] = []
    generate_contexts(options(tmp_path, output_file=tmp_path / "b.jsonl"), said.append)
    assert any("can't be read" in text for text in said)
    assert read_rows(tmp_path / "b.jsonl")[0]["documents"] == expected
    other = tmp_path / "elsewhere"
    write_corpus(other, "pkg", "1.0", [{"path": "pkg.sort", "doc": "Sort an array."}])
    (other / ".index").write_text("a file in its place")
    said.clear()
    settings = {"corpus_path": other, "output_file": tmp_path / "c.jsonl"}
    assert generate_contexts(options(tmp_path, **settings), said.append).num_failed == 0
    assert any("can't be kept" in text for text in said)


def test_packages_that_are_missing_are_named_first(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_queries(tmp_path, ROW)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "sentence_transformers" else find(name, *rest),
    )
    with pytest.raises(ConfigError, match="sentence_transformers"):
        generate_contexts(options(tmp_path, embedding_source="local", num_workers=2))
    assert not (tmp_path / "out.contexts").exists()


# ---- corpora


def archive_of(folder: Path, name: str, text: str = '"""Do."""\n') -> None:
    path = folder / "cache" / "archives" / name / "1.0"
    path.mkdir(parents=True, exist_ok=True)
    write_sdist(path / f"{name}-1.0.tar.gz", {f"{name}-1.0/{name}/__init__.py": text})
    (path / "no-wheel").touch()


def build_options(folder: Path, **more: Any) -> BuildOptions:
    return BuildOptions(corpus_path=folder / "corpus", cache_path=folder / "cache", **more)


def test_only_our_own_corpora_are_replaced(tmp_path: Path) -> None:
    archive_of(tmp_path, "pkg")
    own = write_corpus(tmp_path / "corpus", "pkg", "1.0", [{"path": "pkg.mine", "doc": "d"}])
    text = own.read_text()
    wanted = parse_requirement("pkg==1.0")
    built = build_one(wanted, build_options(tmp_path))
    assert built.error is not None
    assert "somebody's own" in built.error
    assert own.read_text() == text
    assert build_one(wanted, build_options(tmp_path, rebuild=True)).error is None
    assert "pkg.mine" not in own.read_text()
    # An edited one is kept as it is, and not replaced by another kind of build either.
    own.write_text(text)
    assert build_one(wanted, build_options(tmp_path)).was_there
    (tmp_path / "corpus" / "pkg" / "1.0.manifest.json").write_text(
        (tmp_path / "corpus" / "pkg" / "1.0.manifest.json")
        .read_text()
        .replace(f'"extractor_version": {build.EXTRACTOR_VERSION}', '"extractor_version": 0')
    )
    built = build_one(wanted, build_options(tmp_path))
    assert built.error is not None
    assert "was edited" in built.error
    assert own.read_text() == text


def die_or_build(sender: Connection, requirement: Requirement, settings: BuildOptions) -> None:
    if requirement.name == "bad":
        os._exit(3)
    sender.send(build_one(requirement, settings))


def test_a_process_that_dies_costs_its_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        archive_of(tmp_path, name)
    monkeypatch.setattr(build, "_build_and_send", die_or_build)
    built = build_all(["bad==1.0", "good==1.0"], build_options(tmp_path), lambda each: None)
    errors = {each.requirement.name: each.error for each in built}
    assert errors == {"bad": "its process died (exit code 3)", "good": None}


def test_files_of_the_working_directory_are_not_taken_for_pythons_own(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threading.py").write_text("raise ImportError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    write_queries(tmp_path, ROW)
    assert generate_contexts(options(tmp_path, num_workers=2)).num_rows == 1
    archive_of(tmp_path, "good")
    (built,) = build_all(["good==1.0"], build_options(tmp_path), lambda each: None)
    assert built.error is None
    assert "PYTHONSAFEPATH" not in os.environ, "a user's own processes start as ever"


def test_members_in_each_others_way(tmp_path: Path) -> None:
    archive = write_sdist(
        tmp_path / "a.tar.gz", {"pkg/a.py": "x = 1\n", "pkg/a.py/b.py": "", "pkg/c.py": ""}
    )
    extracted = extract(archive.path, tmp_path / "out")
    assert [path.name for path in extracted.files] == ["a.py", "c.py"]
    assert extracted.refused == ["pkg/a.py/b.py (in the way of another member)"]


def test_an_index_password_is_not_shown() -> None:
    error = DownloadError("could not ask https://me:secret@index.example/simple/x")
    assert str(error) == "could not ask https://***@index.example/simple/x"


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["contexts", "--queries_file", "q.jsonl"], "--corpus_path"),
        (["contexts", "--queries_file", "q.jsonl"], "--output_file"),
        (["corpus", "build", "pkg==1.0"], "--corpus_path"),
        (["pipeline", "--queries_file", "q.jsonl", "--engine", "echo"], "--corpus_path"),
    ],
)
def test_a_tilde_that_no_shell_has_replaced_is_no_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    flag: str,
) -> None:
    """As in a TOML file."""
    monkeypatch.chdir(tmp_path)
    write_queries(tmp_path, ROW)
    (tmp_path / "q.jsonl").write_text(json.dumps(ROW))
    needed = ["--output_file", "out.jsonl"] if command[0] == "pipeline" else []
    assert main([*command, *needed, f"{flag}=~/mine"]) == 2
    assert f"{flag} ~/mine: no shell has put the home folder for ~" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


def test_an_index_that_does_not_answer_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(requirement: Requirement, folder: Path) -> None:
        raise DownloadError("the index is down")

    monkeypatch.setattr(download, "_fetch_wheel", refused)
    monkeypatch.setattr(download, "_fetch_sdist", refused)
    with pytest.raises(DownloadError, match=r"^the index is down$"):
        download.fetch_archives(parse_requirement("pkg==1.0"), tmp_path)
