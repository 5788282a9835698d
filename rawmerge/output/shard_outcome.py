"""What is remembered of a shard that was made: which tensors did not change, and what was lost of which."""

from __future__ import annotations

from collections.abc import Collection

from rawmerge.computing.cast_steps import loses_in_cast
from rawmerge.computing.losses import Losses
from rawmerge.merge_plan import ShardPlan, UpdateTensor


def updated_names(shard: ShardPlan) -> tuple[str, ...]:
    """Return the shard's tensors that are updated, in file order."""
    return tuple(step.entry.name for step in shard.steps if isinstance(step, UpdateTensor) and step.updates)


def measured_names(shard: ShardPlan) -> tuple[str, ...]:
    """Return the shard's tensors of which a merge tells what was lost, in file order."""
    cast = (step.entry.name for step in shard.steps if loses_in_cast(step))
    return (*updated_names(shard), *cast)


def shard_outcome(shard: ShardPlan, changed: Collection[str], losses: Losses) -> tuple[tuple[str, ...], Losses]:
    """Return the updated tensors of a shard that did not change, and what was lost of the shard's tensors.

    Args:
        shard: the plan of the shard.
        changed: updated tensors, of any shard, of which at least one element differs from the base.
        losses: what was measured, of any shard.
    """
    unchanged = tuple(name for name in updated_names(shard) if name not in changed)
    return unchanged, losses.of(measured_names(shard))
