"""Moves the bytes that a plan decided on: a few threads, each taking whole jobs (a copied range, a tile).

Reading, computing and writing overlap because every job does all three and the threads are at different ones. A
job's bytes depend on nothing but its own range, so their order and number change no bit of the output.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rawmerge.jobs import Job, ProgressCallback, RunningJobs, ShardInWork
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, ShardPlan, Step, UpdateTensor, matrix_of
from rawmerge.run_options import RunOptions
from rawmerge.shard_writer import OutputFile
from rawmerge.shared_tensors import SharedTensors, count_uses
from rawmerge.tensor_source import OpenFiles, TensorSource
from rawmerge.tiles import TILE_ELEMENTS

if TYPE_CHECKING:
    import torch

    from rawmerge.blas_threads import BlasThreads
    from rawmerge.tile_computer import TensorComputer, TileScratch

#: A copied range is cut into jobs of this size, so that progress moves and threads share the work.
COPY_BYTES: Final = 32 * 2**20
MAX_THREADS: Final = 4


def default_threads() -> int:
    """Return how many threads a merge uses unless told: the processors it may use, at most four."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, usable)


class Engine:
    """Runs shard plans on a pool of threads; one engine serves one merge.

    Attributes:
        changed: names of the updated tensors of which at least one element differs from the base.
    """

    def __init__(
        self, compute_dtype: str, total_bytes: int, options: RunOptions, tile_elements: int = TILE_ELEMENTS
    ) -> None:
        self.changed: set[str] = set()
        self._compute_dtype = compute_dtype
        self._options = options
        self._threads = options.threads or default_threads()
        self._total_bytes = total_bytes
        self._tile_elements = tile_elements
        self._files = OpenFiles()
        self._shared: SharedTensors[torch.Tensor] = SharedTensors(Counter())
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
            running = RunningJobs(self._total_bytes, report, syncer, limit=2 * self._threads)
            # importing torch takes as long as copying a gigabyte; it starts beside the first ranges
            loading = syncer.submit(self._blas)
            try:
                # what is copied goes first, of all shards, so that nothing waits for torch that does not need it
                begun = [self._begin(plan, file, running, workers) for plan, file in shards]
                self._shared = SharedTensors(count_uses(shard.plan for shard in begun))
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

    def _begin(
        self, plan: ShardPlan, file: OutputFile, running: RunningJobs, workers: ThreadPoolExecutor
    ) -> ShardInWork:
        """Write a shard's header, and submit its copies."""
        shard = running.begin(plan, file)
        file.write_header(plan.header_text)
        for steps in _runs(plan.steps):
            running.submit(workers, shard, self._copy_jobs(steps, plan, file))
        return shard

    def _copy_jobs(self, steps: list[Step], plan: ShardPlan, file: OutputFile) -> Iterator[Job]:
        """Yield the jobs that copy tensors lying side by side in the source and in the output."""
        source, total = steps[0].source, sum(step.source.byte_count for step in steps)
        target = plan.data_start + steps[0].entry.start
        for start in range(0, total, COPY_BYTES):
            count = min(COPY_BYTES, total - start)
            call = self._copy(file, source, start, target, count)
            yield Job(call, count, steps[-1].entry.name)

    def _copy(self, file: OutputFile, source: TensorSource, start: int, target: int, count: int) -> Callable[[], None]:
        return lambda: file.copy_from(self._files, source.path, source.offset + start, target + start, count)

    def _tile_jobs(self, step: Step, plan: ShardPlan, file: OutputFile) -> Iterator[Job]:
        assert not isinstance(step, KeepTensor)
        matrix = matrix_of(step)
        tensor = _Computed(self, step)
        row_bytes = step.entry.byte_count // matrix.rows if matrix.rows else 0
        target = plan.data_start + step.entry.start
        for first, count in matrix.tiles(self._tile_elements):
            call = self._tile(tensor, file, first, count, target + first * row_bytes)
            yield Job(call, count * row_bytes, step.entry.name)

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

        return TensorComputer(step, self._files, self._shared, self._blas(), self._compute_dtype)

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
                with _without_collection():
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


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from searching what an import makes: of torch's time that is a seventh."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
