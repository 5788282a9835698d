"""What becomes of a plan's tensors: how many of each kind, and whether the merge changed anything at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path

from rawmerge.computing.losses import Losses
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, UpdateTensor
from rawmerge.output.shard_file import first_bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What a run did beyond its plan.

    Attributes:
        unchanged: updated tensors of which no element changed.
        losses: what rounding left of the delta of each updated tensor, and what casts took from others.
        linked: shards that are links to the base's; reused: those taken from the replaced output; resumed: those that
            a merge that was cut off had finished; consumed: base shards that were deleted.
        spared_bytes: of shards that this run did not write: links, reused, or finished by an earlier run.
        notes: what a user may want to know.
    """

    unchanged: tuple[str, ...]
    losses: Losses = field(default_factory=Losses)
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
        for step, start in zip(shard.steps, first_bytes(shard), strict=True):
            if isinstance(step, ReplaceTensor):
                if step.base is None or step.entry.shape != step.base.shape:
                    return True
                written = replace(step.base, path=str(folder / shard.name), offset=start)
                is_cast = step.entry.dtype != step.base.dtype
                if is_cast or not all(map(eq, files.chunks(written), files.chunks(step.base))):
                    return True
    return False
