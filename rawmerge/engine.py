"""Moves the bytes that a plan decided on: a few threads, each taking whole jobs (a copied range, a tile).

Reading, computing and writing overlap because every job does all three and the threads are at different ones. A
job's bytes depend on nothing but its own range, so their order and number change no bit of the output.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from rawmerge.merge_plan import KeepTensor, ReplaceTensor, ShardPlan, Step, UpdateTensor
from rawmerge.shard_writer import OutputFile
from rawmerge.tensor_source import OpenFiles, TensorSource
from rawmerge.tiles import TILE_ELEMENTS, matrix_shape, tile_rows

if TYPE_CHECKING:
    from rawmerge.blas_threads import BlasThreads
    from rawmerge.tile_computer import TensorComputer, TileScratch

#: A copied range is cut into jobs of this size, so that progress moves and threads share the work.
COPY_BYTES: Final = 32 * 2**20
MAX_THREADS: Final = 4


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


def default_threads() -> int:
    """Return how many threads a merge uses unless told: the processors it may use, at most four."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, usable)


@dataclass(frozen=True, slots=True)
class _Job:
    """One piece of work: what to call, and what it finishes."""

    call: Callable[[], None]
    byte_count: int
    tensor_name: str


@dataclass(slots=True)
class _Shard:
    """An output shard in work."""

    plan: ShardPlan
    file: OutputFile
    open_jobs: int = 0
    all_submitted: bool = False


class Engine:
    """Runs shard plans on a pool of threads; one engine serves one merge.

    Attributes:
        changed: names of the updated tensors of which at least one element differs from the base.
    """

    def __init__(self, compute_dtype: str, threads: int, total_bytes: int, tile_elements: int = TILE_ELEMENTS) -> None:
        self.changed: set[str] = set()
        self._compute_dtype = compute_dtype
        self._threads = threads
        self._total_bytes = total_bytes
        self._tile_elements = tile_elements
        self._files = OpenFiles()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._blas_threads: BlasThreads | None = None

    def run(self, shards: Iterable[tuple[ShardPlan, OutputFile]], report: ProgressCallback | None) -> None:
        """Write all shards and make them durable.

        Args:
            shards: the plans and their new files; each file is finished and closed.
            report: called in the calling thread after each job; an exception from it ends the merge.

        Raises:
            MergeError: a tensor is not finite, or an input changed; OSError: a file operation failed.
        """
        with self._files, ThreadPoolExecutor(self._threads) as workers, ThreadPoolExecutor(1) as syncer:
            running = _Running(self._total_bytes, report, syncer, limit=2 * self._threads)
            # importing torch takes as long as copying a gigabyte; it starts beside the first ranges
            loading = syncer.submit(self._blas)
            try:
                # what is copied goes first, of all shards, so that nothing waits for torch that does not need it
                begun = [self._begin(plan, file, running, workers) for plan, file in shards]
                for shard in begun:
                    for step in shard.plan.steps:
                        if not _is_copied(step):
                            running.submit(workers, shard, self._tile_jobs(step, shard.plan, shard.file))
                    running.end(shard)
                running.drain()
                loading.result()
            except BaseException:
                workers.shutdown(wait=True, cancel_futures=True)
                running.abandon()
                raise
            finally:
                if self._blas_threads:
                    self._blas_threads.restore()

    def _begin(self, plan: ShardPlan, file: OutputFile, running: _Running, workers: ThreadPoolExecutor) -> _Shard:
        """Write a shard's header, and submit its copies."""
        shard = running.begin(plan, file)
        file.write_header(plan.header_text)
        for steps in _runs(plan.steps):
            running.submit(workers, shard, self._copy_jobs(steps, plan, file))
        return shard

    def _copy_jobs(self, steps: list[Step], plan: ShardPlan, file: OutputFile) -> Iterator[_Job]:
        """Yield the jobs that copy tensors lying side by side in the source and in the output."""
        source, total = steps[0].source, sum(step.source.byte_count for step in steps)
        target = plan.data_start + steps[0].entry.start
        for start in range(0, total, COPY_BYTES):
            count = min(COPY_BYTES, total - start)
            call = self._copy(file, source, start, target, count)
            yield _Job(call, count, steps[-1].entry.name)

    def _copy(self, file: OutputFile, source: TensorSource, start: int, target: int, count: int) -> Callable[[], None]:
        return lambda: file.copy_from(self._files, source.path, source.offset + start, target + start, count)

    def _tile_jobs(self, step: Step, plan: ShardPlan, file: OutputFile) -> Iterator[_Job]:
        assert not isinstance(step, KeepTensor)
        rows, columns = matrix_shape(step.source.shape)
        tensor = _Computed(self, step)
        row_bytes = step.entry.byte_count // rows if rows else 0
        target = plan.data_start + step.entry.start
        for first, count in tile_rows(rows, columns, self._tile_elements):
            call = self._tile(tensor, file, first, count, target + first * row_bytes)
            yield _Job(call, count * row_bytes, step.entry.name)

    def _tile(self, tensor: _Computed, file: OutputFile, first: int, count: int, target: int) -> Callable[[], None]:
        def call() -> None:
            scratch = self._scratch()
            computer = tensor.computer()
            file.write_at(target, computer.compute(first, count, scratch))
            if computer.changed:
                self.changed.add(tensor.name)

        return call

    def computer(self, step: UpdateTensor | ReplaceTensor) -> TensorComputer:
        """Return a computer for `step`."""
        from rawmerge.tile_computer import TensorComputer

        return TensorComputer(step, self._files, self._blas(), self._compute_dtype)

    def _scratch(self) -> TileScratch:
        """Return the calling thread's buffers."""
        if not hasattr(self._local, "scratch"):
            from rawmerge.tile_computer import TileScratch

            self._blas().adopt()
            self._local.scratch = TileScratch()
        scratch: TileScratch = self._local.scratch
        return scratch

    def _blas(self) -> BlasThreads:
        with self._lock:
            if self._blas_threads is None:
                from rawmerge.blas_threads import BlasThreads

                self._blas_threads = BlasThreads()
            return self._blas_threads


