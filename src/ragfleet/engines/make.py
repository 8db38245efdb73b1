"""Engines by name.

The one place that knows which engines exist. Each is imported when it is asked for, because
importing most of them loads torch.
"""

from __future__ import annotations

from ragfleet.engines.protocol import Engine, EngineSpec
from ragfleet.errors import ConfigError


def make_engine(spec: EngineSpec, engine: str, inference_class: str | None = None) -> Engine:
    """`engine` is a name of `--engine`, `inference_class` is file.py:ClassName around it.

    Nothing is loaded before `start`, except the user's file. Raises ConfigError.
    """
    if inference_class is not None:
        from ragfleet.engines.query_engines import make_query_based

        return make_query_based(
            spec, inference_class, engine, lambda inner_spec: make_engine(inner_spec, engine)
        )
    if engine == "echo":
        from ragfleet.engines.echo import EchoEngine

        return EchoEngine(spec)
    if engine == "transformers":
        try:
            from ragfleet.engines.transformers import TransformersEngine
        except ImportError as error:
            raise ConfigError(
                f"--engine transformers needs torch and transformers ({error});"
                " pip install -e '.[local]' in the project's folder."
            ) from None
        return TransformersEngine(spec)
    if engine == "vllm":
        from ragfleet.engines.vllm import VllmEngine

        return VllmEngine(spec)
    if engine == "openai_compatible":
        if spec.remote is not None and spec.remote.api_mode == "batch":
            from ragfleet.engines.openai_batch import OpenAIBatchEngine

            return OpenAIBatchEngine(spec)
        from ragfleet.engines.openai_compatible import OpenAICompatibleEngine

        return OpenAICompatibleEngine(spec)
    raise ConfigError(
        f"--engine {engine} is unknown; use transformers, vllm, openai_compatible or echo."
    )
