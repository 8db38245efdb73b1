"""What the shared-prefix loop takes of the CPU's memory, before any worker is there.

Owns the sum beside the weights: keys and values, and the output layer that is packed once more. The
budget itself is the engine's (`engines.shared_prefix.budget`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ragfleet.config import RunConfig
from ragfleet.layout import ModelSize
from ragfleet.model_files import context_limit, has_output_layer, read_json


@dataclass(frozen=True, kw_only=True)
class LoopMemory:
    """Of one worker, in bytes. Nothing, where there is no such loop."""

    packed_bytes: int = 0
    """The output layer, which is packed once more where it is the embeddings' too."""
    useful_bytes: int = 0
    """Most that keys and values are of use for."""
    asked_bytes: int | None = None
    """--kv_cache_bytes."""
    memory_bytes: int = 0
    """Of the machine, or the container."""
    num_cores: int = 1

    def of_worker(self, num_threads: int) -> int:
        """The most that a worker of so many threads takes."""
        from ragfleet.engines.shared_prefix.budget import default_budget_bytes

        if self.asked_bytes is not None:
            return self.packed_bytes + self.asked_bytes
        return self.packed_bytes + default_budget_bytes(
            self.useful_bytes,
            self.memory_bytes,
            num_threads=num_threads,
            num_cores=self.num_cores,
        )


def loop_memory(
    config: RunConfig, model_dir: Path, size: ModelSize | None, memory_bytes: int, num_cores: int
) -> LoopMemory:
    """`size` in the precision that the CPU computes in; None: config.json does not say enough."""
    from ragfleet.engines.shared_prefix.budget import NUM_SLOTS, useful_tokens

    # vLLM takes a part of what is free when it starts; a user's class may never load the model.
    has_loop = config.engine != "vllm" and config.inference_class is None
    if size is None or not has_loop or config.prefix_sharing == "off":
        return LoopMemory()
    tokens = useful_tokens(
        num_slots=config.batch_size or NUM_SLOTS,
        max_new_tokens=config.max_new_tokens,
        max_model_len=config.max_model_len or context_limit(model_dir),
    )
    is_tied = read_json(model_dir / "config.json").get("tie_word_embeddings") is True
    is_packed_twice = is_tied or not has_output_layer(model_dir)
    packed = size.vocab_size * size.hidden_size if is_packed_twice else 0
    return LoopMemory(
        packed_bytes=packed * size.dtype_bytes,
        useful_bytes=tokens * size.kv_bytes_per_token(),
        asked_bytes=config.kv_cache_bytes,
        memory_bytes=memory_bytes,
        num_cores=num_cores,
    )
