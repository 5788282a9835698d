"""Runs a plan in a staging directory beside the output: all of it appears at once, or nothing does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from rawmerge.computing.losses import Losses
from rawmerge.errors import NothingChangedError, quote
from rawmerge.inputs.input_check import check_inputs
from rawmerge.output.earlier_output import statuses
from rawmerge.output.finished_shards import FinishedShards, choices_of, find_finished
from rawmerge.output.manifest import MANIFEST_NAME
from rawmerge.output.outcome import Written, has_other_tensors, replacement_differs
from rawmerge.output.shard_journal import ShardJournal, read_earlier_run
from rawmerge.output.shard_origins import ShardOrigins, remember_output
from rawmerge.output.shard_outcome import updated_names
from rawmerge.output.small_files import complete_record, write_small_files
from rawmerge.output.staging_directory import StagingDirectory
from rawmerge.run_request import RunRequest
from rawmerge.shard_run import ShardRun

_Outcome: TypeAlias = tuple[set[str], Losses]


def write_output(request: RunRequest, origins: ShardOrigins) -> Written:
    """Write and publish the output, and remember how its shards were made.

    Args:
        request: what to write; the output has been checked.
        origins: shards that need not be made.

    Raises:
        MergeError: the inputs changed, or the merge failed; OSError: a file operation did; VerificationError: what was
            written is not what was computed. Nothing was published.
    """
    plan = request.plan
    with StagingDirectory(request.output) as staging:
        if request.options.resume and (earlier := read_earlier_run(staging.folder)):
            staging.finished = lambda: earlier.shards  # until it is known what is of use
        check_inputs(plan.base_files, plan.adapter_files)
        notes = _take_up(request, origins, staging)
        with request.with_manifest(staging.path) as listed:
            changed, losses = _write_files(listed, origins, staging)
            complete_record(staging, losses)
            if listed.manifest:
                staging.write_bytes(MANIFEST_NAME, listed.manifest.raw())
        if not (changed or has_other_tensors(plan) or _any_replacement_differs(request, staging.path)):
            raise NothingChangedError
        if request.options.verify:
            from rawmerge.verifying.verification import verify_staged  # few merges need it

            verify_staged(staging.path, plan, request.options, request.report_to_end)
        staged = statuses(staging.path, (shard.name for shard in plan.shards if shard.name not in origins.links))
        request.signals.let_through()
        staging.publish(request.policy)
        remember_output(request, origins, staged, changed, losses)
        unchanged = [name for shard in plan.shards for name in updated_names(shard) if name not in changed]
    return Written(
        tuple(unchanged),
        losses,
        linked=len(origins.links),
        reused=len(origins.reused),
        resumed=len(origins.resumed),
        spared_bytes=origins.byte_count(plan),
        notes=(*notes, *origins.notes),
    )


def _take_up(request: RunRequest, origins: ShardOrigins, staging: StagingDirectory) -> list[str]:
    """Take over what a merge that was cut off had finished, remove what else it left, and note this one's shards.

    Returns:
        What became of it, for people.
    """
    identities = origins.identities
    if identities is None:  # an input is gone, which is told of elsewhere
        staging.finished = tuple
        staging.clear()
        return []
    found = FinishedShards({})
    if staging.has_leftovers:
        names = {shard.name for shard in request.plan.shards} - origins.links.keys() - origins.reused.keys()
        found = find_finished(request, staging.folder, staging.path, identities, names)
        staging.adopt_mode(found.shards)
    now = statuses(staging.path, found.shards)
    origins.resumed = {name: replace(made, status=now[name]) for name, made in found.shards.items() if name in now}
    origins.journal = ShardJournal(staging.folder, choices_of(request), origins.resumed)
    staging.clear(origins.resumed)
    made = [shard for shard in request.plan.shards if shard.name not in origins.taken_names]
    origins.journal.reserve(len(made), sum(len(updated_names(shard)) for shard in made))
    if request.options.resume:
        staging.finished = lambda: origins.journal.finished if origins.journal else ()
    return list(_left_notes(found, staging, len(request.plan.shards)))


def _left_notes(found: FinishedShards, staging: StagingDirectory, shard_count: int) -> Iterator[str]:
    if found.shards:
        others = f"; the others are made anew: {found.reason}" if found.reason else ""
        yield f"{len(found.shards)} of {shard_count} shards were finished by a merge that was cut off{others}"
    elif staging.has_leftovers:
        yield f"{quote(staging.folder)}, which a merge that was cut off had left, was cleared: {found.reason}"


def _write_files(request: RunRequest, origins: ShardOrigins, staging: StagingDirectory) -> _Outcome:
    """Write all files durably; return the updated tensors of which any element changed, and what was lost."""
    # what reads the adapter for checksums is done while the shards wait for the disk
    works = [lambda: write_small_files(request.plan, staging, request.options.device)]
    if origins.identities:
        works.append(origins.identities.prepare)
    with ThreadPoolExecutor(1) as aside:
        beside = [aside.submit(work) for work in works]
        try:
            outcome = _write_shards(request, origins, staging.path)
        except BaseException:
            aside.shutdown(wait=False, cancel_futures=True)
            raise
        for future in beside:
            future.result()
    return outcome


def _write_shards(request: RunRequest, origins: ShardOrigins, folder: Path) -> _Outcome:
    shards = request.plan.shards
    origins.take(request.output, folder)
    run = ShardRun(request, folder, origins.note_finished)
    taken = origins.taken_names
    for shard in shards:
        if shard.name in taken:
            run.skip(shard)
    run.make([shard for shard in shards if shard.name not in taken])
    return run.changed | origins.changed_names(request.plan), origins.losses() | run.losses


def _any_replacement_differs(request: RunRequest, folder: Path) -> bool:
    return any(replacement_differs(shard, folder) for shard in request.plan.shards)
