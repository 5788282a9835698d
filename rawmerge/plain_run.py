"""Runs a plan in a staging directory beside the output: all of it appears at once, or nothing does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rawmerge.errors import NothingChangedError
from rawmerge.inputs.input_check import check_inputs
from rawmerge.output.earlier_output import statuses
from rawmerge.output.manifest import MANIFEST_NAME
from rawmerge.output.outcome import Written, has_other_tensors, replacement_differs, updated_names
from rawmerge.output.shard_origins import ShardOrigins, remember_output
from rawmerge.output.small_files import write_small_files
from rawmerge.output.staging_directory import StagingDirectory
from rawmerge.run_request import RunRequest
from rawmerge.shard_run import ShardRun


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
        check_inputs(plan.base_files, plan.adapter_files)
        with request.with_manifest(staging.path) as listed:
            changed = _write_files(listed, origins, staging)
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
        unchanged = [name for shard in plan.shards for name in updated_names(shard) if name not in changed]
        remember_output(request, origins, staged, set(unchanged))
    return Written(
        tuple(unchanged),
        linked=len(origins.links),
        reused=len(origins.reused),
        spared_bytes=origins.byte_count(plan),
        notes=(*staging.notes, *origins.notes),
    )


def _write_files(request: RunRequest, origins: ShardOrigins, staging: StagingDirectory) -> set[str]:
    """Write all files durably; return the updated tensors of which any element changed."""
    # what reads the adapter for checksums is done while the shards wait for the disk
    works = [lambda: write_small_files(request.plan, staging, request.options.device)]
    if origins.identities:
        works.append(origins.identities.prepare)
    with ThreadPoolExecutor(1) as aside:
        beside = [aside.submit(work) for work in works]
        try:
            changed = _write_shards(request, origins, staging.path)
        except BaseException:
            aside.shutdown(wait=False, cancel_futures=True)
            raise
        for future in beside:
            future.result()
    return changed


def _write_shards(request: RunRequest, origins: ShardOrigins, folder: Path) -> set[str]:
    shards = request.plan.shards
    origins.take(request.output, folder)
    run = ShardRun(request, folder)
    taken = origins.links.keys() | origins.reused.keys()
    for shard in shards:
        if shard.name in taken:
            run.skip(shard)
    run.make([shard for shard in shards if shard.name not in taken])
    return run.changed | origins.changed_names(request.plan)


def _any_replacement_differs(request: RunRequest, folder: Path) -> bool:
    return any(replacement_differs(shard, folder) for shard in request.plan.shards)
