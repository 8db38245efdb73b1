"""From a configuration to a start that can't fail for a reason known beforehand.

Owns every check that costs nothing: paths, templates, model folder, precision, GPUs, an earlier run
on the same output. Nothing is written here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from ragfleet.allocation import Allocation
from ragfleet.config import RunConfig
from ragfleet.engines.protocol import PromptSettings
from ragfleet.engines.vllm_options import answers_depend_on, choose_engine, find_vllm
from ragfleet.errors import ConfigError, DeviceError, ModelError, OutputError
from ragfleet.gpu_locks import GpuLocks
from ragfleet.gpus import discover_gpus, visible_gpus
from ragfleet.identity import Identity, RunFile, clashing_run, model_parts, now, read_run_file
from ragfleet.index import check_is_file, is_stream
from ragfleet.launch import RunPaths
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.model_files import (
    chat_template,
    check_room,
    check_tokenizer,
    check_weights,
    read_json,
)
from ragfleet.names import check_names
from ragfleet.precision import Precision, precision_on, resolve_precision
from ragfleet.prompts import DEFAULT_SYSTEM_PROMPT, read_template
from ragfleet.remote.secret import key_notes, read_key
from ragfleet.remote.spec import DEFAULT_CONCURRENCY, PROVIDERS, ProviderName, RemoteSpec
from ragfleet.seating import Seating, seat_alone
from ragfleet.shards import is_own_name

POCKET: Final = "pocket"
"""The name of the demo model that this package brings along."""
EngineKind = Literal["transformers", "vllm", "openai_compatible", "echo"]

MOST_NAME_BYTES: Final = 225
"""Of an output's name. File systems have 255; backups, shards and temporary files add to it."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A checked start. `notes` are lines for the header."""

    config: RunConfig
    paths: RunPaths
    num_workers: int
    engine: EngineKind
    remote: RemoteSpec | None
    model_dir: Path | None
    precision: Precision
    prompts: PromptSettings
    key_fields: list[str] | None
    identity: Identity
    run_file: RunFile | None
    """What an earlier start left."""
    allocation: Allocation
    inference_class: str | None
    class_hash: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def max_retries(self) -> int:
        """An API's refusals are many and short: it is asked more often."""
        if self.config.max_retries is not None:
            return self.config.max_retries
        return 2 if self.remote is None else 8

    @property
    def clock(self) -> str:
        return self.prompts.clock


def prepare(
    config: RunConfig,
    environ: Mapping[str, str],
    torchrun: TorchrunRank | None = None,
    needs_key: bool = True,
    needs_seats: bool = True,
    gpu_locks: GpuLocks | None = None,
) -> Preparation:
    """Raises a UsageError for whatever can be told without loading a model.

    Args:
        needs_key: False where nothing will be asked of a remote API.
        needs_seats: False where nothing will be computed: GPUs and memory don't matter.
        gpu_locks: keep others off the GPUs that are given out; None: only look at who has them.
    """
    check_paths(config)
    paths = RunPaths(config.output_file.absolute())
    notes: list[str] = []
    system_prompt = DEFAULT_SYSTEM_PROMPT if config.system_prompt is None else config.system_prompt
    template, fields = read_template(config.prompt_template)
    class_name, class_hash = inspect_class(config.inference_class)
    if class_name is not None:
        fields = None
    model_dir = find_model(config)
    if model_dir is not None and class_name is None:
        check_room(model_dir, config.max_model_len, config.max_new_tokens)
    remote = remote_spec(config, environ)
    # Read for its errors alone: workers read it themselves.
    if remote is not None and needs_key:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                "A remote API needs the openai package: pip install 'ragfleet[remote]'."
            )
        if read_key(remote, environ) is not None:
            notes += key_notes(remote)
    needs_no_gpu = remote is not None or config.engine == "echo"
    if remote is not None and (config.total_gpus or config.gpus_per_worker):
        notes.append("GPUs are not needed for a remote API; the settings about them are not used.")
    seating = Seating(
        config=config,
        torchrun=torchrun,
        environ=environ,
        inventory=visible_gpus(discover_gpus(), environ.get("CUDA_VISIBLE_DEVICES")),
        model_dir=model_dir,
        needs_no_gpu=needs_no_gpu or not needs_seats,
        is_remote=remote is not None,
        gpu_precision=resolve_precision(config, model_dir, True),
        cpu_precision=resolve_precision(config, model_dir, False),
    )
    engine, why = _engine_of(seating)
    notes += [why] if why and model_dir is not None else []
    notes += _unused(config, engine)
    num_workers, allocation, seat_notes = seat_alone(
        replace(seating, splits_heads=engine == "vllm"),
        gpu_locks or GpuLocks(),
        take=gpu_locks is not None,
    )
    run_file = None if config.overwrite else read_run_file(paths)
    precision, precision_notes = precision_on(
        allocation.gpus,
        resolve_precision(config, model_dir, allocation.gpus_per_worker > 0),
        engine,
        is_auto=config.precision == "auto",
        earlier=run_file.parts.get("precision") if run_file is not None else None,
    )
    notes += precision_notes
    uses_clock = prints_date(model_dir)
    clock = run_file.clock if run_file is not None else now()
    prompts = PromptSettings(
        system_prompt=system_prompt,
        template=template,
        chat_template_kwargs=config.chat_template_kwargs,
        clock=clock,
        truncate_context=config.truncate_context,
    )
    sampling = config.temperature > 0
    parts: dict[str, Any] = {
        "system prompt": system_prompt,
        "prompt template": template,
        "chat_template_kwargs": config.chat_template_kwargs,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p if sampling else None,
        "seed": config.seed if sampling else None,
        "stop": list(config.stop),
        "precision": precision if model_dir is not None else None,
        "engine": "echo" if engine == "echo" else "model",
        **options_part(config),
        "inference_class": class_name,
        "clock": clock if uses_clock else None,
        **(model_parts(model_dir) if model_dir is not None else {}),
        **(remote_parts(remote) if remote is not None else {}),
    }
    if run_file is not None and run_file.class_hash != class_hash:
        notes.append(
            f"Warning: {config.inference_class} was edited since the first start; earlier answers"
            " are kept. Set its class attribute `version` to make it another run."
        )
    return Preparation(
        config=config,
        paths=paths,
        num_workers=num_workers,
        engine=engine,
        remote=remote,
        model_dir=model_dir,
        precision=precision,
        prompts=prompts,
        key_fields=None if fields is None else sorted(fields),
        identity=Identity(parts),
        run_file=run_file,
        allocation=allocation,
        inference_class=config.inference_class and absolute_class(config.inference_class),
        class_hash=class_hash,
        notes=[*notes, *seat_notes, *allocation.notes],
    )


