"""Which output shards need not be made: links to the base's, and those that the replaced output holds already."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rawmerge.inputs.file_status import FileStatus
from rawmerge.merge_plan import MergePlan
from rawmerge.output.earlier_output import (
    MadeShard,
    read_made_shards,
    remember_shards,
    reusable_shards,
    statuses,
    take_shard,
)
from rawmerge.output.linking import link_shard
from rawmerge.output.outcome import updated_names
from rawmerge.output.shard_identity import ShardIdentities
from rawmerge.output.untouched_shards import untouched_shards
from rawmerge.run_request import RunRequest


@dataclass(slots=True)
class ShardOrigins:
    """Where shards come from that are not made.

    Attributes:
        links: output shard name to the base shard that it will be a link to.
        reused: output shard name to what is remembered of the same shard in the output that is replaced.
        identities: by what made shards will be remembered; None where nothing is to be.
        notes: what became of them that a user may want to know.
    """

    links: dict[str, str] = field(default_factory=dict)
    reused: dict[str, MadeShard] = field(default_factory=dict)
    identities: ShardIdentities | None = None
    notes: list[str] = field(default_factory=list)

    def byte_count(self, plan: MergePlan) -> int:
        """Return how many bytes of shards take no new space."""
        return sum(shard.byte_count for shard in plan.shards if shard.name in self.links or shard.name in self.reused)

    def take(self, output: Path, folder: Path) -> None:
        """Put the shards in `folder`, the new output; one that cannot be linked is dropped here, so that it is made.

        Raises:
            OSError: a file operation failed.
        """
        for name, source in list(self.links.items()):
            if note := link_shard(source, folder / name):
                self.notes.append(note)
                del self.links[name]
        for name, shard in list(self.reused.items()):
            if not take_shard(output, name, shard, folder):
                del self.reused[name]

    def changed_names(self, plan: MergePlan) -> set[str]:
        """Return the updated tensors of reused shards that differ from the base's."""
        reused = [shard for shard in plan.shards if shard.name in self.reused]
        return {
            name for shard in reused for name in updated_names(shard) if name not in self.reused[shard.name].unchanged
        }


def find_origins(request: RunRequest) -> ShardOrigins:
    """Return which shards need not be made.

    The adapter is read where the output is replaced and was made here.

    Raises:
        InputChangedError: the adapter is shorter than planned; OSError: it cannot be read.
    """
    plan, options, origins = request.plan, request.options, ShardOrigins()
    if options.link:
        origins.links = untouched_shards(plan)
        if not origins.links:
            origins.notes.append("nothing was linked: the merge leaves no shard of the base as it is")
    with contextlib.suppress(OSError):  # an input that is gone is told of later
        origins.identities = ShardIdentities(plan, options)
    if options.overwrite and options.reuse and origins.identities and (made := read_made_shards(request.output)):
        found = reusable_shards(request.output, origins.identities.of_all(), made)
        origins.reused = {name: shard for name, shard in found.items() if name not in origins.links}
    return origins


def remember_output(
    request: RunRequest, origins: ShardOrigins, staged: Mapping[str, FileStatus], unchanged: set[str]
) -> None:
    """Remember the shards of a published output, for a merge that will replace it.

    Args:
        request: what was written.
        origins: how its shards came to be.
        staged: shard name to its file's status before it was published; one that was touched since is forgotten.
        unchanged: updated tensors of which no element differs from the base.
    """
    identities = origins.identities
    if identities is None:
        return
    digests, changed_inputs = identities.of_all(), identities.changed_files()
    published = statuses(request.output, staged)
    made = {
        shard.name: MadeShard(
            digests[shard.name],
            published[shard.name],
            tuple(name for name in updated_names(shard) if name in unchanged),
        )
        for shard in request.plan.shards
        if shard.name in published
        and published[shard.name].has_same_content(staged[shard.name])
        and not identities.inputs_of(shard.name) & changed_inputs
    }
    remember_shards(request.output, made)
