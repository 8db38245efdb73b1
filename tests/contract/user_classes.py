"""Backends as users write them, for the engine contract."""

from __future__ import annotations

import asyncio

from ragfleet.engines.query_based import QueryBasedInference


class Sync(QueryBasedInference):
    version = "3"

    def setup(self):
        self.prefix = "sync"

    def generate_answer(self, query, context, retrieval_method):
        if "RAISE" in query:
            raise LookupError("no such page")
        if "NUMBER" in query:
            return 42
        if "EXIT" in query:
            raise SystemExit(3)
        return f"{self.prefix} {self.record['id']} {query}"


class Async(QueryBasedInference):
    running = 0
    most = 0

    async def generate_answer(self, query, context, retrieval_method):
        Async.running += 1
        Async.most = max(Async.most, Async.running)
        try:
            # The last ones submitted finish first.
            await asyncio.sleep(0.001 * (20 - int(self.record["id"].split("-")[-1])))
            if "HANG" in query:
                await asyncio.sleep(3600)
            if "RAISE" in query:
                raise LookupError("no such page")
            if "NUMBER" in query:
                return 42
            if "EXIT" in query:
                raise SystemExit(3)
            if "CANCEL" in query:
                raise asyncio.CancelledError
            return f"async {self.record['id']} {query}"
        finally:
            Async.running -= 1


class Prompt(QueryBasedInference):
    def create_prompt(self, query, context, retrieval_method):
        if "RAISE" in query:
            raise LookupError("no such page")
        if "NUMBER" in query:
            return 42
        if "ASK" in query:
            return self.generate_answer("Say it shorter", context, retrieval_method)
        return f"{self.record['id']}: {query} ({retrieval_method})\n{context}"


class Neither(QueryBasedInference):
    """Changes nothing."""


class Around(QueryBasedInference):
    """Asks the configured engine, twice for some."""

    def generate_answer(self, query, context, retrieval_method):
        first = super().generate_answer(query, context, retrieval_method)
        if "TWICE" not in query:
            return first
        return first + "|" + super().generate_answer(query, context, retrieval_method)


class AroundAsync(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        await asyncio.sleep(0)
        return super().generate_answer(query, context, retrieval_method)


class Swallows(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        try:
            return super().generate_answer(query, context, retrieval_method)
        except Exception:
            return "swallowed"


class Text(str):
    """As numpy's strings are, and those of parsers."""

    def __str__(self):
        return "<p>some text</p>"


class KindOfString(QueryBasedInference):
    def generate_answer(self, query, context, retrieval_method):
        return Text("some text")


class KindOfStringAsync(QueryBasedInference):
    async def generate_answer(self, query, context, retrieval_method):
        return Text("some text")


class KindOfPrompt(QueryBasedInference):
    def create_prompt(self, query, context, retrieval_method):
        return Text("some text")


class AsksInSetup(QueryBasedInference):
    def setup(self):
        super().generate_answer("q", "c", None)

    def generate_answer(self, query, context, retrieval_method):
        return "some text"


class BadConstructor(QueryBasedInference):
    def __init__(self, **settings):
        raise OSError("no licence")


class NotASubclass:
    pass
