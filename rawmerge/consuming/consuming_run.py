"""Runs a plan shard by shard, and deletes each base shard once its successor is durable.

What can be relied on:

- Every byte of the base is, at any moment, on the disk in the base or, merged, in the output's working folder
  (`rawmerge.consuming.unfinished`). A base shard goes only after every shard that reads it has been fsynced with its
  name, the journal says so, and the merge has changed something.
- After a crash, an error, or Ctrl-C the same command goes on and gives the bytes of a merge that was never cut off;
  where that is not sure, it is refused. Before the first deletion an error leaves nothing behind, and the base whole.
- What a plan cannot tell, values that allow no merge, ends the merge when part of the base may be gone. To look for
  them beforehand would take as long as merging; the error and the journal say that going on would fail again.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rawmerge.byte_sizes import format_bytes
from rawmerge.consuming.consumption import Consumption, plan_consumption
from rawmerge.consuming.consumption_check import check_consumption
from rawmerge.consuming.journal import JOURNAL_NAME, Journal, drop_half_line
from rawmerge.consuming.resumption import begin, check_resumption, deletable_files, is_file_of, needed_base_files
from rawmerge.consuming.unfinished import UnfinishedFolder, unfinished_folder
from rawmerge.errors import NothingChangedError, OutputError, ProblemCollector, UnfitValuesError, quote
from rawmerge.inputs.input_check import check_inputs
from rawmerge.merge_plan import ShardPlan
from rawmerge.output.manifest import MANIFEST_NAME
from rawmerge.output.outcome import Written, has_other_tensors, replacement_differs
from rawmerge.output.output_directory import check_space, long_names
from rawmerge.output.shard_outcome import shard_outcome, updated_names
from rawmerge.output.small_files import complete_record, write_small_files
from rawmerge.output.staging_directory import (
    StagingDirectory,
    hidden_beside,
    make_folders,
    remove_folders,
    sync_directory,
)
from rawmerge.run_request import RunRequest
from rawmerge.shard_run import ShardRun


def consume_base(request: RunRequest) -> Written:
    """Write and publish the output, the base giving way to it; or go on where that was cut off.

    Args:
        request: what to write; the output has been checked.

    Raises:
        OutputError: another process is at it, or it cannot go on.
        MergeError: the inputs changed, or the merge failed; OSError: a file operation did. Nothing was published, and
            where base shards were deleted a note of the error says how to go on.
    """
    folder = unfinished_folder(request.output)
    created: list[Path] = []
    try:
        make_folders(folder.path.parent, created)
        with folder.locked():
            notes = _without_plain(request.output)
            written = _run(request, folder)
            return replace(written, notes=(*notes, *written.notes))
    finally:
        remove_folders(created)


def _without_plain(output: Path) -> list[str]:
    """Remove what a merge to the same output that left its base alone had finished; its disk space is wanted."""
    hidden = hidden_beside(output)
    if not os.path.lexists(hidden):
        return []
    with StagingDirectory(output):
        pass  # which is removed on leaving it
    return [f"{quote(hidden)}, which a merge without --consume-base that was cut off had left, was cleared"]


def was_published(request: RunRequest) -> bool:
    """Whether this very merge was cut off when its output had been published already.

    Raises:
        OutputError: the journal of the output cannot be read.
    """
    folder = unfinished_folder(request.output)
    journal = folder.journal()
    return bool(journal and journal.beginning.plan == request.plan and folder.is_published(journal))


def check_consuming(request: RunRequest, folder: Path) -> list[str]:
    """Refuse to consume the base, as far as it can be known before.

    Args:
        request: the merge.
        folder: an existing one on the output's file system.

    Returns:
        What would be deleted and how much space it takes, in lines for people.

    Raises:
        OutputError: with all reasons.
    """
    working, problems = unfinished_folder(request.output), ProblemCollector()
    journal = working.check(request.plan, consumes=True)
    if journal and working.is_published(journal):
        return [f"the output is published already; {quote(working.path)} would be removed"]
    journal = _fitting(journal, request, working) if journal else None
    consumption = plan_consumption(request.plan, journal.finished if journal else ())
    paths = deletable_files(journal, consumption)
    with problems.absorb():
        check_consumption(request.plan, paths, folder, links=request.options.link)
    problems.add(OutputError, long_names(folder, [working.path.name]))
    with problems.absorb():
        check_space(request.output, consumption.peak - _reclaimed(journal, consumption, working))
    problems.raise_if_any()
    after = ((path, name) for name, paths in consumption.frees.items() for path in paths)
    return [
        *([f"it goes on from {quote(working.path)}: {_count(len(journal.finished))} finished"] if journal else []),
        *(f"{path} is deleted once {name} is written" for path, name in after if path in paths),
        f"at most {format_bytes(consumption.peak)} more than now are taken at any time",
    ]


def _run(request: RunRequest, folder: UnfinishedFolder) -> Written:
    journal = folder.check(request.plan, consumes=True)
    try:
        journal = _fitting(journal, request, folder) if journal else None
        if journal:
            drop_half_line(journal)
        run = _ConsumingRun(request, folder, journal or _begun(request, folder))
        if not folder.is_published(run.journal):
            run.write()
    except BaseException as error:
        _leave(folder, error)
        raise
    folder.remove()
    return run.written()


def _fitting(journal: Journal, request: RunRequest, folder: UnfinishedFolder) -> Journal | None:
    """Return the journal if the merge can go on from it; None where it starts over, with the base still whole."""
    try:
        if not folder.is_published(journal):
            check_resumption(journal, request.options, folder.staged)
    except OutputError:
        if journal.deleted:
            raise
        return None
    return journal


def _reclaimed(journal: Journal | None, consumption: Consumption, folder: UnfinishedFolder) -> int:
    """Return how many bytes an earlier run has left that go before the first shard is written."""
    if not os.path.exists(folder.staged):  # noqa: PTH110  # false for a name that no file can have
        return 0
    finished = journal.finished if journal else {}
    halves = [folder.staged / shard.name for shard in consumption.order if shard.name not in finished]
    due = [Path(path) for name in finished for path in consumption.frees[name]]
    return sum(path.stat().st_size for path in (*halves, *due) if path.exists())


def _begun(request: RunRequest, folder: UnfinishedFolder) -> Journal:
    folder.clear()
    journal = Journal(folder.path / JOURNAL_NAME, begin(request.plan, request.options))
    check_inputs(request.plan.base_files, request.plan.adapter_files)
    journal.begin()
    return journal


def _leave(folder: UnfinishedFolder, error: BaseException) -> None:
    """Remove the folder of a merge that failed, unless it holds what is nowhere else."""
    try:
        journal = folder.journal()
    except OutputError:  # it cannot be read, so nobody knows what it holds
        return
    if journal and journal.deleted:
        error.add_note(_state(folder, journal, error))
    else:
        folder.remove()


def _state(folder: UnfinishedFolder, journal: Journal, error: BaseException) -> str:
    """Return what holds after base shards were deleted, and how to get a merged model all the same."""
    state = f"{_count(len(journal.deleted))} deleted from the base, and merged in {quote(folder.path)}"
    if not isinstance(error, UnfitValuesError):
        return f"{state}: run the same command again to go on"
    with suppress(OSError):  # it only says so to whoever tries another merge
        journal.fail(error.tensor_name)
    return (
        f"{state}; the same command would fail again at the same tensor, and no other can go on. What is left: fetch "
        "the base again, remove that folder, and merge anew with another adapter or --dtype, without --consume-base, "
        "so that a failure leaves the base whole"
    )


def _count(shards: int) -> str:
    return "1 shard is" if shards == 1 else f"{shards} shards are"


class _ConsumingRun:
    def __init__(self, request: RunRequest, folder: UnfinishedFolder, journal: Journal) -> None:
        self.journal = journal
        self._request = request
        self._plan = request.plan
        self._folder = folder
        self._staging = StagingDirectory(request.output, folder.staged)
        self._consumption: Consumption = plan_consumption(request.plan, journal.finished)
        self._changes_anyway = has_other_tensors(request.plan)
        self._spared_bytes = sum(shard.byte_count for shard in request.plan.shards if shard.name in journal.finished)
        self._pending: list[str] = []
        self._notes: list[str] = []

    def write(self) -> None:
        """Write what is not written yet, and publish the output."""
        needed = needed_base_files(self.journal)
        check_inputs([file for file in self._plan.base_files if file.path in needed], self._plan.adapter_files)
        self._prepare()
        with self._request.with_manifest(self._folder.staged) as listed:
            self._write_shards(ShardRun(listed, self._folder.staged))
            if not self._has_changed:
                raise NothingChangedError
            complete_record(self._staging, self.journal.losses)
            if listed.manifest:
                (self._folder.staged / MANIFEST_NAME).unlink(missing_ok=True)  # of a run that was cut off here
                self._staging.write_bytes(MANIFEST_NAME, listed.manifest.raw())
        if self._request.output.exists():  # so what an earlier run was replacing is not needed any more
            shutil.rmtree(self._folder.replaced, ignore_errors=True)
        self._request.signals.let_through()
        self.journal.complete()
        self._staging.publish(self._request.policy)

    def _write_shards(self, run: ShardRun) -> None:
        for shard in self._consumption.order:
            if shard.name in self.journal.finished:
                run.skip(shard)
            else:
                self._make(shard, run)
            self._give_way(shard)

    def written(self) -> Written:
        """Return what was done, by this run and by those before it."""
        unchanged = [name for shard in self._plan.shards for name in self.journal.finished[shard.name]]
        deleted = len(self.journal.deleted)
        left = f"{quote(self._plan.base_root)} is no checkpoint any more: {_count(deleted)} deleted"
        losses = self.journal.losses
        return Written(
            tuple(unchanged), losses, consumed=deleted, spared_bytes=self._spared_bytes, notes=(*self._notes, left)
        )

    @property
    def _has_changed(self) -> bool:
        return self._changes_anyway or self.journal.has_changed

    def _prepare(self) -> None:
        """Leave of an earlier run what is durable, and write all files but the shards.

        They come first: once a base shard is gone, nothing but the shards may stand between the merge and its end.
        """
        staged = self._folder.staged
        if not self.journal.is_prepared:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            sync_directory(staged.parent)
            write_small_files(self._plan, self._staging, self._request.options.device)
            self._staging.sync()
            self.journal.prepared()
        for shard in self._plan.shards:
            if shard.name not in self.journal.finished:
                (staged / shard.name).unlink(missing_ok=True)

    def _make(self, shard: ShardPlan, run: ShardRun) -> None:
        run.make([shard])
        self._staging.sync()
        unchanged, losses = shard_outcome(shard, run.changed, run.losses)
        # now, for the base's tensors that were replaced may be gone later
        changes = len(unchanged) < len(updated_names(shard)) or replacement_differs(shard, self._folder.staged)
        self.journal.finish(shard.name, unchanged, losses, changes=changes)

    def _give_way(self, shard: ShardPlan) -> None:
        """Delete the base shards that nothing reads any more, now that `shard` is durable."""
        self._pending.extend(self._consumption.frees[shard.name])
        if not self._has_changed:
            return
        for path in self._pending:
            if is_file_of(self.journal.beginning.base[path], path):
                if path not in self.journal.deleted:
                    self.journal.delete(path, shard.name)
                Path(path).unlink()
            elif path not in self.journal.deleted:
                self._notes.append(f"{quote(path)} was not deleted: it is no longer the file that was merged")
        self._pending.clear()
