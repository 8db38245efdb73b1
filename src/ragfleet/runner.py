"""The composition root: configuration → plan → workers → merge → summary.

The command line and Python both call `run`; what happens meanwhile goes to an `on_event` callable,
so nothing here prints. Under torchrun, rank 0 does all of it for everybody and the other ranks only
watch their worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from ragfleet.accounting import begin_account
from ragfleet.allocation import worker_environment
from ragfleet.beats import Beat, beat_timeout_s, read_beats
from ragfleet.config import RunConfig
from ragfleet.errors import (
    Interrupted,
    OutputError,
    RunError,
    StorageError,
    UsageError,
    WorkersFailed,
)
from ragfleet.estimates import Prefill, plan_requests
from ragfleet.events import Event, OnEvent
from ragfleet.header import header_lines, leftovers_line, resume_line
from ragfleet.identity import (
    RunFile,
    check_same_run,
    check_truncation,
    write_run_file,
)
from ragfleet.launch import (
    Launch,
    LaunchPaths,
    RunPaths,
    SeatSpec,
    Work,
    read_launch,
    write_launch,
)
from ragfleet.launchers import torchrun
from ragfleet.launchers.process import Seat
from ragfleet.launchers.supervisor import Supervisor
from ragfleet.launchers.torchrun import TorchrunRank
from ragfleet.merge import write_results
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
from ragfleet.shards import list_shards, partial_path
from ragfleet.summary import Generation, MergeStatistics, RunSummary

_PLAN_WAIT_S: Final = 1800.0
_PLAN_NOTE_S: Final = 30.0
_POLL_S: Final = 0.2
_ENOUGH: Final = 32
"""Answers whose mean length says something of the others."""
_STORAGE_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


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
        _follow(config, rank, say, owns_process)
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
            if error.errno not in _STORAGE_ERRORS:
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
        with RunLock(paths, self.launch_id, private=self.private) as lock:
            if lock.ended:
                self.say(Event("note", leftovers_line(lock.ended)))
            try:
                preparation = prepare(self.config, os.environ, self.rank)
                indexed = self.read_input(preparation)
                self.check_output(preparation, indexed)
            except UsageError:
                lock.discard_new()
                raise
            if self.config.overwrite:
                _move_away(preparation.paths, self.private)
            summary = self.already_removed(preparation, indexed)
            if summary is None:
                run_file = self.begin(preparation, indexed)
                resumed = self.generate(preparation, indexed, lock, run_file)
                summary = self.merge(preparation.paths, run_file, indexed, resumed)
        return summary

    # ---- before anything is spent

    def read_input(self, preparation: Preparation) -> Indexed:
        selection = selection_of(self.config, preparation.num_workers, preparation.key_fields)
        return index_contexts(
            selection,
            preparation.identity.run_key,
            lambda count, share: self.say(
                Event("reading", f"read {count:,} records ({share:.0%} of the file)")
            ),
        )

    def check_output(self, preparation: Preparation, indexed: Indexed) -> None:
        """Refuse an output that belongs to something else."""
        paths, run_file = preparation.paths, preparation.run_file
        if self.config.overwrite:
            return
        finished = find_finished(indexed, paths.output_file)
        has_results = len(finished.winners.answers) > 0
        if run_file is None:
            if paths.output_file.exists() and not has_results:
                raise OutputError(
                    f"{paths.output_file} exists, and no run of ragfleet made it. Take another"
                    " --output_file, or --overwrite, which moves it to"
                    f" {paths.output_file.stem}.bak-<time>."
                )
            return
        if run_file.output_name not in ("", paths.output_file.name):
            raise OutputError(
                f"{paths.directory} belongs to {run_file.output_name}; two outputs whose names"
                " differ only in their ending can't share it. Take another --output_file."
            )
        if not has_results and run_file.merged is None:
            return  # nothing depends on the earlier start's settings
        check_same_run(
            run_file, preparation.identity, paths.output_file, len(finished.winners.answers)
        )
        truncation = [self.config.truncate_context, self.config.max_model_len]
        check_truncation(run_file, truncation, paths.output_file)

    def already_removed(self, preparation: Preparation, indexed: Indexed) -> RunSummary | None:
        """The stored summary of a merged run whose shards were removed, else None."""
        merged = preparation.run_file.merged if preparation.run_file else None
        if not merged or not merged.get("shards_removed"):
            return None
        output = preparation.paths.output_file
        if (
            merged["digest"] != indexed.digest()
            or not output.exists()
            or (self.config.retry_failed and merged["statistics"]["failed"])
        ):
            raise OutputError(
                f"{output} was merged and its shards removed (--remove_shards), so it can't be"
                " extended. Take another --output_file, or --overwrite."
            )
        self.say(Event("note", f"Nothing to do: {output} is complete."))
        if self.rank is not None:
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
            answer_tokens=before.answer_tokens if before else None,
        )
        if self.private:
            make_private(preparation.paths)
        write_run_file(preparation.paths, run_file)
        return run_file

    def generate(
        self, preparation: Preparation, indexed: Indexed, lock: RunLock, run_file: RunFile
    ) -> int:
        """Run workers until every request has an outcome; return how many had one before."""
        paths, config = preparation.paths, self.config
        finished = find_finished(indexed, paths.output_file)
        done = finished.mask(indexed, config.retry_failed)
        plan, self.prefill = plan_requests(preparation, indexed, indexed.requests & ~done)
        num_finished, to_do = int(done.sum()), len(plan.order)
        header = header_lines(preparation, indexed, plan, finished, self.prefill)
        self.say(Event("header", "\n".join(header)))
        starts = preparation.run_file.starts if preparation.run_file else 0
        if starts or num_finished:
            self.say(Event("note", resume_line(starts, num_finished, to_do)))
        self.finished, self.to_do = num_finished, to_do
        launch_paths = paths.launch(self.launch_id)
        _remove_old_launches(paths)
        if not to_do:
            self.release_followers(launch_paths)
            return num_finished
        # Under torchrun every rank is there anyway, and a static slice is nobody else's; otherwise
        # no model is loaded for nothing.
        num_started = preparation.num_workers
        if self.rank is None and config.schedule == "dynamic":
            num_started = min(num_started, len(plan.chunks))
        launch = self.make_launch(preparation, num_started)
        work = Work(indexed.index.records, plan.order, plan.leads, plan.chunks)
        paths.logs.mkdir(exist_ok=True)
        if preparation.remote is not None:
            begin_account(launch_paths.directory, preparation.remote, indexed, finished)
        write_launch(launch_paths, launch, work)
        ranks = [self.rank.rank] if self.rank is not None else range(launch.num_started)
        supervisor = Supervisor(
            launch_paths,
            launch,
            [_seat(launch, rank) for rank in ranks],
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

    def make_launch(self, preparation: Preparation, num_started: int) -> Launch:
        config, prompts = self.config, preparation.prompts
        return Launch(
            launch_id=self.launch_id,
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
            prompts={field.name: getattr(prompts, field.name) for field in _fields(prompts)},
            precision=preparation.precision,
            batch_size=config.batch_size,
            engine_options=config.engine_options,
            prefix_sharing=config.prefix_sharing == "auto",
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
            private=self.private,
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

        def keep_better(statistics: MergeStatistics) -> None:
            before = (run_file.merged or {}).get("statistics", {}).get("succeeded", 0)
            if before > statistics.succeeded and paths.output_file.exists():
                backup = _backup_name(paths.output_file)
                shutil.copy2(paths.output_file, backup)
                self.say(
                    Event(
                        "note",
                        f"{paths.output_file.name} had {before:,} answers and gets"
                        f" {statistics.succeeded:,}: the old file is kept as {backup.name}",
                    )
                )

        statistics = write_results(
            indexed.merge_job(finished.winners),
            paths.output_file,
            keep_better,
            private=self.private,
        )
        run_file.merged = {
            "statistics": msgspec.to_builtins(statistics, str_keys=True),
            "digest": indexed.digest(),
            "shards_removed": self.config.remove_shards,
        }
        run_file.answer_tokens = self.answer_tokens(run_file)
        write_run_file(paths, run_file)
        if self.config.remove_shards:
            for shard in finished.shards:
                shard.unlink()
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


def generation_of(beats: Iterable[Beat]) -> Generation:
    """What the workers of this start say of themselves, those that died among them."""
    generation = Generation()
    ranks = set()
    for beat in beats:
        ranks.add(beat.owner.partition(".")[0])
        generation.makespan_s = max(generation.makespan_s, beat.span_s)
        generation.busy_s += beat.busy_s
        generation.prompt_tokens += beat.prompt_tokens
        generation.cached_tokens += beat.cached_tokens
        generation.uncounted += beat.uncounted
    generation.num_workers = len(ranks)
    return generation


def _follow(config: RunConfig, rank: TorchrunRank, say: OnEvent, owns_process: bool) -> None:
    """A rank above 0: wait for rank 0's plan, then watch one worker until all is finished."""
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
        [_seat(launch, rank.rank)],
        logs=paths.logs,
        num_chunks=len(np.load(launch_paths.array("chunks"), mmap_mode="r")),
        max_restarts=config.max_restarts,
        on_event=say,
        parent_pid=rank.agent_pid,
        owns_process=owns_process,
    ).run()


