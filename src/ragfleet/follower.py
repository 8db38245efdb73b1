"""torchrun's ranks above 0: each waits for rank 0's plan and supervises one worker of it."""

from __future__ import annotations

import os
import time
from typing import Final

import numpy as np

from ragfleet.config import RunConfig
from ragfleet.errors import RunError
from ragfleet.events import Event, OnEvent
from ragfleet.launch import RunPaths, read_launch
from ragfleet.launchers.supervisor import Supervisor
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.seats import seat_of

_PLAN_WAIT_S: Final = 1800.0
_PLAN_NOTE_S: Final = 30.0
_POLL_S: Final = 0.2


def follow(config: RunConfig, rank: TorchrunRank, say: OnEvent, owns_process: bool) -> None:
    """Returns when all is finished. Raises as `runner.run` does."""
    paths = RunPaths(config.output_file.absolute())
    launch_paths = paths.launch(rank.launch_id)
    started_s = time.monotonic()
    next_note_s = started_s + _PLAN_NOTE_S
    while not launch_paths.spec.exists():
        if launch_paths.nothing_to_do.exists():
            return
        if os.getppid() != rank.agent_pid:
            raise RunError("torchrun is gone, and nobody writes a plan any more.")
        now_s = time.monotonic()
        if now_s > started_s + _PLAN_WAIT_S:
            raise RunError(f"Rank 0 wrote no plan within {_PLAN_WAIT_S:.0f} s.")
        if now_s > next_note_s:
            next_note_s += _PLAN_NOTE_S
            say(Event("note", f"rank {rank.rank}: still waiting for rank 0's plan"))
        time.sleep(_POLL_S)  # rank 0's file is all there is to wait for
    launch = read_launch(launch_paths)
    Supervisor(
        launch_paths,
        launch,
        [seat_of(launch, rank.rank)],
        logs=paths.logs,
        num_chunks=len(np.load(launch_paths.array("chunks"), mmap_mode="r")),
        max_restarts=config.max_restarts,
        on_event=say,
        parent_pid=rank.agent_pid,
        owns_process=owns_process,
    ).run()
