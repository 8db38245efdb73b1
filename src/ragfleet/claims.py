"""Claims: who works on which chunk. They only save work; they never decide what is correct.

`decide` is a pure state machine: what the board shows and who is alive in, one instruction out,
with no clock, disk or network. `ClaimStore` is its thin file store: names an operator can `ls -l`,
never unlinked. A claim is a symbolic link that points nowhere: it is created exclusively and
together with its contents, so nobody can see, or leave behind, a claim without an owner.

    0000012.g0 -> 3.0:81920:results_rank3.jsonl   first claim of chunk 12
    0000012.g1 -> ...   taken over after its owner died: the highest generation owns
    0000012.done        every request of it has an outcome in some shard
    dead.3.0            worker 3's first process is gone (written by whoever reaped it)
    gone.3              worker 3 is given up: its slice is everybody's
    death.3.0           the index rows that were in flight when it died, see `poison`
    timeout.4711        the record of index row 4711 blocked its engine for too long
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ragfleet.errors import StorageError


@dataclass(frozen=True, slots=True)
class Holder:
    """Contents of a claim: who holds it, and where its finished lines go."""

    owner: str
    """`<rank>.<incarnation>`"""
    shard: str
    offset_bytes: int
    """Size of the shard when the claim was made: a successor scans from here."""


@dataclass(slots=True)
class Board:
    """What is known of all chunks.

    Attributes:
        slices: chunk numbers of each worker's slice, in claiming order.
        costs: cost of each chunk.
        claims: chunk → (generation, holder) of its highest claim seen.
        done: chunks that are finished.
        dead: owners known to be gone.
        gone: ranks that will have no process any more.
        timed_out: index rows whose request blocked an engine for too long.
        deaths: owner → index rows that were in flight when its process died.
    """

    slices: Sequence[Sequence[int]]
    costs: Sequence[float]
    claims: dict[int, tuple[int, Holder]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    timed_out: set[int] = field(default_factory=set)
    deaths: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Claim:
    """Create this claim; `previous` is the dead holder it is taken over from."""

    chunk: int
    generation: int
    previous: Holder | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Others, alive, hold all that is left."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Every chunk is finished."""


def decide(
    board: Board, me: str, rank: int, is_alive: Callable[[str], bool], *, may_steal: bool
) -> Claim | Wait | Leave:
    """The next thing a worker with room should do.

    Own slice first, in order; then the slice with the most unclaimed cost, of all if it may steal,
    else of those whose worker is given up; then what dead owners left behind, whoever's slice it
    is.
    """
    if len(board.done) == len(board.costs):
        return Leave()
    own = board.slices[rank] if rank < len(board.slices) else ()
    for chunk in own:
        if chunk not in board.claims and chunk not in board.done:
            return Claim(chunk, 0)
    behind = [
        [chunk for chunk in part if chunk not in board.claims and chunk not in board.done]
        for worker, part in enumerate(board.slices)
        if may_steal or worker in board.gone
    ]
    if any(behind):
        furthest = max(behind, key=lambda part: (sum(board.costs[c] for c in part), len(part)))
        return Claim(furthest[0], 0)
    for chunk, (generation, holder) in sorted(board.claims.items()):
        if chunk in board.done or holder.owner == me:
            continue
        if holder.owner in board.dead or not is_alive(holder.owner):
            return Claim(chunk, generation + 1, holder)
    return Wait()


class ClaimStore:
    """The board as files of one directory, shared by all workers of one launch."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def refresh(self, board: Board) -> set[int]:
        """Read the directory; what a claim says is read once. Returns the chunks marked as done.

        Files may go at any moment: what is gone is as if it had never been.
        """
        marked = set()
        for name in os.listdir(self._directory):
            head, _, tail = name.partition(".")
            if head == "dead":
                board.dead.add(tail)
            elif head == "gone":
                board.gone.add(int(tail))
            elif head == "death":
                self._read_death(board, tail)
            elif head == "timeout":
                board.timed_out.add(int(tail))
            elif tail == "done":
                marked.add(int(head))
            elif tail.startswith("g"):
                chunk, generation = int(head), int(tail[1:])
                known = board.claims.get(chunk)
                if known is None or known[0] < generation:
                    holder = self.holder(chunk, generation)
                    if holder is not None:
                        board.claims[chunk] = (generation, holder)
        # A death is written down before it frees claims, but a listing that was made meanwhile may
        # show the second alone.
        for owner in board.dead - board.deaths.keys():
            self._read_death(board, owner)
        board.done |= marked
        return marked

    def holder(self, chunk: int, generation: int) -> Holder | None:
        """What a claim says; None for one that is gone."""
        try:
            text = os.readlink(self._path(chunk, generation))
        except FileNotFoundError:
            return None
        owner, offset, shard = text.split(":", 2)
        return Holder(owner, shard, int(offset))

    def earlier_holders(self, claim: Claim) -> Iterator[Holder]:
        """Those whose shards may hold answers of a chunk that is taken over."""
        for generation in range(claim.generation):
            holder = self.holder(claim.chunk, generation)
            if holder is not None:
                yield holder

    def try_claim(self, claim: Claim, holder: Holder) -> bool:
        """Create the claim; False when somebody else was first."""
        path = self._path(claim.chunk, claim.generation)
        try:
            os.symlink(f"{holder.owner}:{holder.offset_bytes}:{holder.shard}", path)
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(
                f"Can't create {path}: {error.strerror} (the file system that holds the output"
                " must support symbolic links)."
            ) from error
        return True

    def _path(self, chunk: int, generation: int) -> Path:
        return self._directory / f"{chunk:07d}.g{generation}"

    def finish(self, chunk: int) -> None:
        self._touch(f"{chunk:07d}.done")

    def bury(self, owner: str) -> None:
        """Say that an owner's process is gone, so that its claims are free at once."""
        self._touch(f"dead.{owner}")

    def give_up(self, rank: int) -> None:
        """Say that a rank will have no process any more, so that others take its slice."""
        self._touch(f"gone.{rank}")

    def record_death(self, owner: str, rows: Sequence[int]) -> None:
        """Say what was in flight when a process died; before `bury`, which frees its claims."""
        path = self._directory / f"death.{owner}"
        temporary = self._directory / f".death.{owner}"
        try:
            temporary.write_text(" ".join(map(str, rows)))
            os.replace(temporary, path)
        except OSError as error:
            raise StorageError(f"Can't write {path}: {error.strerror}.") from error

    def _read_death(self, board: Board, owner: str) -> None:
        if owner not in board.deaths:
            with contextlib.suppress(FileNotFoundError):
                rows = (self._directory / f"death.{owner}").read_text().split()
                board.deaths[owner] = tuple(map(int, rows))

    def time_out(self, row: int) -> None:
        """Say that this index row blocked its engine; whoever claims it next fails it."""
        self._touch(f"timeout.{row}")

    def is_superseded(self, chunk: int, generation: int) -> bool:
        return os.path.lexists(self._path(chunk, generation + 1))

    def _touch(self, name: str) -> None:
        path = self._directory / name
        try:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        except OSError as error:
            raise StorageError(f"Can't create {path}: {error.strerror}.") from error
