"""The engine seam: the only thing the worker's loop knows about generation.

Owns the types that cross it. Knows nothing of files, shards, claims or processes.

Those made once per request are msgspec structs, which cost a fifth of a frozen dataclass
(`msgspec.structs.replace` copies them).

The contract, which `tests/contract/` holds every engine to:
- exactly one outcome for each submitted request, in any order;
- one bad request never fails its neighbours: `prepare` returns a `Failure` for what can be told
  before anything is spent, `step` returns one for what is found later;
- `EngineDead` from `step` says that nothing submitted will be answered any more;
- `progress` never goes back, and moves while the engine works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from ragfleet.remote.spec import RemoteSpec

RequestKey = bytes
"""16 bytes: what identifies an answer, see `ragfleet.records.request_key`."""

FinishReason = Literal["stop", "length"]

RequestOrder = Literal["grouped", "leader_first", "by_length"]
"""In which order an engine likes the requests of a chunk: each prefix group together; one request
of each group, then the others (for prefix caches that share only what is finished); the longest
first (for padded batches)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the same for all requests of a run (seeds are per request)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSettings:
    """What turns a record into a prompt; all of it is part of the run's identity."""

    system_prompt: str
    template: str | None = None
    """Source of a Jinja2 template for the user message; None is the built-in one."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    clock: str = "1970-01-01T00:00:00"
    """ISO time handed to chat templates as now: frozen at a run's first start."""
    truncate_context: Literal["error", "head", "tail"] = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """All an engine is made from. `num_gpus` are those visible to the process; 0 is CPU."""

    model_dir: Path | None
    sampling: SamplingParams
    prompts: PromptSettings
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    num_gpus: int = 0
    num_threads: int = 1
    """CPU threads for this worker: cores // workers."""
    batch_size: int | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Options in the engine's own words; vLLM has them."""
    gpu_memory_bytes: int | None = None
    """This worker's part of each of its GPUs, where workers share them; None: it has them alone."""
    prefix_sharing: Literal["auto", "on", "off"] = "auto"
    """Whether the transformers engine may read what prompts share once; auto: where it can."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values of that; None: chosen from the device's memory."""
    max_model_len: int | None = None
    trust_remote_code: bool = False
    max_retries: int = 2
    request_timeout_s: float | None = None
    inference_type: str = "local"
    remote: RemoteSpec | None = None
    """Where a remote API is and what it may cost; no key."""
    rank: int = 0
    num_workers: int = 1
    shared_dir: Path | None = None
    """Folder of the launch, which all its workers see."""
    run_dir: Path | None = None
    """Folder of the run, which outlives a launch."""
    say: Callable[[str], None] | None = None
    """Tells the person who watches the run; what matters to them is rare."""
    degrade: Callable[[str], None] | None = None
    """Told why it works slower from now on than `EngineInfo` said; a line of the end statistics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What `start` found out."""

    name: str
    """For people: 'transformers 5.23.0, LlamaForCausalLM, fp32, cpu'."""
    max_model_len: int | None
    batch_size: int = 1
    """Requests it works on together; a worker with fewer in flight looks for more to steal."""
    order: RequestOrder = "grouped"
    may_block: bool = False
    """True where `step` can block for as long as a user's code does."""
    survives: bool = False
    """What is in flight goes on elsewhere when this process leaves, and is found again."""
    notes: tuple[str, ...] = ()
    """Lines for the log: what degrades, what is not applied."""
    degraded: str | None = None
    """Why it works slower than this engine can; also a line of the end statistics."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One key to answer. `record` is the whole decoded input line."""

    key: RequestKey
    query: str
    context: str
    retrieval_method: str | None
    record: Mapping[str, Any]
    seed: int | None = None
    """64-bit seed of this request's own random stream; None when greedy."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A request rendered and tokenised once; `token_ids` is empty where there is no tokenizer."""

    request: Request
    prompt: str
    token_ids: Sequence[int] = ()
    truncated_tokens: int = 0
    """Context tokens cut off by --truncate_context."""

    @property
    def key(self) -> RequestKey:
        return self.request.key


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    key: RequestKey
    text: str
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that were not computed for this request, because their keys and values were
    there already; None where the engine does not know."""
    reasoning: str | None = None
    token_ids: Sequence[int] = ()
    """Generated ids without the end marker, where the engine has them (for tests of equality)."""
    inference_time_s: float | None = None
    """Where waiting for a turn is not to be counted; else the time since `submit` is taken."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has no answer.

    `error_type` is one word: invalid_record, too_long, timeout, oom, generation_error, ….
    `retryable` failures are tried again up to --max_retries times.
    """

    key: RequestKey
    error_type: str
    error: str
    retryable: bool = False


Outcome = Completion | Failure


class Engine(Protocol):
    """Turns requests into outcomes. One thread calls it; only `progress` may come from another."""

    def start(self) -> EngineInfo:
        """Load. Raises ModelError or DeviceError with what to do; EngineDead for the rest."""
        ...

    def prepare(self, request: Request) -> Prepared | Failure:
        """Render and tokenise once; refuse what cannot be answered."""
        ...

    def has_room(self, prepared: Prepared) -> bool:
        """Whether `submit` may be called now: this is the back-pressure."""
        ...

    def submit(self, prepared: Prepared) -> None: ...

    def step(self, timeout_s: float) -> list[Outcome]:
        """Work, and return what finished; may be empty when `timeout_s` has passed."""
        ...

    def progress(self) -> int:
        """Tokens read and generated (or calls done) since start; liveness is judged by it."""
        ...

    def abort(self, key: RequestKey) -> None:
        """Forget a submitted request: no outcome comes for it."""
        ...

    def close(self) -> None: ...