class _Computed:
    """A step's computer, made when its first tile comes up and let go with its last."""

    def __init__(self, engine: Engine, step: UpdateTensor | ReplaceTensor) -> None:
        self.name = step.entry.name
        self._engine = engine
        self._step = step
        self._lock = threading.Lock()
        self._computer: TensorComputer | None = None

    def computer(self) -> TensorComputer:
        with self._lock:
            if self._computer is None:
                self._computer = self._engine.computer(self._step)
            return self._computer


@dataclass(slots=True)
class _Running:
    """The jobs in flight, and what their completion leads to; used by the calling thread alone."""

    total_bytes: int
    report: ProgressCallback | None
    syncer: ThreadPoolExecutor
    limit: int
    done_bytes: int = 0
    flying: dict[Future[None], tuple[_Job, _Shard]] = field(default_factory=dict)
    syncing: list[Future[None]] = field(default_factory=list)
    shards: list[_Shard] = field(default_factory=list)

    def begin(self, plan: ShardPlan, file: OutputFile) -> _Shard:
        shard = _Shard(plan, file)
        self.shards.append(shard)
        return shard

    def end(self, shard: _Shard) -> None:
        """All jobs of the shard have been submitted."""
        shard.all_submitted = True
        self._finish_if_done(shard)

    def submit(self, workers: ThreadPoolExecutor, shard: _Shard, jobs: Iterable[_Job]) -> None:
        """Start the jobs, as many at a time as the limit allows."""
        for job in jobs:
            while len(self.flying) >= self.limit:
                self._collect()
            shard.open_jobs += 1
            self.flying[workers.submit(job.call)] = (job, shard)

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

    def _collect(self) -> None:
        finished, _ = wait(self.flying, return_when=FIRST_COMPLETED)
        for future in finished:
            job, shard = self.flying.pop(future)
            future.result()
            self.done_bytes += job.byte_count
            shard.open_jobs -= 1
            self._finish_if_done(shard)
            if self.report:
                self.report(Progress(self.done_bytes, self.total_bytes, job.tensor_name, shard.plan.name))

    def _finish_if_done(self, shard: _Shard) -> None:
        if shard.all_submitted and shard.open_jobs == 0:
            # waits for the disk beside the next shard's work
            self.syncing.append(self.syncer.submit(shard.file.finish))


def _is_copied(step: Step) -> bool:
    return isinstance(step, KeepTensor) or (isinstance(step, ReplaceTensor) and step.source.dtype == step.entry.dtype)


def _runs(steps: Iterable[Step]) -> Iterator[list[Step]]:
    """Yield the copied steps, those together whose bytes lie side by side in the source and in the output."""
    run: list[Step] = []
    for step in steps:
        if run and not (_is_copied(step) and _follows(run[-1], step)):
            yield run
            run = []
        if _is_copied(step):
            run.append(step)
    if run:
        yield run


def _follows(previous: Step, step: Step) -> bool:
    """Whether `step` lies right behind `previous` in the source as it does in the output."""
    end = previous.source.offset + previous.source.byte_count
    return step.source.path == previous.source.path and step.source.offset == end
