"""The work that engines are measured on: real documentation text, made from a seed.

What an arm of a benchmark needs, in this order:

    spec = SHAPES["shared"]                   a WorkloadSpec; dataclasses.replace(spec, …) for more
    records = make_records(spec)              input lines as dicts, in file order
    write_records(records, path)              the same as a contexts file
    model_dir = make_model("llama", folder)   a random model of about 32 M weights, made once
    requests = tokenised(records, model_dir, spec.sampling)
                                              the prompts that ragfleet itself would send, with ids:
                                              every arm gets these, so all do the same work
    grouped(distinct(requests))               each key once, prefixes together: the best order
    count_tokens(requests)                    prompt tokens: all, of distinct ones, with sharing

Shapes: `shared` (80 contexts in 400 records, in random order, 10 % duplicates), `grouped` (the same
already in order), `unshared` (nothing shared, no duplicates), `mixed` (contexts of 100 to 3,000
tokens). Knows nothing of engines; torch is imported by `make_model` alone.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from ragfleet.engines.protocol import Prepared, PromptSettings, Request, SamplingParams
from ragfleet.prompts import DEFAULT_SYSTEM_PROMPT
from ragfleet.tokens import load_tokenizer, prepare_prompt

ROOT: Final = Path(__file__).resolve().parent.parent
CORPUS: Final = ROOT / "examples" / "contexts.jsonl"
CHARS_PER_TOKEN: Final = 3.6
"""Of the benchmark models' own tokenizer on this text; the real count is in `count_tokens`."""
QUESTIONS: Final = (
    "What is the signature of {name}, and which of its parameters have a default? I want to call it"
    " with positional arguments only, from code that has to run with older versions as well.",
    "What does {name} return, in one sentence?",
    "Is there anything to watch out for when calling {name} in a loop over some thousand inputs? At"
    " the moment I call it once for each of them and collect what it returns in a list.",
    "How do I use {name} with my own data, and what are its most important parameters?",
    "Which exceptions does {name} raise for empty input, and what should I check before the call?"
    " Please name the parameter that is to blame where the documentation says so.",
    "{name} 的参数有哪些？它们的默认值是什么？请用一句话说明每个参数的作用。",
)
ARCHITECTURES: Final = {
    "llama": ["--arch", "llama"],
    "qwen2": ["--arch", "qwen2", "--tie_word_embeddings"],  # bias on Q, K and V
    "qwen3": ["--arch", "qwen3", "--tie_word_embeddings"],  # norms on Q and K
    "mistral": ["--arch", "mistral"],
}


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """What a workload is made from; equal specs give equal records."""

    num_records: int = 400
    num_contexts: int = 80
    context_tokens: int = 510
    """Mean length of a context."""
    spread: float = 0.5
    """Of the contexts' lengths: sigma of a log-normal distribution, 0 for all alike."""
    least_tokens: int = 60
    most_tokens: int = 3000
    duplicates: float = 0.1
    """Share of the records that repeat another one."""
    in_order: bool = False
    """Records of one context together, as in a file that is already grouped."""
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    """Of the text, and where `temperature` is above 0 of each record's draws; None: unseeded."""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p
        )


SHAPES: Final = {
    "shared": WorkloadSpec(),
    "grouped": WorkloadSpec(in_order=True),
    "unshared": WorkloadSpec(num_records=160, num_contexts=160, duplicates=0.0),
    "mixed": WorkloadSpec(
        num_records=120, num_contexts=40, context_tokens=1000, spread=0.9, least_tokens=100
    ),
}


# ---- records


def make_records(spec: WorkloadSpec) -> list[dict[str, Any]]:
    """Input lines in file order. The first `num_contexts` distinct ones ask each context once."""
    rng = random.Random(spec.seed or 0)
    sections = _sections()
    contexts = [_context(rng, sections, spec) for _ in range(spec.num_contexts)]
    num_distinct = max(1, round(spec.num_records * (1 - spec.duplicates)))
    asked: list[tuple[int, str]] = []
    for number in range(num_distinct):
        context = number if number < len(contexts) else rng.randrange(len(contexts))
        names = re.findall(r"^### (\S+) \(", contexts[context], re.MULTILINE)
        turn = number // len(contexts)
        question = QUESTIONS[(number + turn) % len(QUESTIONS)].format(name=rng.choice(names))
        if (context, question) in asked:  # a duplicate by chance would not be counted as one
            question += f" (Case {number}.)"
        asked.append((context, question))
    asked += rng.choices(asked, k=spec.num_records - num_distinct)
    rng.shuffle(asked)
    if spec.in_order:
        asked.sort(key=lambda pair: pair[0])
    return [
        {
            "id": f"q{number}",
            "query": question,
            "context": contexts[context],
            "retrieval_method": "rag_fallback",
            "success": True,
        }
        for number, (context, question) in enumerate(asked)
    ]


