"""One line of OpenAI's batch files: a request on its way there, a reply on its way back.

Pure: bytes in, values out. The same lines are what `ragfleet export` writes, `vllm run-batch` reads
and answers, and `ragfleet import` takes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ragfleet.engines.protocol import RequestKey
from ragfleet.remote.replies import Answer, Fault, broken, read_reply


class _Response(msgspec.Struct):
    status_code: int = 200
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: Any = None
    method: Any = None
    """Of requests alone."""


_decode = msgspec.json.Decoder(_Line).decode


def request_line(key: RequestKey, path: str, body: Mapping[str, Any]) -> bytes:
    """`path` is the API's, like /chat/completions; the key is the line's custom_id."""
    line = {"custom_id": key.hex(), "method": "POST", "url": f"/v1{path}", "body": body}
    return msgspec.json.encode(line) + b"\n"


def read_line(line: bytes) -> tuple[RequestKey, Answer | Fault] | None:
    """None for a line that is none of ours or not whole."""
    try:
        found = _decode(line.removeprefix(codecs.BOM_UTF8))  # an editor's, at a file's begin
        key = bytes.fromhex(found.custom_id)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if len(key) != 16 or len(found.custom_id) != 32:
        return None
    response = found.response
    if response is not None:
        return key, read_reply(response.status_code, {}, bytes(response.body))
    if found.method is not None:  # the file that was exported, not what came of it
        return None
    error = found.error if isinstance(found.error, dict) else {}
    if error.get("code") == "batch_expired":
        return key, broken("the batch expired before this request's turn", "batch_expired")
    return key, broken(str(error.get("message") or "the line holds no response")[:400])


def key_of_request(line: bytes) -> RequestKey:
    """The key of a line that `request_line` made."""
    return bytes.fromhex(_decode(line).custom_id)


def lines_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file
