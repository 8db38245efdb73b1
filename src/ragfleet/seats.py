"""From what was prepared to what a start's workers are told, and where each of them runs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ragfleet.allocation import worker_environment
from ragfleet.beats import beat_timeout_s
from ragfleet.launch import Launch, SeatSpec
from ragfleet.launchers import torchrun
from ragfleet.launchers.process import Seat
from ragfleet.preparation import Preparation


def launch_of(
    preparation: Preparation, launch_id: str, num_started: int, *, private: bool
) -> Launch:
    """What the workers of this start are told."""
    config, prompts = preparation.config, preparation.prompts
    return Launch(
        launch_id=launch_id,
        contexts_file=str(config.contexts_file.absolute()),
        output_file=str(preparation.paths.output_file),
        run_key=preparation.identity.run_key.hex(),
        engine=preparation.engine,
        inference_class=preparation.inference_class,
        model_dir=str(preparation.model_dir) if preparation.model_dir is not None else None,
        inference_type=config.inference_type,
        remote=preparation.remote,
        sampling={
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stop": list(config.stop),
        },
        prompts={field.name: getattr(prompts, field.name) for field in dataclasses.fields(prompts)},
        precision=preparation.precision,
        batch_size=config.batch_size,
        engine_options=_engine_options(preparation),
        prefix_sharing=config.prefix_sharing,
        kv_cache_bytes=config.kv_cache_bytes,
        max_model_len=config.max_model_len,
        trust_remote_code=config.trust_remote_code,
        max_retries=preparation.max_retries,
        request_timeout_s=config.request_timeout_s,
        start_timeout_s=config.start_timeout_s,
        stall_timeout_s=config.stall_timeout_s,
        fsync_s=config.fsync_s,
        seed=config.seed,
        include_context=config.include_context,
        num_workers=preparation.num_workers,
        num_started=num_started,
        verbose=config.verbose,
        private=private,
        may_steal=config.schedule == "dynamic",
        beat_timeout_s=beat_timeout_s(preparation.paths.directory),
        seats=[
            SeatSpec(
                environment=worker_environment(worker),
                num_gpus=len(worker.gpus),
                num_threads=worker.num_threads,
                gpu_memory_bytes=worker.memory_bytes_per_gpu if worker.share > 1 else None,
            )
            for worker in preparation.allocation.workers
        ],
    )


def _engine_options(preparation: Preparation) -> dict[str, Any]:
    """Those that are asked for. Left to itself vLLM takes the fewest GPUs that hold the weights, so
    it is told where auto wants more of them, for the cache."""
    options, allocation = preparation.config.engine_options, preparation.allocation
    is_told = {"tensor_parallel_size", "pipeline_parallel_size"} & options.keys()
    is_spread = allocation.is_worked_out and allocation.gpus_per_worker > 1
    if preparation.engine != "vllm" or is_told or not is_spread:
        return options
    return {"tensor_parallel_size": allocation.gpus_per_worker, **options}


def seat_of(launch: Launch, rank: int) -> Seat:
    spec = launch.seats[rank]
    return Seat(
        rank=rank,
        environment={**torchrun.scrubbed(os.environ), **spec.environment},
        num_gpus=spec.num_gpus,
        num_threads=spec.num_threads,
    )
