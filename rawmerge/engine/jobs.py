"""The jobs of a merge in flight: how many at a time, what their completion leads to, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from rawmerge.engine.shard_target import ShardTarget
from rawmerge.merge_plan import ShardPlan


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is.

    Attributes:
        done_bytes: bytes of output tensors finished.
        total_bytes: bytes of all output tensors.
        tensor_name: the tensor that a part of was just finished.
        shard_name: the output shard it belongs to.
    """

    done_bytes: int
    total_bytes: int
    tensor_name: str
    shard_name: str


ProgressCallback: TypeAlias = Callable[[Progress], object]


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work: what to call, and what it finishes."""

    call: Callable[[], None]
    byte_count: int
    tensor_name: str


@dataclass(slots=True)
class ShardInWork:
    """An output shard in work."""

    plan: ShardPlan
    file: ShardTarget
    open_jobs: int = 0
    all_submitted: bool = False


class FinishedJob(NamedTuple):
    """A job that is over, and how it ended."""

    job: Job
    shard: ShardInWork
    future: Future[None]


@dataclass(slots=True)
class RunningJobs:
    """The jobs in flight, and what their completion leads to; used by the calling thread alone."""

    total_bytes: int
    report: ProgressCallback | None
    syncer: ThreadPoolExecutor
    limit: int
    gives_up_pages: bool = False
    done_bytes: int = 0
    flying: int = 0
    finished: SimpleQueue[FinishedJob] = field(default_factory=SimpleQueue)
    syncing: list[Future[None]] = field(default_factory=list)
    shards: list[ShardInWork] = field(default_factory=list)

    def begin(self, plan: ShardPlan, file: ShardTarget) -> ShardInWork:
        """Return the record of a shard that jobs will be submitted for."""
        shard = ShardInWork(plan, file)
        self.shards.append(shard)
        return shard

    def end(self, shard: ShardInWork) -> None:
        """All jobs of the shard have been submitted."""
        shard.all_submitted = True
        self._finish_if_done(shard)

    def submit(self, workers: ThreadPoolExecutor, shard: ShardInWork, jobs: Iterable[Job]) -> None:
        """Start the jobs, as many at a time as the limit allows."""
        for job in jobs:
            while self.flying >= self.limit:
                self._collect()
            shard.open_jobs += 1
            self.flying += 1
            # a queue costs less than waiting for any of several futures
            put = partial(self._put, job, shard)
            workers.submit(job.call).add_done_callback(put)

    def drain(self) -> None:
        """Wait until everything is written and durable."""
        while self.flying:
            self._collect()
        for future in self.syncing:
            future.result()

    def abandon(self) -> None:
        """Close all files of a merge that failed."""
        wait(self.syncing)
        for shard in self.shards:
            shard.file.close()

    def _put(self, job: Job, shard: ShardInWork, future: Future[None]) -> None:
        self.finished.put(FinishedJob(job, shard, future))

    def _collect(self) -> None:
        job, shard, future = self.finished.get()
        self.flying -= 1
        future.result()
        self.done_bytes += job.byte_count
        shard.open_jobs -= 1
        self._finish_if_done(shard)
        if self.report:
            self.report(Progress(self.done_bytes, self.total_bytes, job.tensor_name, shard.plan.name))

    def _finish_if_done(self, shard: ShardInWork) -> None:
        if shard.all_submitted and shard.open_jobs == 0:
            # waits for the disk beside the next shard's work
            self.syncing.append(self.syncer.submit(shard.file.finish, gives_up_pages=self.gives_up_pages))