def _seat(launch: Launch, rank: int) -> Seat:
    spec = launch.seats[rank]
    return Seat(
        rank=rank,
        environment={**torchrun.scrubbed(os.environ), **spec.environment},
        num_gpus=spec.num_gpus,
        num_threads=spec.num_threads,
    )


def _remove_old_launches(paths: RunPaths) -> None:
    """Nothing of an earlier start runs any more: the lock says so."""
    for torn in paths.output_file.parent.glob(f".{paths.output_file.name}.*.tmp"):
        torn.unlink(missing_ok=True)
    shutil.rmtree(paths.launches, ignore_errors=True)
    paths.launches.mkdir(parents=True, exist_ok=True)


def _move_away(paths: RunPaths, private: bool) -> None:
    """--overwrite: everything of the earlier run into one folder, so that one `mv` undoes it."""
    output = paths.output_file
    old = [output, partial_path(output), *list_shards(output)]
    old = [path for path in old if path.exists()]
    inside = [path for path in paths.directory.iterdir() if path != paths.lock]
    if not old and not inside:
        return
    backup = output.with_name(_backup_name(output).stem)
    backup.mkdir(mode=0o700 if private else 0o777)
    (backup / paths.directory.name).mkdir()
    for path in old:
        path.rename(backup / path.name)
    for path in inside:
        path.rename(backup / paths.directory.name / path.name)


def _backup_name(output: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    number = 0
    while True:
        suffix = f"-{number}" if number else ""
        name = output.with_name(f"{output.stem}.bak-{stamp}{suffix}{output.suffix}")
        if not name.exists() and not name.with_name(name.stem).exists():
            return name
        number += 1


def _fields(prompts: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(prompts)
