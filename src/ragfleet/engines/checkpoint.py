"""Loading a causal language model through transformers.

Owns the checks of a model folder that need transformers, devices and precisions. Raises ModelError
or DeviceError that name the file, the architecture or the package, because transformers' own errors
name its internals. Knows nothing of requests.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ragfleet.engines.protocol import EngineSpec
from ragfleet.errors import ModelError
from ragfleet.model_files import check_weights, read_json, weights_bytes

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTEXT_BYTES = 512 << 20
"""Of a CUDA process, for its context and kernels; some 300 to 500 MB."""
# Keys of generation_config.json that are not ways to choose tokens.
_NOT_SAMPLING = ("transformers_version", "_from_model_config", "do_sample", "use_cache")


def load_model(spec: EngineSpec, model_dir: Path) -> tuple[Any, list[str]]:
    """The model, ready to generate, and notes for the log."""
    check_weights(model_dir)
    device_map, notes = _devices(spec)
    config = _load_config(model_dir, spec.trust_remote_code)
    quantisation = _check_quantisation(model_dir, config)
    if quantisation is not None:
        notes.append(
            f"the checkpoint is quantised ({quantisation}); its own number formats are kept"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            config=config,
            dtype="auto" if quantisation else DTYPES[spec.precision],
            device_map=device_map,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model_dir}: the model does not fit into the memory of {spec.num_gpus} GPU(s)"
            f" ({_first_line(error)}); give each worker more with --gpus_per_worker, or use a"
            " smaller --precision."
        ) from None
    except Exception as error:  # each architecture, quantiser and file format fails in its own way
        raise ModelError(
            f"{model_dir}: transformers {transformers.__version__} cannot load this"
            f" {config.model_type} model: {_first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers and only warn
        raise ModelError(
            f"{model_dir}: the checkpoint lacks {len(missing)} weights that a"
            f" {type(model).__name__} needs, {missing[0]} for one; it is incomplete, or not a"
            " language model."
        )
    _check_placement(model, model_dir)
    model.eval().requires_grad_(False)
    # `generate` fills what a call leaves open from here: nothing may come from the checkpoint.
    model.generation_config = GenerationConfig()
    notes += _not_applied(model_dir)
    return model, notes


def _devices(spec: EngineSpec) -> tuple[Any, list[str]]:
    """What to hand to `device_map`, and notes."""
    if spec.num_gpus == 0:
        torch.set_num_threads(max(1, spec.num_threads))
        return None, []
    if not torch.cuda.is_available():
        from ragfleet.gpus import discover_gpus, explain_torch_blind

        raise explain_torch_blind(discover_gpus(), torch.__version__, torch.version.cuda)
    notes = []
    if spec.gpu_memory_bytes is not None:
        notes = _keep_to(spec, spec.gpu_memory_bytes)
    if spec.num_gpus == 1:
        return {"": 0}, notes
    return "auto", [
        *notes,
        f"the layers are spread over {spec.num_gpus} GPUs and run one after another: more GPUs hold"
        " a larger model, they do not answer faster",
    ]


def _keep_to(spec: EngineSpec, part_bytes: int) -> list[str]:
    """Of each GPU that workers share. Else one that comes first takes what the others need, and
    their requests fail for want of memory; so they get smaller batches. Notes for the log."""
    assert spec.model_dir is not None
    weights = weights_bytes(spec.model_dir, DTYPES[spec.precision].itemsize) / spec.num_gpus
    if part_bytes - CONTEXT_BYTES < weights:  # --gpu_pick all: as much as it gets
        return ["this worker's part of the GPU does not hold the model, so it is held to none"]
    for device in range(torch.cuda.device_count()):
        _, total = torch.cuda.mem_get_info(device)
        # What CUDA takes for the process itself is not counted by torch.
        share = (part_bytes - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    return []


def _load_config(model_dir: Path, trust_remote_code: bool) -> Any:
    raw = read_json(model_dir / "config.json")
    kind = raw.get("model_type", "unknown")
    try:
        config = AutoConfig.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # KeyError, ValueError, and whatever a config class checks
        if "auto_map" in raw and not trust_remote_code:
            raise ModelError(
                f"{model_dir}: the {kind} model brings its own Python code; read it, and if you"
                " trust it add --trust_remote_code."
            ) from None
        raise ModelError(
            f"{model_dir}: transformers {transformers.__version__} does not know the architecture"
            f" {kind!r}; upgrade transformers, or use another engine. ({_first_line(error)})"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{model_dir}: {kind} is an encoder-decoder model; only decoder-only (causal) language"
            " models are supported."
        )
    return config


def _check_quantisation(model_dir: Path, config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    method = str(getattr(settings, "quant_method", method))
    known = {str(name) for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if method not in known and not any(name.startswith(method) for name in known):
        # transformers only warns, and then reads packed numbers as weights
        raise ModelError(
            f"{model_dir}: transformers {transformers.__version__} does not know the quantisation"
            f" {method!r}; use a checkpoint that is not quantised, or another engine."
        )
    return method


def _check_placement(model: Any, model_dir: Path) -> None:
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if places & {"cpu", "disk", "meta"}:  # accelerate would run, a hundred times slower
        raise ModelError(
            f"{model_dir}: the model does not fit into the GPUs of one worker; give it more with"
            " --gpus_per_worker, or use a smaller --precision."
        )


def _not_applied(model_dir: Path) -> list[str]:
    settings = read_json(model_dir / "generation_config.json")
    named = [
        f"{name} {value}"
        for name, value in settings.items()
        if name not in _NOT_SAMPLING and not name.endswith("_token_id") and value is not None
    ]
    if not named:
        return []
    return [f"generation_config.json also sets {', '.join(named)}: not applied, the flags decide"]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
