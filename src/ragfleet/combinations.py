"""Which combinations of settings mean something: `inference_type`, `engine`, the mode of an API.

A table and the lists of settings that belong to one side of it. It sees a configuration's values
and says what is wrong; knows nothing of how they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from ragfleet.errors import ConfigError

Kind = Literal["echo", "local", "remote"]

#: (inference_type, hf_mode) → engine → the modes of the API; "" where no API is asked.
TABLE: Final[Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]]] = {
    ("local", ""): {"auto": ("",), "transformers": ("",), "vllm": ("",), "echo": ("",)},
    ("huggingface", "local"): {"auto": ("",), "transformers": ("",), "vllm": ("",)},
    ("huggingface", "endpoint"): {"auto": ("realtime",), "openai_compatible": ("realtime",)},
    ("openai", ""): {
        "auto": ("realtime", "batch"),
        "openai_compatible": ("realtime", "batch"),
    },
    ("togetherai", ""): {
        "auto": ("realtime", "batch"),
        "openai_compatible": ("realtime", "batch"),
    },
}

REMOTE_ONLY: Final = (
    "api_model_name",
    "base_url",
    "api_key_file",
    "api_key_env",
    "api_format",
    "api_mode",
    "extra_body",
    "max_concurrency",
    "max_requests_per_minute",
    "max_tokens_per_minute",
    "price_in",
    "price_out",
    "max_cost",
    "max_tokens_total",
    "max_outage_s",
    "batch_poll_s",
)
"""Settings that mean nothing without an API."""

LOCAL_ONLY: Final = {
    "precision": "the server decides it",
    "max_model_len": "the server knows its model's limit",
    "truncate_context": "cutting needs the model's tokenizer, which only the server has",
    "trust_remote_code": "no code of a model runs here",
    "batch_size": "use --max_concurrency",
    "engine_options": "they are for an engine that runs here",
}
"""Settings that mean nothing to an API. Those of GPUs are noted, because scripts set them."""


def kind_of(inference_type: str, hf_mode: str, engine: str) -> Kind:
    if engine == "echo":
        return "echo"
    if inference_type in ("openai", "togetherai") or hf_mode == "endpoint":
        return "remote"
    return "local"


def _check_contradictions(values: Mapping[str, Any]) -> None:
    if values["overwrite"] and values["retry_failed"]:
        raise ConfigError(
            "--overwrite starts afresh, so there is nothing for --retry_failed to try again; leave"
            " one of the two out."
        )
    if values["num_workers"] == "auto" and values["max_samples_per_worker"] is not None:
        raise ConfigError(
            "--max_samples_per_worker selects the records by the number of workers, and with"
            " --num_workers auto the machine would decide which; give the number."
        )
    for name in ("total_gpus", "gpus_per_worker"):
        if values["engine"] == "echo" and values[name]:
            raise ConfigError(
                f"--engine echo uses no GPU, but --{name} is {values[name]}; leave it out."
            )


def check(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Kind:
    """The kind of a run. Raises ConfigError for what means nothing."""
    _check_contradictions(values)
    inference_type, hf_mode, engine = values["inference_type"], values["hf_mode"], values["engine"]
    if inference_type != "huggingface" and hf_mode != "local":
        raise ConfigError(
            f"--hf_mode {hf_mode} belongs to --inference_type huggingface, not to {inference_type}."
        )
    row = TABLE[inference_type, hf_mode if inference_type == "huggingface" else ""]
    modes = row.get(engine)
    where = f"--inference_type {inference_type}"
    if inference_type == "huggingface" and hf_mode == "endpoint":
        where += " --hf_mode endpoint"
    if modes is None:
        if engine == "echo":
            raise ConfigError("--engine echo uses no model; leave --inference_type out.")
        raise ConfigError(f"{where} does not go with --engine {engine}; it takes {', '.join(row)}.")
    kind = kind_of(inference_type, hf_mode, engine)
    mine = [name for name in REMOTE_ONLY if values[name] != defaults[name]]
    if kind != "remote":
        if mine:
            raise ConfigError(
                f"--{mine[0]} is for remote APIs, and {where} asks none; leave it out, or take"
                " --inference_type openai, togetherai, or huggingface with --hf_mode endpoint."
            )
        return kind
    if values["api_mode"] not in modes:
        raise ConfigError(f"{where} has no --api_mode {values['api_mode']}.")
    for name, why in LOCAL_ONLY.items():
        if values[name] != defaults[name]:
            raise ConfigError(f"--{name} does not go with {where}: {why}.")
    return kind
