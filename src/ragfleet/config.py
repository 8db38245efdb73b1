"""The one frozen configuration of a run.

Owns every user-facing setting, its default and its one-line description: the command line,
`--config run.toml`, the documents and the Python API are all made from the fields below.
It knows nothing of argument parsing, files, GPUs or models.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ragfleet import combinations
from ragfleet.errors import ConfigError
from ragfleet.extra_body import check_extra_body

InferenceType = Literal["local", "huggingface", "openai", "togetherai"]
HfMode = Literal["local", "endpoint"]
EngineName = Literal["auto", "transformers", "vllm", "openai_compatible", "echo"]
ApiFormat = Literal["chat", "completion"]
ApiMode = Literal["realtime", "batch"]
GpuPick = Literal["free", "all"]
Device = Literal["auto", "cpu"]
Precision = Literal["auto", "fp32", "fp16", "bf16"]
TruncateContext = Literal["error", "head", "tail"]
Schedule = Literal["dynamic", "static"]
Dedup = Literal["auto", "off"]
FailedContexts = Literal["row", "drop"]
PrefixSharing = Literal["auto", "on", "off"]


LONGEST_S: Final = 100 * 365.25 * 86_400
"""A century: threads wait for 292 years at most, and the JSON of a run holds no infinity."""

_CHOICES = {
    "inference_type": get_args(InferenceType),
    "engine": get_args(EngineName),
    "gpu_pick": get_args(GpuPick),
    "device": get_args(Device),
    "precision": get_args(Precision),
    "truncate_context": get_args(TruncateContext),
    "schedule": get_args(Schedule),
    "dedup": get_args(Dedup),
    "failed_contexts": get_args(FailedContexts),
    "prefix_sharing": get_args(PrefixSharing),
}


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):
        raise ConfigError(f"--{name} is {value!r}; it must be a number.")


def path_of(name: str, value: str | Path) -> Path:
    """Raises ConfigError for a `~`, which a shell leaves alone in quotes, and TOML always: it would
    be a folder of that name."""
    path = Path(value)
    if path.parts[:1] == ("~",):
        raise ConfigError(f"--{name} {path}: no shell has put the home folder for ~; write it out.")
    return path


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of one run: contexts in, answers out.

    What an answer depends on is the run's identity (`ragfleet.identity`): a start that changes it
    is another run. All else may change between a start and its resume.
    """

    contexts_file: Path
    """JSONL file of contexts: one object a line with at least `query` and `context`."""
    output_file: Path
    """JSONL file of results to write: one row per selected line, in input order."""
    model_path: str | None = None
    """Folder of a local model, `pocket` for the demo model of this package, the Hub id with
    --inference_type huggingface, or an API's model."""
    inference_type: InferenceType = "local"
    """Where answers come from: a local folder, a Hugging Face Hub model, any OpenAI-compatible
    server (--base_url), or the Together API."""
    max_new_tokens: int = 512
    """Most tokens to generate for one answer."""
    temperature: float = 0.2
    """Sampling temperature; 0 is greedy."""
    top_p: float = 0.95
    """Nucleus sampling: keep the smallest set of tokens whose probabilities sum to this."""
    max_samples_per_worker: int | None = None
    """Answer only the first so many lines of each worker's even, contiguous share (empty: all)."""
    verbose: bool = False
    """Show when each step began and all notes, log claims, print tracebacks of errors."""

    engine: EngineName = "auto"
    """What generates: transformers, vllm, an API (openai_compatible), or echo (no model: repeats
    the query; for tests and overhead). auto: vllm where it is installed and there is a GPU, else
    transformers."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """JSON object of options in vLLM's own words, e.g. '{"gpu_memory_utilization": 0.8}'."""
    num_workers: int | Literal["auto"] | None = None
    """Number of worker processes (empty: 1; under torchrun its world size); auto: as many as the
    model's size and the GPUs allow, on the CPU one a core."""
    total_gpus: int | None = None
    """GPUs of this machine to use (empty: all that are usable)."""
    gpus_per_worker: int | None = None
    """GPUs that each worker may use (empty: total_gpus // num_workers)."""
    gpu_pick: GpuPick = "free"
    """free: idle GPUs first, then those with room beside others' jobs, never those of another run
    of ragfleet; all: take every visible GPU as it is."""
    device: Device = "auto"
    """auto: GPUs if there are any; cpu: never touch a GPU."""
    precision: Precision = "auto"
    """Number format of the weights (auto: the checkpoint's own on a GPU, but fp16 where that has no
    bf16; fp32 on CPU)."""
    seed: int | None = None
    """Seed of the run; each record draws from its own stream, whatever worker answers it."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer (they are not part of it)."""
    batch_size: int | None = None
    """Most requests generated together by one worker (empty: where prefixes are shared 64 on CPU
    and 512 on a GPU, else 8 and 32; vllm: its own default)."""
    prefix_sharing: PrefixSharing = "auto"
    """transformers only. auto: what prompts share is read once, where that is proved right for the
    model at the start (full-attention decoders), else plain batches; on: or the run ends; off:
    plain batches."""
    kv_cache_bytes: int | None = None
    """Most memory per worker for keys and values where prefixes are shared (empty: by the machine's
    memory)."""
    max_model_len: int | None = None
    """Most tokens of prompt plus answer (empty: the model's own limit)."""
    truncate_context: TruncateContext = "error"
    """A prompt that does not fit: fail it, or cut its context at the head or at the tail."""
    prompt_template: Path | None = None
    """Jinja2 file for the user message; it sees every field of the record."""
    system_prompt: str | None = None
    """System message instead of the default one ('' leaves it out)."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """JSON object handed to the model's chat template, e.g. '{"enable_thinking": false}'."""
    schedule: Schedule = "dynamic"
    """dynamic: balanced by cost, idle workers steal; static: even contiguous slices."""
    dedup: Dedup = "auto"
    """auto: equal greedy requests are generated once; off: every line on its own."""
    failed_contexts: FailedContexts = "row"
    """Contexts with success=false: a failure row each, or dropped from the output."""
    include_context: bool = False
    """Repeat the context in every result."""
    max_retries: int | None = None
    """How often a request is tried again after a failure that may pass (empty: 2; 8 at an API)."""
    request_timeout_s: float | None = None
    """Longest time for one request (empty: 600 s for a custom generate_answer and for each try at
    an API, else none)."""
    start_timeout_s: float = 1800.0
    """Longest time for a worker to load its model, else it is restarted."""
    stall_timeout_s: float = 300.0
    """A worker without any progress for so long writes its stacks to its log and is restarted."""
    fsync_s: float = 1.0
    """Longest time until a finished answer survives a power loss."""
    max_restarts: int = 3
    """How often one worker is restarted after it died."""
    retry_failed: bool = False
    """Generate again what failed in an earlier run."""
    overwrite: bool = False
    """Start afresh: earlier files of this output are moved to .bak-<time>, never deleted."""
    remove_shards: bool = False
    """Delete the per-worker files after a complete merge."""
    fail_on_errors: bool = False
    """Exit 3 when any row failed."""
    private: bool = False
    """Run directory, shards and results are readable by you alone (0700, 0600)."""
    trust_remote_code: bool = False
    """Allow a model folder to bring its own Python code."""
    inference_class: str | None = None
    """Your own backend: file.py:ClassName, a subclass of QueryBasedInference."""

    hf_mode: HfMode = "local"
    """With --inference_type huggingface: download the model, or ask an endpoint (Inference
    Providers, or a dedicated one by --base_url)."""
    api_model_name: str | None = None
    """Name of the API's model (empty: --model_path is the name)."""
    base_url: str | None = None
    """Where the API is, with its /v1 (empty: OPENAI_BASE_URL, TOGETHER_BASE_URL, or the provider's
    own)."""
    api_key_file: Path | None = None
    """File that holds the API key (empty: OPENAI_API_KEY, TOGETHER_API_KEY or HF_TOKEN is read). A
    key itself is never a flag."""
    api_key_env: str | None = None
    """Another environment variable that holds the key."""
    api_format: ApiFormat = "chat"
    """chat: messages; completion: a plain prompt, for base models."""
    api_mode: ApiMode = "realtime"
    """realtime: one call for each request; batch: files of requests, cheaper and within a day."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """JSON object added to each request's body, e.g. '{"reasoning_effort": "low"}'; what other
    flags set is refused."""
    max_concurrency: int | None = None
    """Requests under way at a time, for each worker (empty: 64)."""
    max_requests_per_minute: int | None = None
    """Rate of all workers together (empty: what the server's headers say)."""
    max_tokens_per_minute: int | None = None
    """Tokens a minute of all workers together; the most a request may need counts."""
    price_in: float | None = None
    """Price of a million tokens of prompts, in any currency."""
    price_out: float | None = None
    """Price of a million generated tokens."""
    max_cost: float | None = None
    """Send nothing that could pass this total, by --price_in and --price_out."""
    max_tokens_total: int | None = None
    """Send nothing that could pass this many tokens, prompts and answers together."""
    max_outage_s: float = 3600.0
    """How long to wait for a dead server before the run stops."""
    batch_poll_s: float = 30.0
    """Seconds between two looks at a batch."""

    def __post_init__(self) -> None:
        for name in ("contexts_file", "output_file", "prompt_template", "api_key_file"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, path_of(name, value))
        if isinstance(self.stop, str):  # a tuple of it would be its characters
            raise ConfigError(f"--stop is {self.stop!r}; it must be a list of strings.")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("temperature", "top_p"):  # 0 and 0.0 are one run
            value = getattr(self, name)
            _require_number(name, value)
            object.__setattr__(self, name, float(value))
        self._check()

    def _check(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        def at_least(name: str, least: float) -> None:
            value = getattr(self, name)
            if value is not None:
                _require_number(name, value)
            require(
                value is None or value >= least,
                f"--{name} is {value}; it must be at least {least}.",
            )
            require(value != math.inf, f"--{name} is {value}; it must be a finite number.")

        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(
                value in choices,
                f"--{name} is {value!r}; it must be one of {', '.join(choices)}.",
            )
        require(
            not isinstance(self.num_workers, str) or self.num_workers == "auto",
            f"--num_workers is {self.num_workers!r}; it must be a number or auto.",
        )
        if self.num_workers != "auto":
            at_least("num_workers", 1)
        for name in ("gpus_per_worker", "max_samples_per_worker", "batch_size", "kv_cache_bytes"):
            at_least(name, 1)
        for name in ("max_new_tokens", "max_model_len"):
            at_least(name, 1)
        for name in ("total_gpus", "max_retries", "max_restarts", "temperature", "seed"):
            at_least(name, 0)
        require(0 < self.top_p <= 1, f"--top_p is {self.top_p}; it must be above 0 and at most 1.")
        for name in ("request_timeout_s", "start_timeout_s", "stall_timeout_s", "fsync_s"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} is {value}; it must be above 0.")
            require(
                value is None or value <= LONGEST_S,
                f"--{name} is {value}; it must be at most {LONGEST_S:.0f} seconds.",
            )
        require(all(self.stop), "--stop holds an empty string; leave it out.")
        for name, text in (
            ("system_prompt", self.system_prompt or ""),
            ("stop", "".join(self.stop)),
        ):
            require(  # bytes of a script in GBK reach Python as lone surrogates
                text.isascii() or text.encode("utf-8", "replace").decode() == text,
                f"--{name} is not UTF-8; save the script that holds it as UTF-8.",
            )
        require(
            not self.engine_options or self.engine not in ("transformers", "echo"),
            f"--engine_options are for --engine vllm, not {self.engine}; leave them out.",
        )
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kind = combinations.check(values, _DEFAULTS)
        if kind == "remote":
            self._check_remote(require, at_least)
        if kind == "local":
            require(
                self.model_path is not None or self.inference_class is not None,
                "--model_path is missing: name a model folder"
                + (" or Hub id." if self.inference_type == "huggingface" else "."),
            )
        if self.device == "cpu":
            for name in ("total_gpus", "gpus_per_worker"):
                require(
                    not getattr(self, name),
                    f"--device cpu uses no GPU, but --{name} is {getattr(self, name)};"
                    " leave one of the two out.",
                )
        if self.inference_class is not None:
            file, colon, cls = self.inference_class.rpartition(":")
            require(
                bool(colon and cls.isidentifier() and file.endswith(".py")),
                f"--inference_class is {self.inference_class!r}; it must be file.py:ClassName.",
            )
        if self.max_model_len is not None:
            require(
                self.max_model_len > self.max_new_tokens,
                f"--max_model_len {self.max_model_len} leaves no room for a prompt beside"
                f" --max_new_tokens {self.max_new_tokens}.",
            )

    def _check_remote(
        self, require: Callable[[bool, str], None], at_least: Callable[[str, float], None]
    ) -> None:
        require(
            self.api_model is not None,
            "--api_model_name is missing: name the API's model.",
        )
        for name in ("max_concurrency", "max_requests_per_minute", "max_tokens_per_minute"):
            at_least(name, 1)
        for name in ("price_in", "price_out", "max_cost", "max_tokens_total", "max_outage_s"):
            at_least(name, 0)
        require(
            0 < self.batch_poll_s <= LONGEST_S,
            f"--batch_poll_s must be above 0 and at most {LONGEST_S:.0f} seconds.",
        )
        check_extra_body(self.extra_body)
        if self.base_url is not None:
            url = urllib.parse.urlsplit(self.base_url)
            require(
                url.scheme in ("http", "https") and bool(url.hostname),
                "--base_url must look like https://host/v1.",
            )
            require(
                url.username is None and url.password is None and not url.query,
                "--base_url holds a user, a password or a query; keys belong into the environment"
                " or --api_key_file.",
            )
            require(
                not url.path.rstrip("/").endswith(("/completions", "/batches")),
                f"--base_url is {self.base_url}; leave out what follows /v1.",
            )
        require(
            self.max_cost is None or self.price_in is not None or self.price_out is not None,
            "--max_cost needs --price_in and --price_out.",
        )
        require(
            self.api_mode != "batch" or self.num_workers in (None, 1, "auto"),
            f"--api_mode batch needs one worker, not {self.num_workers}: it only moves files.",
        )
        require(
            self.api_mode != "batch" or self.inference_class is None,
            "--api_mode batch does not go with --inference_class.",
        )

    @property
    def api_model(self) -> str | None:
        """Name of the API's model."""
        return self.api_model_name or self.model_path

    @property
    def is_remote(self) -> bool:
        kind = combinations.kind_of(self.inference_type, self.hf_mode, self.engine)
        return kind == "remote"

    def replace(self, **changes: Any) -> RunConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def distinct_samples(self) -> bool:
        """Whether equal records are answered one by one (sampling, or --dedup off)."""
        return self.temperature > 0 or self.dedup == "off"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """Settings of a run that is only planned."""

    exact_tokens: bool = False
    """Count the tokens of all prompts, each distinct context once, where otherwise a sample of 256
    is tokenised: minutes for a million records."""


_DEFAULTS = {
    f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    for f in dataclasses.fields(RunConfig)
}