def _sections() -> list[str]:
    """Distinct documentation of single APIs, in the corpus' order."""
    found: dict[str, None] = {}
    for line in CORPUS.read_text(encoding="utf-8").splitlines():
        context = json.loads(line)["context"]
        for section in re.split(r"\n\n(?=### )", context):
            if re.match(r"### \S+ \(", section):
                found.setdefault(section)
    return list(found)


def _context(rng: random.Random, sections: Sequence[str], spec: WorkloadSpec) -> str:
    # mu - sigma²/2 keeps the mean where it is asked for.
    factor = rng.lognormvariate(-(spec.spread**2) / 2, spec.spread)
    tokens = min(max(spec.context_tokens * factor, spec.least_tokens), spec.most_tokens)
    chars = int(tokens * CHARS_PER_TOKEN)
    text = rng.choice(sections)
    while len(text) < chars:
        text += "\n\n" + rng.choice(sections)
    return text[:chars]


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


# ---- requests


def tokenised(
    records: Sequence[dict[str, Any]],
    model_dir: Path,
    sampling: SamplingParams,
    seed: int | None = None,
) -> list[Prepared]:
    """One request per record, in file order, rendered and tokenised as the engines do it.

    Equal records have equal keys at temperature 0, as in a run; sampled ones are all distinct.
    """
    tokenizer = load_tokenizer(model_dir)
    settings = PromptSettings(system_prompt=DEFAULT_SYSTEM_PROMPT)
    requests = []
    for number, record in enumerate(records):
        said = (record["query"], record["context"], sampling.temperature > 0 and number)
        request = Request(
            key=xxhash.xxh3_128_digest(json.dumps(said).encode()),
            query=record["query"],
            context=record["context"],
            retrieval_method=record["retrieval_method"],
            record=record,
            seed=None if seed is None else seed * 1_000_003 + number,
        )
        prepared = prepare_prompt(request, settings, tokenizer, sampling, None)
        assert isinstance(prepared, Prepared), prepared
        requests.append(prepared)
    return requests


def distinct(requests: Sequence[Prepared]) -> list[Prepared]:
    """The first request of each key."""
    return list({request.key: request for request in reversed(requests)}.values())[::-1]


def grouped(requests: Sequence[Prepared]) -> list[Prepared]:
    """Requests of one context together, contexts in order of first appearance."""
    first = {request.request.context: n for n, request in reversed(list(enumerate(requests)))}
    return sorted(requests, key=lambda request: first[request.request.context])


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Prompt tokens that have to be read."""

    all: int
    distinct: int
    """With equal requests answered once."""
    shared: int
    """With each token that follows the same tokens read once: a prefix tree's nodes."""


def count_tokens(requests: Sequence[Prepared]) -> TokenCounts:
    once = distinct(requests)
    prompts = sorted(list(request.token_ids) for request in once)
    shared = 0
    before: list[int] = []
    for prompt in prompts:
        common = next(
            (n for n, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b),
            min(len(before), len(prompt)),
        )
        shared += len(prompt) - common
        before = prompt
    return TokenCounts(
        all=sum(len(request.token_ids) for request in requests),
        distinct=sum(map(len, prompts)),
        shared=shared,
    )


# ---- models


def make_model(arch: str, folder: Path, size: Literal["full", "small"] = "full") -> Path:
    """A random model under `folder`, made once: about 32 M weights ("full") or 2 M ("small")."""
    spec = importlib.util.spec_from_file_location(
        "make_small_model", ROOT / "tools" / "make_small_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shape = (
        ["--hidden_size", "512", "--num_layers", "8", "--head_dim", "64", "--vocab_size", "8192"]
        if size == "full"
        else ["--hidden_size", "128", "--num_layers", "4", "--head_dim", "32"]
    )
    out = folder / f"{arch}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    tool.main([str(out), *ARCHITECTURES[arch], *shape, "--initializer_range", "0.1"])
    return out
