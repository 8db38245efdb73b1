"""What torchrun says to its processes, turned into our own words; and the environment without it.

Each rank that torchrun starts becomes a supervisor of one worker process. Workers must not see
torchrun's variables: `TORCHELASTIC_USE_AGENT_STORE` makes any private rendezvous in an engine hang,
a stray RANK makes engines believe in a world that isn't theirs. torch itself is not needed, and no
process group is made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from ragfleet.errors import ConfigError

_PREFIXES: Final = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
_NAMES: Final = frozenset({"RANK", "WORLD_SIZE"})


@dataclass(frozen=True, kw_only=True)
class TorchrunRank:
    """This process's place. One machine only: `local_rank == rank`."""

    rank: int
    world_size: int
    launch_id: str
    """The same for all ranks of one start, different for any other start."""
    restart_count: int
    agent_pid: int
    """The torchrun process; without it nobody would end this one."""


def detect(environ: Mapping[str, str]) -> TorchrunRank | None:
    """None where torchrun has no part in this.

    Raises:
        ConfigError: variables of torchrun without torchrun, several machines, or srun's copies.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        if "RANK" in environ or "WORLD_SIZE" in environ:
            raise ConfigError(
                "RANK or WORLD_SIZE is set, but torchrun did not start this process. Unset them"
                " (unset RANK WORLD_SIZE), or start with torchrun --standalone --nproc_per_node=N."
            )
        # Variables of the step: in the batch script itself only those of the job are set.
        copies = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if int(copies) > 1 and "SLURM_PROCID" in environ:
            raise ConfigError(
                f"srun started {copies} copies of this command. Start one"
                " (srun --ntasks=1) with --num_workers, or use torchrun."
            )
        return None
    if int(environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun runs on several machines; this version shares one machine's GPUs only. Split"
            " the contexts file and run once on each machine."
        )
    restart_count = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    parent = os.getppid()
    # The agent's process id with its start time is unique on a machine until it is rebooted.
    start = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    text = f"{boot}.{parent}.{start}.{restart_count}"
    return TorchrunRank(
        rank=int(environ["RANK"]),
        world_size=int(environ["WORLD_SIZE"]),
        launch_id=f"torchrun-{xxhash.xxh3_64_hexdigest(text.encode())}",
        restart_count=restart_count,
        agent_pid=parent,
    )


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without anything torchrun put there."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _NAMES and not name.startswith(_PREFIXES)
    }


def report_error(environ: Mapping[str, str], message: str) -> None:
    """Have torchrun print our reason instead of a bare exit code."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        text = json.dumps({"message": {"message": message, "extraInfo": extra}})
        Path(path).write_text(text, encoding="utf-8")
