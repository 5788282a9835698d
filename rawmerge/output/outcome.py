"""What becomes of a plan's tensors: how many of each kind, and whether the merge changed anything at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path

from rawmerge.computing.survival import Survival
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, UpdateTensor


@dataclass(frozen=True, slots=True)
class Written:
    """What a run did beyond its plan.

    Attributes:
        unchanged: updated tensors of which no element changed.
        survivals: what rounding left of the delta of each updated tensor.
        linked: shards that are links to the base's; reused: those taken from the replaced output; resumed: those that
            a merge that was cut off had finished; consumed: base shards that were deleted.
        spared_bytes: of shards that this run did not write: links, reused, or finished by an earlier run.
        notes: what a user may want to know.
    """

    unchanged: tuple[str, ...]
    survivals: Mapping[str, Survival] = field(default_factory=dict)
    linked: int = 0
    reused: int = 0
    resumed: int = 0
    consumed: int = 0
    spared_bytes: int = 0
    notes: tuple[str, ...] = ()


def count_steps(plan: MergePlan) -> dict[str, int]:
    """Return how many output tensors are `kept`, `updated`, `cast`, `replaced` and `added` from the adapter."""
    counts = Counter({"kept": 0, "updated": 0, "cast": 0, "replaced": 0, "added": 0})
    for step in plan.steps():
        match step:
            case KeepTensor():
                counts["kept"] += 1
            case ReplaceTensor(base=None):
                counts["added"] += 1
            case ReplaceTensor() | UpdateTensor(updates=(), overlay=TensorSource()):
                counts["replaced"] += 1
            case UpdateTensor(updates=()):
                counts["cast"] += 1
            case UpdateTensor():
                counts["updated"] += 1
    return dict(counts)


def updated_names(shard: ShardPlan) -> tuple[str, ...]:
    """Return the shard's tensors that are updated, in file order."""
    return tuple(step.entry.name for step in shard.steps if isinstance(step, UpdateTensor) and step.updates)


def shard_outcome(
    shard: ShardPlan, changed: Collection[str], survivals: Mapping[str, Survival]
) -> tuple[tuple[str, ...], dict[str, Survival]]:
    """Return the updated tensors of a shard that did not change, and what rounding left of the others' deltas.

    Args:
        shard: the plan of the shard.
        changed: updated tensors, of any shard, of which at least one element differs from the base.
        survivals: what was measured, of any shard.
    """
    names = updated_names(shard)
    unchanged = tuple(name for name in names if name not in changed)
    return unchanged, {name: survivals[name] for name in names if name in survivals}


def has_other_tensors(plan: MergePlan) -> bool:
    """Whether the output has rows laid over the base's, or copies of its layers, whatever their values."""
    steps = list(plan.steps())
    overlaid = any(isinstance(step, UpdateTensor) and step.overlay for step in steps)
    copied = Counter((step.source.path, step.source.offset) for step in steps if step.source.byte_count)
    return overlaid or any(count > 1 for count in copied.values())


def replacement_differs(shard: ShardPlan, folder: Path) -> bool:
    """Whether a tensor that came from the adapter differs from the base's.

    Args:
        shard: the plan of the shard.
        folder: where it was written.

    Raises:
        InputChangedError: a file is shorter than planned; OSError: it cannot be read.
    """
    with OpenFiles() as files:
        for step in shard.steps:
            if isinstance(step, ReplaceTensor):
                if step.base is None or step.entry.shape != step.base.shape:
                    return True
                written = replace(step.base, path=str(folder / shard.name), offset=shard.data_start + step.entry.start)
                is_cast = step.entry.dtype != step.base.dtype
                if is_cast or not all(map(eq, files.chunks(written), files.chunks(step.base))):
                    return True
    return False
