"""The files and batches endpoints of OpenAI, emulated on a `FakeServer`.

A batch is done when it was looked at often enough; limits of files are enforced, and every
submitted request is remembered: a second submission of one is what the tests look for.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fake_server import FakeServer, Reply


class FakeBatches:
    """`FakeBatches(server)` adds the endpoints to it."""

    def __init__(self, server: FakeServer, *, most_requests: int = 50_000) -> None:
        self.server = server
        self.most_requests = most_requests
        self.files: dict[str, tuple[str, bytes]] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.submitted: Counter[str] = Counter()
        self.share_done = 1.0
        """Of a batch's requests, before it ends; below 1 it expires."""
        self.loses = ""
        """A word: requests with it get no line in any file."""
        self.refuses = ""
        """Code that batches fail with at once."""
        self.most_queued = 1 << 60
        """Requests that may be under way together."""
        self.looks = 1
        """So many looks find a batch unfinished."""
        self.begin = b""
        """What files of replies begin with."""
        server.routes |= {
            ("POST", "/v1/files"): self._upload,
            ("GET", "/v1/files"): self._list_files,
            ("GET", "/v1/files/([^/]+)/content"): self._content,
            ("POST", "/v1/batches"): self._create,
            ("GET", "/v1/batches"): self._list_batches,
            ("GET", "/v1/batches/([^/]+)"): self._look,
        }

    def _upload(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        boundary = headers["content-type"].partition("boundary=")[2].encode().strip(b'"')
        name, content = "", b""
        for part in body.split(b"--" + boundary):
            head, _, data = part.partition(b"\r\n\r\n")
            if found := re.search(rb'filename="([^"]+)"', head):
                name, content = found[1].decode(), data.removesuffix(b"\r\n")
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = (name, content)
        return Reply(200, {"id": file_id, "filename": name, "purpose": "batch"})

    def _list_files(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        data = [{"id": file_id, "filename": name} for file_id, (name, _) in self.files.items()]
        return Reply(200, {"data": data, "has_more": False})

    def _content(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        return Reply(200, self.files[match[1]][1])

    def _create(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        wanted = json.loads(body)
        lines = self.files[wanted["input_file_id"]][1].splitlines()
        batch: dict[str, Any] = {
            "id": f"batch-{len(self.batches)}",
            "status": "in_progress",
            "input_file_id": wanted["input_file_id"],
            "metadata": wanted["metadata"],
            "looks": 0,
        }
        under_way = [b for b in self.batches.values() if b["status"] == "in_progress"]
        queued = sum(batch["num_requests"] for batch in under_way) + len(lines)
        batch["num_requests"] = len(lines)
        code = self.refuses
        code = code or ("too_many_requests" if len(lines) > self.most_requests else "")
        code = code or ("token_limit_exceeded" if queued > self.most_queued else "")
        if code:
            errors = [{"code": code, "message": "refused"}]
            batch |= {"status": "failed", "errors": {"data": errors}}
        else:
            self.submitted.update(json.loads(line)["custom_id"] for line in lines)
        self.batches[batch["id"]] = batch
        return Reply(200, batch)

    def _list_batches(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        return Reply(200, {"data": list(self.batches.values()), "has_more": False})

    def _look(self, match: re.Match[str], headers: Mapping[str, str], body: bytes) -> Reply:
        batch = self.batches[match[1]]
        if batch["status"] == "in_progress":
            batch["looks"] += 1
            if batch["looks"] > self.looks:
                self._work(batch)
        return Reply(200, batch)

    def _work(self, batch: dict[str, Any]) -> None:
        lines = self.files[batch["input_file_id"]][1].splitlines()
        done = lines if self.share_done >= 1 else lines[: max(1, int(len(lines) * self.share_done))]
        output, errors = [], []
        for line in reversed(done):  # order is nobody's promise
            if self.loses and self.loses.encode() in line:
                continue
            request = json.loads(line)
            reply = self.server.answer(request["body"], "key")
            result = {
                "id": "x",
                "custom_id": request["custom_id"],
                "response": {"status_code": reply.status, "body": reply.body},
                "error": None,
            }
            (output if reply.status == 200 else errors).append(json.dumps(result))
        for line in lines[len(done) :]:
            expired = {"code": "batch_expired", "message": "late"}
            custom_id = json.loads(line)["custom_id"]
            errors.append(json.dumps({"custom_id": custom_id, "response": None, "error": expired}))
        batch["status"] = "completed" if len(done) == len(lines) else "expired"
        for name, found in (("output", output), ("error", errors)):
            if found:
                file_id = f"file-{name}-{batch['id']}"
                self.files[file_id] = (file_id, self.begin + "\n".join(found).encode() + b"\n")
                batch[f"{name}_file_id"] = file_id
