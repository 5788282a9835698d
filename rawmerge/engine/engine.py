"""Moves the bytes that a plan decided on: a few threads, each taking whole jobs (a copied range, a tile).

Reading, computing and writing overlap because every job does all three and the threads are at different ones. A
job's bytes depend on nothing but its own range, so their order and number change no bit of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rawmerge.computing.cast_loss import CastLoss
from rawmerge.computing.computers import Computers, StepComputer
from rawmerge.computing.losses import Losses
from rawmerge.computing.step_paths import StepPaths
from rawmerge.computing.survival import Survival
from rawmerge.engine.anonymous_memory import PAGE_BYTES
from rawmerge.engine.jobs import Job, ProgressCallback, RunningJobs, ShardInWork
from rawmerge.engine.kept_ranges import JOB_BYTES, KeptRange, is_copied, kept_ranges, whole_source
from rawmerge.engine.page_edges import cut_at_pages
from rawmerge.engine.shard_target import ShardTarget
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.engine.write_behind import WriteBehind
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.memory.budget import MemoryBudget, default_threads
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, ShardPlan, Step, UpdateTensor
from rawmerge.run_options import RunOptions

if TYPE_CHECKING:
    from rawmerge.computing.devices import Device


class Engine:
    """Runs shard plans on a pool of threads; one engine serves one merge.

    Attributes:
        changed: names of the updated tensors of which at least one element differs from the base.
        survivals: what the rounding left of each updated tensor's delta, by its name; empty unless that is measured.
        casts: what was taken from each tensor in a cast that may lose something; empty unless that is measured.
        losses: these two together.
    """

    def __init__(  # noqa: PLR0913  # the last four come from as many owners, and have defaults
        self,
        compute_dtype: str,
        total_bytes: int,
        options: RunOptions,
        tile_elements: int = TILE_ELEMENTS,
        *,
        device: Device | None = None,
        budget: MemoryBudget | None = None,
        paths: StepPaths | None = None,
        measures: bool = True,
    ) -> None:
        budget = budget or MemoryBudget(options.threads or default_threads(), tile_elements)
        self.changed: set[str] = set()
        self.survivals: dict[str, Survival] = {}
        self.casts: dict[str, CastLoss] = {}
        self.losses = Losses(self.survivals, self.casts)
        self._options = options
        self._threads = budget.threads
        self._total_bytes = total_bytes
        self._tile_elements = budget.tile_elements
        self._behind = WriteBehind(budget.window_bytes)
        self._files = OpenFiles()
        paths = paths or StepPaths(compute_dtype, options)
        self._computers = Computers(compute_dtype, paths, self._files, budget, device, measures=measures)

    def run(self, shards: Iterable[tuple[ShardPlan, ShardTarget]], report: ProgressCallback | None) -> None:
        """Write all shards and make them durable.

        Args:
            shards: the plans and their new files; each file is finished and closed.
            report: called in the calling thread after each job; an exception from it ends the merge.

        Raises:
            MergeError: a tensor is not finite, or an input changed; OSError: a file operation failed.
        """
        with self._files, ThreadPoolExecutor(self._threads) as workers, ThreadPoolExecutor(1) as helper:
            running = RunningJobs(self._total_bytes, report, helper, 2 * self._threads, self._behind.is_on)
            try:
                begun = [running.begin(plan, file) for plan, file in shards]
                self._computers.expect(shard.plan for shard in begun)
                self._run_all(begun, running, workers, helper)
                running.drain()
            except BaseException:
                workers.shutdown(wait=True, cancel_futures=True)
                running.abandon()
                raise
            finally:
                self._computers.restore()

    def _run_all(
        self,
        shards: Sequence[ShardInWork],
        running: RunningJobs,
        workers: ThreadPoolExecutor,
        helper: ThreadPoolExecutor,
    ) -> None:
        """Submit all jobs: those that can do without torch run ahead, while it is imported for the others.

        Only as long as that, so that shards are finished one after the other: what is cut off goes on from them.
        """
        late = {id(shard): [step for step in shard.plan.steps if self._is_late(step)] for shard in shards}
        loading = self._load([step for steps in late.values() for step in steps], helper)
        waiting: list[ShardInWork] = []
        for shard in shards:
            running.submit(workers, shard, self._early_jobs(shard, late[id(shard)]))
            if late[id(shard)]:
                waiting.append(shard)
            else:
                running.end(shard)
            if loading is None or loading.done():
                self._end_all(waiting, late, running, workers, loading)
        self._end_all(waiting, late, running, workers, loading)

    def _end_all(
        self,
        waiting: list[ShardInWork],
        late: Mapping[int, Sequence[Step]],
        running: RunningJobs,
        workers: ThreadPoolExecutor,
        loading: Future[None] | None,
    ) -> None:
        """Submit the rest of the shards' jobs, once torch is there."""
        if loading and waiting:
            loading.result()
        for shard in waiting:
            for step in late[id(shard)]:
                running.submit(workers, shard, self._tile_jobs(step, shard))
            running.end(shard)
        waiting.clear()

    def _is_late(self, step: Step) -> bool:
        return not is_copied(step) and self._computers.needs_torch(step)

    def _load(self, steps: list[Step], helper: ThreadPoolExecutor) -> Future[None] | None:
        """Begin to import torch, if a step needs it."""
        if not steps:
            return None
        if self._options.uses("early-import"):
            return helper.submit(self._computers.load, steps)
        self._computers.load(steps)
        return None

    def _early_jobs(self, shard: ShardInWork, late: Sequence[Step]) -> Iterator[Job]:
        """Write the shard's header, and yield the jobs that need no torch, in file order."""
        plan, file = shard.plan, shard.file
        left = {id(step) for step in late}
        source = whole_source(plan.steps, plan.data_start) if self._options.uses("reflink") else ""
        cloned = source if source and file.clone(self._files, source) else ""
        file.write_header(plan.header_text)
        for steps in kept_ranges(plan.steps):
            if isinstance(steps, KeptRange):
                is_there = steps.source.path == cloned
                yield from [_told_only(steps)] if is_there else self._copy_jobs(steps, shard)
            elif id(steps) not in left:
                yield from self._tile_jobs(steps, shard)

    def _copy_jobs(self, kept: KeptRange, shard: ShardInWork) -> Iterator[Job]:
        """Yield the jobs that copy tensors lying side by side in the source and in the output."""
        source, total = kept.source, kept.byte_count
        target = shard.plan.data_start + kept.start
        for start, count in cut_at_pages(target, total, JOB_BYTES):
            call = self._copy(shard.file, (source.path, source.offset + start), target + start, count)
            yield Job(call, count, kept.last_name)

    def _copy(self, file: ShardTarget, source: tuple[str, int], target: int, count: int) -> Callable[[], None]:
        def call() -> None:
            file.copy_from(self._files, *source, target, count)
            self._behind.wrote(file, count)
            self._behind.read(self._files, *source, count)

        return call

    def _tile_jobs(self, step: Step, shard: ShardInWork) -> Iterator[Job]:
        assert not isinstance(step, KeepTensor)
        computer = self._computers.computer(step)
        target, row_bytes = shard.plan.data_start + step.entry.start, computer.row_bytes
        for first, count in computer.tiles(self._tile_elements):
            call = self._tile(computer, shard.file, (first, count), target + first * row_bytes, step)
            yield Job(call, count * row_bytes, step.entry.name)

    def _tile(
        self,
        computer: StepComputer,
        file: ShardTarget,
        rows: tuple[int, int],
        target: int,
        step: UpdateTensor | ReplaceTensor,
    ) -> Callable[[], None]:
        def call() -> None:
            result = computer.compute(*rows, target % PAGE_BYTES)
            size = rows[1] * computer.row_bytes
            if computer.is_placed:
                file.write_placed(target, size, result)
            else:
                file.write_at(target, result)
            self._behind.wrote(file, size)
            self._behind.read_rows(self._files, step.source, rows, step.entry.byte_count // computer.row_bytes)
            if computer.changed:
                self.changed.add(step.entry.name)
            loss = computer.tally.finish(rows[1]) if computer.tally else None
            if isinstance(loss, CastLoss):
                self.casts[step.entry.name] = loss
            elif loss:
                self.survivals[step.entry.name] = loss

        return call


def _told_only(kept: KeptRange) -> Job:
    """Return a job that finishes what a clone holds already."""
    return Job(lambda: None, kept.byte_count, kept.last_name)
