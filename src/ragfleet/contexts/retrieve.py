"""One query → one context row. Pure but for the corpora and indexes it opens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from ragfleet.contexts.assembly import Assembler, Context, TokenCounter
from ragfleet.contexts.dense import Embedder, Vectors, make_embedder
from ragfleet.contexts.matching import Match, match
from ragfleet.contexts.names import names_in, normalise
from ragfleet.contexts.options import ContextsOptions
from ragfleet.contexts.queries import Query
from ragfleet.contexts.search import Searcher
from ragfleet.contexts.store import Corpus, CorpusStore, NoCorpus
from ragfleet.corpus.download import normal_name

INDEX_FOLDER: Final = ".index"
ACCOUNT_NAME: Final = "rates.json"
"""What all workers have asked of an embeddings API; begun anew by each run."""
METHODS: Final = {
    "path": "exact_api_match",
    "alias": "exact_api_match",
    "member": "exact_api_match",
    "case_insensitive": "exact_api_match",
    "suffix": "rag_string_match",
}


class Retriever:
    """Everything a process needs to answer queries with contexts."""

    def __init__(self, options: ContextsOptions, embedder: Embedder | None = None) -> None:
        self.options = options
        self.store = CorpusStore(options.corpus_path, options.corpus_type)
        if embedder is None and options.embedding_source is not None:
            embedder = make_embedder(
                options.embedding_source,
                options.embedding_model,
                options.log_folder / ACCOUNT_NAME,
                options.num_workers,
            )
        self.searcher = Searcher(options.corpus_path / INDEX_FOLDER, embedder)
        self.counter = TokenCounter(options.model_path)
        self._assembler = Assembler(self.counter, options.max_documents, options.max_tokens)

    def rows(self, queries: Sequence[Query]) -> list[dict[str, Any]]:
        """One row each; questions that need their meaning are embedded together."""
        planned = [self._plan(query) for query in queries]
        needy = [plan for plan in planned if plan.needs_search]
        started_s = time.perf_counter()
        vectors = self.searcher.embed([plan.query.query for plan in needy])
        share_s = (time.perf_counter() - started_s) / max(len(needy), 1)
        if vectors is not None:
            for plan, vector in zip(needy, vectors, strict=True):
                plan.vector = vector
                plan.seconds += share_s
        return [self._row(plan) for plan in planned]

    def corpora_of(self, query: Query) -> tuple[list[Corpus], dict[str, str]]:
        """The corpora of a query's dependencies, and why the missing ones are missing.

        Raises NoCorpus when none is there.
        """
        wanted = dict(query.dependencies)
        if not wanted:
            several = [name for name in self.store.packages if len(self.store.versions(name)) > 1]
            if several:
                raise NoCorpus(
                    "the query names no dependencies, and there are several versions of"
                    f" {', '.join(several[:5])}: give it `dependencies`"
                )
            wanted = dict.fromkeys(self.store.packages, ())
        found, missing = [], {}
        for package, versions in wanted.items():
            try:
                version = self.store.resolve(package, versions, self.options.nearest_version)
                found.append(self.store.load_usable(package, version))
            except NoCorpus as error:
                missing[package] = str(error)
        if not found:
            raise NoCorpus("; ".join(missing.values()))
        return found, missing

    def _plan(self, query: Query) -> _Plan:
        started_s = time.perf_counter()
        plan = _Plan(query)
        try:
            if query.error is not None:
                plan.fail("invalid_query", query.error)
            else:
                self._match(plan)
        except NoCorpus as error:
            plan.fail("no_corpus", str(error))
        plan.seconds = time.perf_counter() - started_s
        return plan

    def _match(self, plan: _Plan) -> None:
        query = plan.query
        corpora, missing = self.corpora_of(query)
        roots = {root for corpus in corpora for root in corpus.import_roots}
        distributions = {
            corpus.package: next(iter(corpus.import_roots))
            for corpus in corpora
            if len(corpus.import_roots) == 1 and corpus.package not in corpus.import_roots
        }
        target = normalise(query.target_api or "", roots, distributions)
        own = target.partition(".")[0]
        for package, reason in missing.items():
            if own and own in (package, normal_name(package).replace("-", "_")):
                raise NoCorpus(reason)  # other packages can't say what this one does
        plan.missing = sorted(missing)
        plan.corpora = sorted(corpora, key=lambda corpus: own not in corpus.import_roots)
        plan.target = target
        plan.match = match(plan.corpora, target, self.options.enable_str_match)

    def _row(self, plan: _Plan) -> dict[str, Any]:
        started_s = time.perf_counter()
        context = Context()
        if plan.error is None:
            context = self._context(plan)
            if not context.documents:
                plan.fail("nothing_found", self._why_nothing(context))
        seconds = plan.seconds + time.perf_counter() - started_s
        return self._assembled(plan, context, seconds)

    def _why_nothing(self, context: Context) -> str:
        if context.num_skipped:
            return f"no document fits into --max_tokens {self.options.max_tokens}"
        reason = "no document of the dependencies shares a word with the question"
        if self.options.embedding_source is None:
            reason += (
                "; --embedding_source searches by meaning, and needs a multilingual"
                " --embedding_model where questions and documents differ in language"
            )
        return reason

    def _context(self, plan: _Plan) -> Context:
        found = plan.match
        if found is not None and found.kind != "suffix":
            hits = [(found.corpus, found.number, found.name)]
            return self._assembler.assemble(hits, is_alone=True)
        ranked: list[tuple[Corpus, int]] = []
        if found is not None:
            ranked.append((found.corpus, found.number))
        else:
            ranked += self._named(plan)
        ranked += self.searcher.search(
            plan.corpora, plan.query.query, plan.target or None, plan.vector
        )
        return self._assembler.assemble(
            (corpus, number, corpus.documents[number].path) for corpus, number in ranked
        )

    def _named(self, plan: _Plan) -> list[tuple[Corpus, int]]:
        """Documents whose whole path stands in the question itself."""
        roots = {root for corpus in plan.corpora for root in corpus.import_roots}
        found = []
        for text in names_in(plan.query.query):
            hit = match(plan.corpora, normalise(text, roots, {}), False)
            if hit is not None and hit.kind != "case_insensitive":
                found.append((hit.corpus, hit.number))
        return found

    def _assembled(self, plan: _Plan, context: Context, seconds: float) -> dict[str, Any]:
        query = plan.query
        method = "rag_fallback" if plan.match is None else METHODS[plan.match.kind]
        row: dict[str, Any] = {
            "id": query.id,
            "original_item_id": query.original_item_id,
            "query_index": query.query_index,
            "dedup_key": query.dedup_key,
            "query": query.query,
            "target_api": query.target_api,
            "dependencies": {
                package: versions[0] if len(versions) == 1 else list(versions) or None
                for package, versions in query.dependencies.items()
            },
            "retrieval_method": None if plan.error is not None else method,
            "context": context.text,
            "context_length": len(context.text),
            "retrieval_time": round(seconds, 6),
            "success": plan.error is None,
        }
        if plan.error is not None:
            row["retrieval_time"] = 0.0  # nothing was; and asked again, it is the same row
            row["error"], row["error_type"] = plan.error, plan.error_type
            return row
        row["match_kind"] = "search" if plan.match is None else plan.match.kind
        row["resolved_versions"] = {corpus.package: corpus.version for corpus in plan.corpora}
        if plan.missing:
            row["missing_dependencies"] = plan.missing
        row["context_tokens"] = context.tokens
        row["documents"] = context.documents
        return row


class _Plan:
    """A query on its way: matched or not yet searched for."""

    def __init__(self, query: Query) -> None:
        self.query = query
        self.corpora: list[Corpus] = []
        self.target = ""
        self.match: Match | None = None
        self.vector: Vectors | None = None
        self.missing: list[str] = []
        self.error: str | None = None
        self.error_type: str | None = None
        self.seconds = 0.0

    @property
    def needs_search(self) -> bool:
        return self.error is None and (self.match is None or self.match.kind == "suffix")

    def fail(self, error_type: str, error: str) -> None:
        self.error_type, self.error = error_type, error