def _engine_of(seating: Seating) -> tuple[EngineKind, str | None]:
    """The engine, and the line that says why it is that one. Raises ConfigError and DeviceError."""
    config = seating.config
    if seating.needs_no_gpu:
        return ("openai_compatible" if seating.is_remote else "echo"), None

    def choose(asked: str) -> tuple[EngineKind, str | None]:
        return choose_engine(
            asked,
            not seating.on_cpu,
            find_vllm(),
            config.engine_options,
            seeded=config.seed is not None and config.temperature > 0,
        )

    engine, why = choose(config.engine)
    # vLLM takes the number of an instance for that of a GPU, and finds none of that number.
    if engine != "vllm" or not any(gpu.is_mig for gpu in seating.inventory.gpus):
        return engine, why
    _, allocation, _ = seat_alone(replace(seating, splits_heads=True), GpuLocks(), take=False)
    if not any(gpu.is_mig for gpu in allocation.gpus):
        return engine, why
    if config.engine == "vllm":
        raise DeviceError(
            "--engine vllm can't use MIG instances, and workers would get some. Use --engine"
            " transformers, or name whole GPUs in CUDA_VISIBLE_DEVICES."
        )
    return choose("transformers")[0], "Engine: transformers; vLLM can't use MIG instances."


def _unused(config: RunConfig, engine: EngineKind) -> list[str]:
    """The line about flags that mean nothing to this engine."""
    asked = {
        "--prefix_sharing": config.prefix_sharing != "auto",
        "--kv_cache_bytes": config.kv_cache_bytes is not None,
    }
    flags = [flag for flag, is_asked in asked.items() if is_asked]
    if engine == "transformers" or not flags:
        return []
    return [f"{' and '.join(flags)}: not used, for the engine is {engine}, not transformers."]


def options_part(config: RunConfig) -> dict[str, Any]:
    """Engine options that answers depend on; no part of a run that has none."""
    options = answers_depend_on(config.engine_options)
    return {"engine_options": options} if options else {}


def remote_spec(config: RunConfig, environ: Mapping[str, str]) -> RemoteSpec | None:
    """The remote API of a run; None where none is asked."""
    if not config.is_remote:
        return None
    assert config.inference_type != "local"
    name: ProviderName = config.inference_type
    provider = PROVIDERS[name]
    url = config.base_url or environ.get(provider.base_url_env or "") or provider.base_url
    model = config.api_model
    assert model is not None
    return RemoteSpec(
        provider=name,
        base_url=url.rstrip("/"),
        model=model,
        key_env=config.api_key_env or provider.key_env,
        key_file=None if config.api_key_file is None else str(config.api_key_file.absolute()),
        # A server of one's own wants no key as a rule; one that does says so with a 401.
        key_needed=url.rstrip("/") == provider.base_url or config.api_key_env is not None,
        api_format=config.api_format,
        api_mode=config.api_mode,
        extra_body=config.extra_body,
        max_concurrency=config.max_concurrency or DEFAULT_CONCURRENCY,
        requests_per_minute=config.max_requests_per_minute,
        tokens_per_minute=config.max_tokens_per_minute,
        price_in=config.price_in,
        price_out=config.price_out,
        max_cost=config.max_cost,
        max_tokens_total=config.max_tokens_total,
        max_outage_s=config.max_outage_s,
        batch_requests=provider.batch_requests,
        batch_bytes=provider.batch_bytes,
        batch_poll_s=config.batch_poll_s,
    )


