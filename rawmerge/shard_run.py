"""Makes some of a plan's shards with the engine, and tells how far the whole merge is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Final, TypeAlias

from rawmerge.computing.losses import Losses
from rawmerge.engine.archived_shard import in_format
from rawmerge.engine.engine import Engine
from rawmerge.engine.jobs import Progress, ProgressCallback
from rawmerge.engine.shard_target import ShardTarget
from rawmerge.engine.shard_writer import OutputFile
from rawmerge.formats.shard_names import is_pickle
from rawmerge.merge_plan import ShardPlan
from rawmerge.run_request import RunRequest

#: Shards that are open at a time: each takes two descriptors, of which a process may often have 1024.
MOST_OPEN_SHARDS: Final = 128
FinishedCallback: TypeAlias = Callable[[ShardPlan, Path, Collection[str], Losses], None]


class ShardRun:
    """The shards of one merge, made or taken over one after the other.

    Attributes:
        changed: names of the updated tensors of which at least one element differs from the base.
        losses: what rounding left of the delta of each, and what casts took from others.
    """

    def __init__(self, request: RunRequest, folder: Path, finished: FinishedCallback | None = None) -> None:
        """Begin with none.

        Args:
            request: the merge.
            folder: where shards are made.
            finished: called with each shard that is durable, its file, and the two attributes as far as they are
                known, in a thread of the engine.
        """
        self.changed: set[str] = set()
        self.losses = Losses()
        self._compute_dtype = request.plan.options.compute_dtype
        self._options = request.options
        self._device = request.device
        self._budget = request.budget
        self._paths = request.paths
        self._folder = folder
        self._report = request.report
        self._signals = request.signals
        self._manifest = request.manifest
        self._finished = finished
        self._done_bytes = 0
        self._total_bytes = request.plan.tensor_bytes

    def skip(self, shard: ShardPlan) -> None:
        """Tell of a shard that need not be made."""
        self._done_bytes += _tensor_bytes(shard)
        if shard.steps:
            self._tell(Progress(self._done_bytes, self._total_bytes, shard.steps[-1].entry.name, shard.name))

    def make(self, shards: Sequence[ShardPlan]) -> None:
        """Write shards and make them durable.

        Raises:
            MergeError: a tensor is not finite, or an input changed; OSError: a file operation failed.
        """
        for start in range(0, len(shards), MOST_OPEN_SHARDS):
            self._make(shards[start : start + MOST_OPEN_SHARDS])

    def _make(self, shards: Sequence[ShardPlan]) -> None:
        engine = Engine(
            self._compute_dtype,
            self._total_bytes,
            self._options,
            device=self._device,
            budget=self._budget,
            paths=self._paths,
        )
        with ExitStack() as opened:
            engine.run(self._open(shards, opened, engine), self._later_report(self._done_bytes))
        self.changed |= engine.changed
        self.losses |= engine.losses
        self._done_bytes += sum(map(_tensor_bytes, shards))

    def _open(
        self, shards: Sequence[ShardPlan], opened: ExitStack, engine: Engine
    ) -> Iterator[tuple[ShardPlan, ShardTarget]]:
        uses = self._options.uses
        turn = write_turns(self._budget.threads) if self._budget and uses("write-turns") else None
        for shard in shards:
            path = self._folder / shard.name
            file = OutputFile(
                path,
                shard.byte_count,
                preallocates=uses("preallocation"),
                is_direct=uses("direct-io") and not is_pickle(shard.name),  # which is read back for its checksums
                turn=turn,
                finished=partial(self._tell_finished, shard, engine),
            )
            yield shard, in_format(opened.enter_context(file), path, shard)

    def _tell_finished(self, shard: ShardPlan, engine: Engine) -> None:
        if self._manifest:
            self._manifest.add(shard.name)
        if self._finished:
            self._finished(shard, self._folder / shard.name, engine.changed, engine.losses)

    def _later_report(self, before: int) -> ProgressCallback:
        if not before:
            return self._tell
        return lambda at: self._tell(replace(at, done_bytes=before + at.done_bytes))

    def _tell(self, progress: Progress) -> None:
        self._signals.let_through()  # the engine ends on what is raised here
        if self._report:
            self._report(progress)


def write_turns(threads: int) -> Semaphore:
    """Return what lets two thirds of the threads wait for the disk at a time.

    A disk that answers several writes at once, as those of virtual machines do, else lets all threads go at once:
    they compute while it has nothing to do, and then all wait for it.
    """
    return Semaphore(-(-2 * threads // 3))


def _tensor_bytes(shard: ShardPlan) -> int:
    return sum(step.entry.byte_count for step in shard.steps)
