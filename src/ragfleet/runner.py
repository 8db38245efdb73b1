"""The composition root: configuration → plan → workers → merge → summary.

The command line and Python both call `run`; what happens meanwhile goes to an `on_event` callable,
so nothing here prints. Under torchrun, rank 0 does all of it for everybody and the other ranks only
watch their worker.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from ragfleet.accounting import begin_account
from ragfleet.beats import Beat, read_beats
from ragfleet.config import RunConfig
from ragfleet.earlier_files import (
    before_replacing,
    finished_before,
    merged_without_shards,
    move_away,
    remove_old_launches,
    remove_shards,
)
from ragfleet.errors import (
    STORAGE_ERRNOS,
    Interrupted,
    RunError,
    StorageError,
    UsageError,
    WorkersFailed,
)
from ragfleet.estimates import Prefill, plan_requests
from ragfleet.events import Event, OnEvent, reading
from ragfleet.follower import follow
from ragfleet.gpu_locks import GpuLocks
from ragfleet.header import header_lines, leftovers_line, resume_line
from ragfleet.identity import RunFile, write_run_file
from ragfleet.launch import LaunchPaths, RunPaths, Work, write_launch
from ragfleet.launchers import torchrun
from ragfleet.launchers.supervisor import Supervisor
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.merge import write_results
from ragfleet.plan import Plan
from ragfleet.planning import (
    Finished,
    Indexed,
    find_finished,
    index_contexts,
    selection_of,
)
from ragfleet.preparation import Preparation, check_paths, prepare
from ragfleet.privacy import is_private, make_private
from ragfleet.run_lock import RunLock
from ragfleet.seats import launch_of, seat_of
from ragfleet.summary import MergeStatistics, RunSummary, generation_of

_ENOUGH: Final = 32
"""Answers whose mean length says something of the others."""


def run(
    config: RunConfig, on_event: OnEvent | None = None, *, owns_process: bool = False
) -> RunSummary | None:
    """Answer the contexts and merge the results; go on where an earlier start stopped.

    Args:
        on_event: called with everything worth showing while the run goes on.
        owns_process: this process is there for the run alone and starts nothing else, so what its
            workers leave behind is adopted by it and ended, also where nothing else gives it away.

    Returns:
        The summary; None on torchrun's ranks above 0, where rank 0 has it.

    Raises:
        UsageError: nothing was spent and nothing written.
        RunError: the run stopped; what is finished is safe and the same call goes on.
        Interrupted: a signal.
    """
    say = on_event or (lambda event: None)
    started_s = time.monotonic()
    rank = torchrun.detect(os.environ)
    if rank is not None and rank.rank > 0:
        follow(config, rank, say, owns_process)
        return None
    if rank is not None and rank.restart_count > 0:
        config = config.replace(overwrite=False)  # it has been done by the first attempt
    return _Run(config, rank, say, started_s, owns_process).go()


class _Run:
    """One start of a run, step by step."""

    def __init__(
        self,
        config: RunConfig,
        rank: TorchrunRank | None,
        say: OnEvent,
        started_s: float,
        owns_process: bool,
    ) -> None:
        self.config, self.rank, self.started_s = config, rank, started_s
        self.owns_process = owns_process
        self._on_event = say
        self.launch_id = rank.launch_id if rank is not None else uuid.uuid4().hex[:12]
        self.restarts = 0
        self.beats: Mapping[str, Beat] = {}
        self.prefill: Prefill | None = None

    def say(self, event: Event) -> None:
        self.restarts += event.kind == "died"
        self._on_event(event)

    def go(self) -> RunSummary:
        check_paths(self.config)
        paths = RunPaths(self.config.output_file.absolute())
        try:
            summary = self.under_lock(paths)
        except OSError as error:
            if error.errno not in STORAGE_ERRNOS:
                raise
            where = error.filename or paths.directory
            raise StorageError(f"Can't write {where}: {error.strerror}.") from error
        self.say(Event("summary", data={"summary": summary}))
        return summary

    def under_lock(self, paths: RunPaths) -> RunSummary:
        # All that an earlier start left is read under the lock: two first starts at once must not
        # both believe that they are the first.
        # Once private, always private: a resume need not say it again.
        self.private = self.config.private or is_private(paths)
        # GPUs are this run's until it is over, whoever starts meanwhile.
        with (
            GpuLocks() as gpu_locks,
            RunLock(paths, self.launch_id, private=self.private) as lock,
        ):
            if lock.ended:
                self.say(Event("note", leftovers_line(lock.ended)))
            try:
                preparation = prepare(self.config, os.environ, self.rank, gpu_locks=gpu_locks)
                indexed = self.read_input(preparation)
                to_do, finished = indexed.requests, None
                if not self.config.overwrite:
                    finished = find_finished(indexed, paths.output_file)
                    to_do = to_do & ~finished_before(preparation, indexed, finished)
                    # Before a tokenizer is loaded for a plan.
                    if summary := self.already_removed(preparation, indexed, finished):
                        return summary
                plan, self.prefill = plan_requests(preparation, indexed, to_do)
            except UsageError:
                lock.discard_new()
                raise
            if finished is None:
                move_away(preparation.paths, self.private)
                finished = find_finished(indexed, paths.output_file)
            run_file = self.begin(preparation, indexed)
            resumed = self.generate(preparation, indexed, plan, finished, lock, run_file)
            del finished  # 40 bytes an answer, and the merge scans anew
            return self.merge(preparation.paths, run_file, indexed, resumed)

    # ---- before anything is spent

    def read_input(self, preparation: Preparation) -> Indexed:
        selection = selection_of(self.config, preparation.num_workers, preparation.key_fields)
        return index_contexts(selection, preparation.identity.run_key, reading(self.say))

    def already_removed(
        self, preparation: Preparation, indexed: Indexed, finished: Finished
    ) -> RunSummary | None:
        """The stored summary of a merged run whose shards were removed, else None."""
        merged = merged_without_shards(preparation, indexed, self.config.retry_failed)
        if merged is None:
            return None
        output = preparation.paths.output_file
        if self.config.remove_shards:  # a start that was killed meanwhile has left some
            remove_shards(finished)
        self.say(Event("note", f"Nothing to do: {output} is complete."))
        self.release_followers(preparation.paths.launch(self.launch_id))
        statistics = msgspec.convert(merged["statistics"], MergeStatistics, str_keys=True)
        return self.summary(output, indexed, statistics, resumed=statistics.generated)

    # ---- generating

    def begin(self, preparation: Preparation, indexed: Indexed) -> RunFile:
        """Write down what this run is; from here on there is something to resume."""
        before = preparation.run_file
        run_file = RunFile(
            run_key=preparation.identity.run_key.hex(),
            parts=dict(preparation.identity.parts),
            clock=preparation.clock,
            output_name=preparation.paths.output_file.name,
            starts=(before.starts if before else 0) + 1,
            truncation=[self.config.truncate_context, self.config.max_model_len],
            class_hash=before.class_hash if before else preparation.class_hash,
            selection=msgspec.structs.replace(indexed.selection, launch_id=self.launch_id),
            merged=before.merged if before else None,
            written=before.written if before else [],
            answer_tokens=before.answer_tokens if before else None,
        )
        if self.private:
            make_private(preparation.paths)
        write_run_file(preparation.paths, run_file)
        return run_file

    def generate(
        self,
        preparation: Preparation,
        indexed: Indexed,
        plan: Plan,
        finished: Finished,
        lock: RunLock,
        run_file: RunFile,
    ) -> int:
        """Run workers until every request has an outcome; return how many had one before."""
        paths, config = preparation.paths, self.config
        done = finished.mask(indexed, config.retry_failed)
        num_finished, to_do = int(done.sum()), len(plan.order)
        header = header_lines(preparation, indexed, plan, finished, self.prefill)
        self.say(Event("header", "\n".join(header)))
        starts = preparation.run_file.starts if preparation.run_file else 0
        if starts or num_finished:
            self.say(Event("note", resume_line(starts, num_finished, to_do)))
        self.finished, self.to_do = num_finished, to_do
        launch_paths = paths.launch(self.launch_id)
        deaths = remove_old_launches(paths, indexed)
        if not to_do:
            self.release_followers(launch_paths)
            return num_finished
        # Under torchrun every rank is there anyway, and a static slice is nobody else's; otherwise
        # no model is loaded for nothing.
        num_started = preparation.num_workers
        if self.rank is None and config.schedule == "dynamic":
            num_started = min(num_started, len(plan.chunks))
        launch = launch_of(preparation, self.launch_id, num_started, private=self.private)
        work = Work(indexed.index.records, plan.order, plan.leads, plan.chunks)
        paths.logs.mkdir(exist_ok=True)
        if preparation.remote is not None:
            begin_account(launch_paths.directory, preparation.remote, indexed, finished)
        write_launch(launch_paths, launch, work, deaths)
        ranks = [self.rank.rank] if self.rank is not None else range(launch.num_started)
        supervisor = Supervisor(
            launch_paths,
            launch,
            [seat_of(launch, rank) for rank in ranks],
            logs=paths.logs,
            num_chunks=len(plan.chunks),
            max_restarts=config.max_restarts,
            on_event=self.say,
            on_tick=self.tick,
            keep_fds=(lock.fd,),
            parent_pid=self.rank.agent_pid if self.rank is not None else None,
            owns_process=self.owns_process,
        )
        try:
            supervisor.run()
        except (Interrupted, RunError) as error:
            run_file.answer_tokens = self.answer_tokens(run_file)
            with contextlib.suppress(StorageError):  # the disk may be full
                write_run_file(paths, run_file)
            raise self.told(error, indexed, paths) from error
        self.beats = read_beats(launch_paths.beats)
        return num_finished

    def release_followers(self, paths: LaunchPaths) -> None:
        if self.rank is not None:
            paths.directory.mkdir(parents=True, exist_ok=True)
            paths.nothing_to_do.touch()

    def tick(self, beats: Mapping[str, Beat]) -> None:
        self.beats = dict(beats)
        prompt = sum(beat.prompt_tokens for beat in beats.values())
        completion = sum(beat.completion_tokens for beat in beats.values())
        data = {"beats": self.beats, "kept": self.finished, "left": self.to_do}
        self.say(Event("progress", data={**data, "cost": self.cost(prompt, completion)}))

    def answer_tokens(self, run_file: RunFile) -> float | None:
        """Mean length of the answers so far: better than any guess for planning what remains."""
        answered = sum(beat.succeeded for beat in self.beats.values())
        tokens = sum(beat.completion_tokens for beat in self.beats.values())
        return tokens / answered if tokens and answered >= _ENOUGH else run_file.answer_tokens

    def told(
        self, error: Interrupted | RunError, indexed: Indexed, paths: RunPaths
    ) -> Interrupted | RunError:
        """The same error with what is kept and what remains."""
        finished = find_finished(indexed, paths.output_file)
        kept, total = int(finished.mask(indexed).sum()), int(indexed.requests.sum())
        text = (
            f"{kept:,} of {total:,} requests are finished and on disk, {total - kept:,} remain;"
            f" {paths.output_file.name} was not touched."
        )
        if isinstance(error, Interrupted):
            return Interrupted(f"Interrupted. {text}", error.signal_number)
        return type(error)(f"{error}\n{text}")

    # ---- merging

    def merge(
        self, paths: RunPaths, run_file: RunFile, indexed: Indexed, resumed: int
    ) -> RunSummary:
        self.say(Event("merging", "Merging."))
        finished = find_finished(indexed, paths.output_file)
        missing = int(indexed.requests.sum()) - int(finished.mask(indexed).sum())
        if missing:
            raise WorkersFailed(
                f"{missing:,} requests have no result although every chunk was marked finished"
                " (was a shard deleted?). Run the same command again."
            )

        def keep_old(statistics: MergeStatistics, content: str) -> None:
            if note := before_replacing(paths, run_file, statistics, content):
                self.say(Event("note", note))

        statistics = write_results(
            indexed.merge_job(finished.winners),
            paths.output_file,
            keep_old,
            private=self.private,
            on_progress=lambda rows: self.say(Event("writing", f"merged {rows:,} rows")),
        )
        others = finished.num_unasked_answers  # they are nowhere else
        removes = self.config.remove_shards and not others
        run_file.merged = {
            "statistics": msgspec.to_builtins(statistics, str_keys=True),
            "digest": indexed.digest(),
            "shards_removed": removes,
        }
        run_file.answer_tokens = self.answer_tokens(run_file)
        write_run_file(paths, run_file)
        if removes:
            remove_shards(finished)
        elif self.config.remove_shards:
            self.say(
                Event(
                    "note",
                    f"--remove_shards: the shards stay, for they hold {others:,} answers that"
                    f" {paths.output_file.name} does not.",
                )
            )
        if self.rank is None:  # other ranks' workers may only now be starting
            for array in paths.launch(self.launch_id).directory.glob("*.npy"):
                array.unlink()
        return self.summary(paths.output_file, indexed, statistics, resumed, finished)

    def summary(
        self,
        output_file: Path,
        indexed: Indexed,
        statistics: MergeStatistics,
        resumed: int,
        finished: Finished | None = None,
    ) -> RunSummary:
        return RunSummary(
            output_file=output_file,
            num_lines=len(indexed.index),
            num_selected=indexed.num_selected,
            statistics=statistics,
            answered_now=statistics.generated - resumed,
            resumed=resumed,
            superfluous=finished.num_superfluous if finished else 0,
            stolen_chunks=sum(beat.stolen for beat in self.beats.values()),
            restarts=self.restarts,
            wall_s=time.monotonic() - self.started_s,
            prefill=self.prefill,
            generation=generation_of(self.beats.values()),
            fail_on_errors=self.config.fail_on_errors,
            cost=self.cost(statistics.prompt_tokens, statistics.completion_tokens),
        )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """At the given prices; None without them."""
        price_in, price_out = self.config.price_in, self.config.price_out
        if price_in is None and price_out is None:
            return None
        return (prompt_tokens * (price_in or 0) + completion_tokens * (price_out or 0)) / 1e6