def remote_parts(remote: RemoteSpec) -> dict[str, Any]:
    """Of an API, what answers depend on. Not the key, nor whether it is asked in batches."""
    return {
        "API": remote.base_url,
        "API model": remote.model,
        "API format": remote.api_format,
        "extra_body": remote.extra_body,
    }


def check_paths(config: RunConfig) -> None:
    check_names(config)
    output = config.output_file
    try:
        if output.is_dir():
            raise OutputError(f"--output_file {output} is a folder; name a file in it.")
    except OSError as error:  # a name that no file can have
        raise OutputError(f"Can't write to {output}: {error.strerror}.") from None
    if output.is_symlink() and not output.exists():
        raise OutputError(f"--output_file {output} is a link to nothing; name the file itself.")
    if (output.exists() and not output.is_file()) or is_stream(output):
        raise OutputError(f"--output_file {output} is no ordinary file; name another one.")
    if len(os.fsencode(output.name)) > MOST_NAME_BYTES:
        raise OutputError(
            f"The name of --output_file {output} has {len(os.fsencode(output.name))} bytes; with"
            f" more than {MOST_NAME_BYTES} there is no room for the files beside it. Take a shorter"
            " one."
        )
    if os.path.exists(config.contexts_file):  # the pipeline makes it later
        check_is_file(config.contexts_file)
        if output.exists() and output.samefile(config.contexts_file):
            raise OutputError("--output_file is the contexts file itself; name another file.")
    if is_own_name(config.contexts_file, output):
        raise OutputError(
            f"--contexts_file {config.contexts_file} has a name that --output_file {output} uses"
            " for its own files; give one of them another name."
        )
    if other := clashing_run(output):
        raise OutputError(
            f"--output_file {output} and the run of {other} would take each other's files for their"
            " own. Take another name, or a folder for each."
        )
    folder = output.absolute().parent
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"Can't write to {folder}: {existing} is a file, not a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = f"no permission to create files in {existing}"
        if is_read_only:
            reason = f"{existing} is on a read-only file system"
        raise OutputError(f"Can't write to {folder}: {reason}.")


def find_model(config: RunConfig) -> Path | None:
    """The model's folder, downloaded if it is a Hub model; None where no model is needed."""
    if config.engine == "echo" or config.is_remote or config.model_path is None:
        return None
    if config.inference_type == "huggingface":
        from ragfleet.hub import download

        return checked_model(download(config.model_path, config.trust_remote_code))
    folder = Path(config.model_path).expanduser().absolute()
    if config.model_path == POCKET and not folder.is_dir():
        folder = pocket_folder()
    if not folder.is_dir():
        hint = ""
        if "/" in config.model_path and not config.model_path.startswith((".", "/", "~")):
            hint = " For a Hub model add --inference_type huggingface."
        raise ModelError(f"There is no model folder {folder}.{hint}")
    return checked_model(folder)


def checked_model(folder: Path) -> Path:
    check_weights(folder)
    check_tokenizer(folder)
    return folder


def pocket_folder() -> Path:
    """The demo model's folder: only files, no module."""
    return Path(__file__).parent / "pocket"


def prints_date(model_dir: Path | None) -> bool:
    """Whether the chat template asks for the time, so that the clock decides what is asked."""
    if model_dir is None:
        return False
    template = chat_template(model_dir, read_json(model_dir / "tokenizer_config.json"))
    return template is not None and "strftime_now" in template


def inspect_class(name: str | None) -> tuple[str | None, str | None]:
    """(`file.py:Class@version`, hash of the file), read and never imported.

    A user's imports could touch a GPU before it is assigned.
    """
    if name is None:
        return None, None
    from ragfleet.engines.user_class import check_class, split_reference

    version = check_class(name)
    file, cls = split_reference(name)
    digest = xxhash.xxh3_128_hexdigest(file.read_bytes())
    return f"{file.name}:{cls}@{version or ''}", digest


def absolute_class(name: str) -> str:
    file, _, cls = name.rpartition(":")
    return f"{Path(file).absolute()}:{cls}"
