"""Which shards of a merge that was cut off the next one takes over.

Two things vouch for a shard. In the same run of the system, the system itself: the file has the status that it had when
it was durable, and inputs, options and program are those that made it. After a restart, or where the system has no name
for the time since it was started, nothing does: then every byte is computed again and compared, which still spares the
writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rawmerge._version import __version__
from rawmerge.engine.archived_shard import in_format
from rawmerge.engine.engine import Engine
from rawmerge.errors import printable, quote
from rawmerge.inputs.file_status import file_status
from rawmerge.merge_plan import ShardPlan
from rawmerge.output.earlier_output import MadeShard, is_as_made
from rawmerge.output.record import options_record
from rawmerge.output.same_shard import SameShard
from rawmerge.output.shard_file import is_shard_file
from rawmerge.output.shard_identity import ShardIdentities
from rawmerge.output.shard_journal import EarlierRun, boot_id, read_earlier_run
from rawmerge.output.shard_outcome import measured_names, shard_outcome
from rawmerge.output.staging_directory import STAGED_NAME, hidden_beside
from rawmerge.run_request import RunRequest
from rawmerge.versions import installed_version


@dataclass(frozen=True, slots=True)
class FinishedShards:
    """What is taken over.

    Attributes:
        shards: output shard name to what is remembered of it.
        reason: why it is not more, for people; empty where an earlier merge left nothing.
    """

    shards: Mapping[str, MadeShard]
    reason: str = ""


def find_finished(
    request: RunRequest, hidden: Path, staged: Path, identities: ShardIdentities, names: Iterable[str]
) -> FinishedShards:
    """Return which shards need not be made, for they are there; what an earlier boot left is compared byte by byte.

    Args:
        request: the merge.
        hidden: the folder beside the output, of which this process holds the lock.
        staged: the output in it.
        identities: of the plan's shards.
        names: of those that are to be made.

    Raises:
        MergeError: a tensor cannot be computed, or an input changed; OSError: a file cannot be read.
    """
    earlier = read_earlier_run(hidden)
    if not request.options.resume:
        return FinishedShards({}, "as --no-resume (resume=False) asks")
    if earlier is None:
        return FinishedShards({}, "it says nothing of its shards")
    whole = _whole_shards(request, staged, names)
    if _is_of_this_boot(earlier):
        found = _untouched_shards(earlier, staged, identities, whole)
    else:
        found = _equal_shards(request, staged, identities, whole)
    is_all = len(found) == len(earlier.shards)
    return FinishedShards(found, "" if found and is_all else _reason(earlier, request))


def finished_lines(request: RunRequest, identities: ShardIdentities, names: Iterable[str]) -> Iterator[str]:
    """Yield what becomes of what a merge to this output that was cut off has left, for people; nothing is changed.

    Args:
        request: the merge.
        identities: of the plan's shards.
        names: of those that are to be made.
    """
    hidden = hidden_beside(request.output)
    earlier = read_earlier_run(hidden)
    if not hidden.exists():
        return
    if earlier is None or not request.options.resume:
        yield f"{quote(hidden)}, which a merge that was cut off left, is cleared"
    elif _is_of_this_boot(earlier):
        staged = hidden / STAGED_NAME
        found = _untouched_shards(earlier, staged, identities, _whole_shards(request, staged, names))
        lost = len(earlier.shards) - len(found)
        if found:
            yield f"{len(found)} of {len(request.plan.shards)} shards were finished by a merge that was cut off"
        if lost or not found:
            yield f"{lost} shards that a merge that was cut off had finished are made anew: {_reason(earlier, request)}"
    else:
        yield f"shards in {quote(hidden)} are computed again, and taken over where they are the same"


def _is_of_this_boot(earlier: EarlierRun) -> bool:
    """Whether the system has run since without a restart."""
    return bool(earlier.boot) and earlier.boot == boot_id()


def _whole_shards(request: RunRequest, staged: Path, names: Iterable[str]) -> list[ShardPlan]:
    wanted = set(names)
    return [shard for shard in request.plan.shards if shard.name in wanted and _is_whole(staged / shard.name, shard)]


def _is_whole(path: Path, shard: ShardPlan) -> bool:
    """Whether a file of no other name has a shard's size and header."""
    try:
        if path.is_symlink() or path.stat().st_nlink != 1:
            return False
        return is_shard_file(path, shard)
    except OSError:
        return False


def _untouched_shards(
    earlier: EarlierRun, staged: Path, identities: ShardIdentities, shards: Iterable[ShardPlan]
) -> dict[str, MadeShard]:
    """Return which shards are as they were noted, and would be made from the same in the same way."""
    noted = earlier.shards
    digests = identities.of_all()
    return {
        shard.name: noted[shard.name]
        for shard in shards
        if shard.name in noted
        and noted[shard.name].losses.names == set(measured_names(shard))
        and noted[shard.name].identity == digests[shard.name]
        and is_as_made(staged / shard.name, noted[shard.name].status)
        and identities.is_sure(shard.name)
    }


def choices_of(request: RunRequest) -> dict[str, str]:
    """Return inputs and options by names that users know, to tell them what is another."""
    plan, options = request.plan, request.options
    chosen = {f"--{name.replace('_', '-')}": str(value) for name, value in options_record(plan.options).items()}
    return {
        "BASE": printable(os.path.realpath(plan.base_root)),
        "ADAPTER": printable(", ".join(os.path.realpath(adapter.root) for adapter in plan.adapters)),
        **chosen,
        "--device": options.device,
        "--without": ", ".join(sorted(options.without)) or "nothing",
        "rawmerge": __version__,
        "torch": installed_version("torch"),
    }


def _reason(earlier: EarlierRun, request: RunRequest) -> str:
    now = choices_of(request)
    others = [
        f"{name} was {quote(value)}, now {quote(now.get(name, 'nothing'))}"
        for name, value in earlier.choices.items()
        if now.get(name) != value
    ]
    if not earlier.shards:
        return "it had finished no shard"
    return "; ".join(others) or "inputs, or what was finished, have changed since"


def _equal_shards(
    request: RunRequest, staged: Path, identities: ShardIdentities, shards: list[ShardPlan]
) -> dict[str, MadeShard]:
    """Return which shards hold just what a merge would write."""
    if not shards:
        return {}
    options, total = request.options, request.plan.tensor_bytes
    engine = Engine(
        request.plan.options.compute_dtype,
        total,
        options,
        device=request.device,
        budget=request.budget,
        paths=request.paths,
    )
    with ExitStack() as opened:
        targets = [SameShard(staged / shard.name) for shard in shards]
        for target in targets:
            opened.callback(target.close)
        formed = [in_format(target, staged / shard.name, shard) for shard, target in zip(shards, targets, strict=True)]
        engine.run(zip(shards, formed, strict=True), request.report_to_end)
    digests = identities.of_all()
    return {
        shard.name: MadeShard(
            digests[shard.name],
            file_status(staged / shard.name),
            *shard_outcome(shard, engine.changed, engine.losses),
        )
        for shard, target in zip(shards, targets, strict=True)
        if target.is_same
    }
