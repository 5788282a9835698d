"""Which bytes of a shard are copied as they are, in ranges as long as can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, Step

#: A range is cut into jobs of this size, so that progress moves and threads share the work.
JOB_BYTES: Final = 8 * 2**20


@dataclass(slots=True)
class KeptRange:
    """Copied tensors that lie side by side in their source and in the output.

    Attributes:
        steps: their steps, in order.
    """

    steps: list[Step] = field(default_factory=list)

    @property
    def source(self) -> TensorSource:
        """The first tensor's source, at which the range begins."""
        return self.steps[0].source

    @property
    def start(self) -> int:
        """Where it begins in the output, from the first tensor byte on."""
        return self.steps[0].entry.start

    @property
    def byte_count(self) -> int:
        """How long it is."""
        return sum(step.source.byte_count for step in self.steps)

    @property
    def last_name(self) -> str:
        """Name of its last tensor."""
        return self.steps[-1].entry.name

    def takes(self, step: Step) -> bool:
        """Whether `step` lies right behind the range in the source, as it does in the output."""
        last = self.steps[-1].source
        return step.source.path == last.path and step.source.offset == last.offset + last.byte_count


def is_copied(step: Step) -> bool:
    """Whether a step's bytes go to the output as they are."""
    return isinstance(step, KeepTensor) or (
        isinstance(step, ReplaceTensor) and step.source.dtype == step.entry.dtype and not step.held_dtype
    )


def kept_ranges(steps: Iterable[Step]) -> Iterator[KeptRange | Step]:
    """Yield the steps in order, copied ones joined where their bytes lie side by side."""
    kept = KeptRange()
    for step in steps:
        if kept.steps and not (is_copied(step) and kept.takes(step)):
            yield kept
            kept = KeptRange()
        if is_copied(step):
            kept.steps.append(step)
        else:
            yield step
    if kept.steps:
        yield kept


def whole_source(steps: Iterable[Step], data_start: int) -> str:
    """Return the base shard that holds all kept tensors at the places where the output has them; empty for none.

    A clone of that file needs nothing but its header and its other tensors written.
    """
    kept = [step for step in steps if isinstance(step, KeepTensor)]
    paths = {step.source.path for step in kept}
    if len(paths) != 1 or any(step.source.offset != data_start + step.entry.start for step in kept):
        return ""
    return paths.pop()
