"""Which output shards need not be made: links to the base's, and those that the replaced output holds already."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path

from rawmerge.computing.losses import Losses
from rawmerge.inputs.file_status import FileStatus, file_status
from rawmerge.merge_plan import MergePlan, ShardPlan
from rawmerge.output.earlier_output import (
    MadeShard,
    read_made_shards,
    remember_shards,
    reusable_shards,
    statuses,
    take_shard,
)
from rawmerge.output.linking import link_shard
from rawmerge.output.shard_identity import ShardIdentities
from rawmerge.output.shard_journal import ShardJournal
from rawmerge.output.shard_outcome import shard_outcome, updated_names
from rawmerge.output.untouched_shards import untouched_shards
from rawmerge.run_request import RunRequest


@dataclass(slots=True)
class ShardOrigins:
    """Where shards come from that are not made.

    Attributes:
        links: output shard name to the base shard that it will be a link to.
        reused: output shard name to what is remembered of the same shard in the output that is replaced.
        resumed: output shard name to what is remembered of it: finished by a merge that was cut off.
        identities: by what made shards will be remembered; None where nothing is to be.
        journal: where finished shards are noted; None where they are not.
        notes: what became of them that a user may want to know.
    """

    links: dict[str, str] = field(default_factory=dict)
    reused: dict[str, MadeShard] = field(default_factory=dict)
    resumed: dict[str, MadeShard] = field(default_factory=dict)
    identities: ShardIdentities | None = None
    journal: ShardJournal | None = None
    notes: list[str] = field(default_factory=list)

    def byte_count(self, plan: MergePlan) -> int:
        """Return how many bytes of shards take no new space."""
        taken = self.taken_names
        return sum(shard.byte_count for shard in plan.shards if shard.name in taken)

    @property
    def taken_names(self) -> set[str]:
        """Output shards that are not made."""
        return {*self.links, *self.reused, *self.resumed}

    def note_finished(self, shard: ShardPlan, path: Path, changed: Collection[str], losses: Losses) -> None:
        """Note a shard that is durable, if it is sure what it was made from.

        Raises:
            InputChangedError: the adapter is shorter than planned; OSError: a file cannot be read.
        """
        if self.journal is None or self.identities is None:
            return
        digest = self.identities.of_all()[shard.name]
        if self.identities.is_sure(shard.name):
            outcome = shard_outcome(shard, changed, losses)
            self.journal.note(shard.name, MadeShard(digest, file_status(path), *outcome))

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
        """Return the updated tensors of shards that were made before which differ from the base's."""
        made = self.reused | self.resumed
        shards = [shard for shard in plan.shards if shard.name in made]
        return {name for shard in shards for name in updated_names(shard) if name not in made[shard.name].unchanged}

    def losses(self) -> Losses:
        """Return what was lost of the tensors of shards that were made before."""
        made = self.reused | self.resumed
        return reduce(or_, (shard.losses for shard in made.values()), Losses())


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
    request: RunRequest,
    origins: ShardOrigins,
    staged: Mapping[str, FileStatus],
    changed: Collection[str],
    losses: Losses,
) -> None:
    """Remember the shards of a published output, for a merge that will replace it.

    Args:
        request: what was written.
        origins: how its shards came to be.
        staged: shard name to its file's status before it was published; one that was touched since is forgotten.
        changed: updated tensors of which an element differs from the base.
        losses: what rounding left of the delta of each updated tensor, and what casts took from others.
    """
    identities = origins.identities
    if identities is None:
        return
    digests, changed_inputs = identities.of_all(), identities.changed_files()
    published = statuses(request.output, staged)
    made = {
        shard.name: MadeShard(digests[shard.name], published[shard.name], *shard_outcome(shard, changed, losses))
        for shard in request.plan.shards
        if shard.name in published
        and published[shard.name].has_same_content(staged[shard.name])
        and not identities.inputs_of(shard.name) & changed_inputs
    }
    remember_shards(request.output, made)
