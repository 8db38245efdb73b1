"""The files and batches endpoints: upload, submit, find again, look, download.

Each method is one thing at the server, or a look at whether it was done before. OpenAI's form;
Together wraps a new batch in `job`, lists without an envelope, shouts its states and has an upload
path of its own. Raises `CallFailed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from ragfleet.remote.client import ApiClient
from ragfleet.remote.replies import Fault
from ragfleet.remote.spec import RemoteSpec

_ENDED: Final = frozenset({"completed", "failed", "expired", "cancelled"})
_PAGE: Final = 100


class CallFailed(Exception):
    """A call that was not answered; the fault says whether to try again."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a batch."""

    id: str
    status: str = ""
    input_file_id: str = ""
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, Any] | None = None
    errors: Any = None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED

    def first_error(self) -> tuple[str, str]:
        """(code, message) of the first thing wrong with its file."""
        data = self.errors.get("data") if isinstance(self.errors, dict) else self.errors
        first = data[0] if isinstance(data, list) and data else None
        if isinstance(first, dict):
            return str(first.get("code") or ""), str(first.get("message") or "")
        return "", str(first or "")


class BatchApi:
    """Coroutines over one client."""

    def __init__(self, spec: RemoteSpec, client: ApiClient) -> None:
        self._spec, self._client = spec, client
        self._is_together = spec.provider == "togetherai"

    async def upload(self, path: Path, name: str) -> str:
        """The id of the file at the server."""
        where, form = "/files", {"purpose": "batch"}
        if self._is_together:
            where = "/files/upload"
            form = {"purpose": "batch-api", "file_name": name, "file_type": "jsonl"}
        return str(self._json(await self._client.upload(where, form, path, name))["id"])

    async def find_file(self, name: str) -> str | None:
        query = {} if self._is_together else {"purpose": "batch"}
        async for entry in self._pages("/files", query):
            if entry.get("filename") == name:
                return str(entry["id"])
        return None

    async def submit(self, file_id: str, nonce: str) -> Batch:
        body = {
            "input_file_id": file_id,
            "endpoint": f"/v1{self._spec.path}",
            "completion_window": "24h",
            "metadata": {"ragfleet_part": nonce},
        }
        return _batch(self._json(await self._client.call("POST", "/batches", body)))

    async def find_batch(self, file_id: str) -> Batch | None:
        """The batch of a file, which belongs to one part alone."""
        async for entry in self._pages("/batches", {}):
            batch = _batch(entry)
            # One that the provider refused did nothing; its file is submitted again.
            if batch.input_file_id == file_id and batch.status != "failed":
                return batch
        return None

    async def look(self, batch_id: str) -> Batch:
        return _batch(self._json(await self._client.call("GET", f"/batches/{batch_id}")))

    async def download(self, file_id: str) -> bytes:
        return self._bytes(await self._client.call("GET", f"/files/{file_id}/content"))

    async def _pages(self, path: str, query: Mapping[str, str]) -> Any:
        after = ""
        while True:
            full = {**query, "limit": str(_PAGE), **({"after": after} if after else {})}
            page = self._json(await self._client.call("GET", path, query=full))
            entries = page.get("data") or []
            for entry in entries:
                yield entry
            if not page.get("has_more") or not entries:
                return
            after = str(entries[-1]["id"])

    def _bytes(self, reply: bytes | Fault) -> bytes:
        if isinstance(reply, Fault):
            raise CallFailed(reply)
        return reply

    def _json(self, reply: bytes | Fault) -> dict[str, Any]:
        data = self._bytes(reply)
        try:
            value = msgspec.json.decode(data)
        except msgspec.DecodeError:
            value = None
        if isinstance(value, list):
            return {"data": value}
        if not isinstance(value, dict):
            fault = Fault(error_type="bad_reply", message="the reply is not whole", remedy="retry")
            raise CallFailed(fault)
        return value


def _batch(value: Mapping[str, Any]) -> Batch:
    found = value.get("job", value)
    batch = msgspec.convert(found, Batch, strict=False)
    return msgspec.structs.replace(batch, status=batch.status.lower())
