"""Embeddings by an API: a server on loopback that misbehaves as such servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from making import read_rows, write_corpus

from ragfleet.cli import main
from ragfleet.contexts import together
from ragfleet.contexts.dense import Embedder, check_embedder, make_embedder
from ragfleet.errors import ConfigError, RemoteError, RunError

KEY = "secret-of-24-signs-abcdef"


class Together(BaseHTTPRequestHandler):
    """Takes faults from `faults` first, then answers; out of order, as the API may."""

    faults: ClassVar[list[tuple[int, dict[str, str], str]]] = []
    asked: ClassVar[list[tuple[str, str | None, int]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Authorization"], len(body["input"])))
        rows = [
            {"index": i, "embedding": [float(len(text)), 1.0]}
            for i, text in enumerate(body["input"])
        ]
        answer = json.dumps({"data": rows[::-1], "usage": {"prompt_tokens": 9}})
        status, headers, text = self.faults.pop(0) if self.faults else (200, {}, answer)
        data = text.encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Together]]:
    pytest.importorskip("openai", reason="needs ragfleet[remote]")
    Together.faults, Together.asked = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Together) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("TOGETHER_API_KEY", KEY)
        monkeypatch.setenv("TOGETHER_BASE_URL", f"http://127.0.0.1:{listening.server_port}/v1")
        yield Together
        listening.shutdown()


def embedder_of(folder: Path) -> Embedder:
    return make_embedder("togetherai", "some/model", folder / "rates.json", 1)


def test_vectors_come_back_in_order(tmp_path: Path, server: type[Together]) -> None:
    embedder = embedder_of(tmp_path)
    vectors = embedder.embed(["a" * n for n in range(70)])
    assert vectors.shape == (70, 2)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
    assert np.all(np.diff(vectors[1:, 0]) > 0)
    assert sorted(server.asked) == [("/v1/embeddings", f"Bearer {KEY}", count) for count in (6, 64)]
    assert KEY not in embedder.name
    assert embedder.embed([]).size == 0
    assert embedder.embed(["again"]).shape == (1, 2)


FAULTS = [
    (429, {"Retry-After": "0.2"}, '{"error": {"message": "slow down"}}'),
    (503, {}, "busy"),
    (500, {}, "oops"),
    (200, {}, '{"data": [{"index": 0, "embed'),
    (200, {}, '{"data": []}'),
    (200, {}, '{"error": {"code": 502, "message": "upstream"}}'),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again(
    tmp_path: Path, server: type[Together], fault: tuple[int, dict[str, str], str]
) -> None:
    server.faults = [fault]
    assert embedder_of(tmp_path).embed(["some text"]).shape == (1, 2)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("status", "text", "kind", "reason"),
    [
        (401, f'{{"error": {{"message": "bad key {KEY}"}}}}', RemoteError, "TOGETHER_API_KEY"),
        (404, '{"error": {"message": "no model"}}', RemoteError, "--embedding_model"),
        (402, '{"error": {"message": "no credit"}}', RemoteError, "no credit"),
        (400, '{"error": {"message": "bad input"}}', RunError, "refused: HTTP 400: bad input"),
        (200, '{"data": [{"index": 0, "embedding": [1.0]}]}', RunError, "1 vectors for 2 texts"),
    ],
)
def test_what_does_not_pass_ends_it_at_once(
    tmp_path: Path, server: type[Together], status: int, text: str, kind: type, reason: str
) -> None:
    server.faults = [(status, {}, text)] * 2
    with pytest.raises(kind, match=reason) as caught:
        embedder_of(tmp_path).embed(["a", "b"])
    assert KEY not in str(caught.value)
    assert len(server.asked) == 1


def test_a_server_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: type[Together]
) -> None:
    monkeypatch.setenv("TOGETHER_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(together, "_OUTAGE_S", 1.0)
    with pytest.raises(RemoteError, match="answers no more: the connection failed"):
        embedder_of(tmp_path).embed(["a"])


def test_what_can_be_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs ragfleet[remote]")
    monkeypatch.delenv("TOGETHER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="TOGETHER_API_KEY"):
        check_embedder("togetherai", None)
    monkeypatch.setenv("TOGETHER_API_KEY", KEY)
    monkeypatch.setenv("TOGETHER_BASE_URL", "ftp://x")
    with pytest.raises(ConfigError, match="TOGETHER_BASE_URL"):
        check_embedder("togetherai", None)


def test_the_command(
    tmp_path: Path, server: type[Together], capfd: pytest.CaptureFixture[str]
) -> None:
    """A refusal in the middle keeps what is there; nothing that is written or said has the key."""
    rows = [{"path": "pkg.sort", "doc": "Sort an array."}, {"path": "pkg.read", "doc": "Read it."}]
    write_corpus(tmp_path / "corpus", "pkg", "1.0", rows)
    queries = tmp_path / "q.jsonl"
    text = json.dumps({"query": "how to sort", "dependencies": {"pkg": "1.0"}})
    queries.write_text(text + "\n")
    flags = ["--queries_file", str(queries), "--corpus_path", str(tmp_path / "corpus")]
    flags += ["--output_file", str(tmp_path / "out.jsonl"), "--embedding_source", "togetherai"]
    server.faults = [(401, {}, f'{{"error": {{"message": "who is {KEY}?"}}}}')] * 2
    assert main(["contexts", *flags]) == 1
    assert not (tmp_path / "out.jsonl").exists()
    server.faults = []
    assert main(["contexts", *flags]) == 0
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert {document["path"] for document in row["documents"]} == {"pkg.sort", "pkg.read"}
    assert list((tmp_path / "corpus" / ".index").rglob("dense-together-*.npy"))
    said = "".join(capfd.readouterr())
    assert "(API key)" in said
    assert KEY not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "out.contexts" / "rates.json") in files
    assert not any(KEY.encode() in path.read_bytes() for path in files)
