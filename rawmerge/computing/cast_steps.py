"""Which steps of a plan are casts that may lose something."""

from __future__ import annotations

from rawmerge.computing.cast_loss import may_lose
from rawmerge.dtypes import DTYPES
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import KeepTensor, ReplaceTensor, Step, UpdateTensor


def loses_in_cast(step: Step) -> bool:
    """Whether a step only brings values to another dtype, one that lacks some of them; not where it has no element."""
    if isinstance(step, KeepTensor) or 0 in step.entry.shape:
        return False
    if isinstance(step, UpdateTensor):
        return not step.updates and any(_loses(at, step) for at in (step.source, step.overlay))
    return _loses(step.source, step)


def _loses(source: TensorSource | None, step: UpdateTensor | ReplaceTensor) -> bool:
    return any(_may_lose(source, dtype) for dtype in (step.held_dtype, step.entry.dtype) if dtype)


def _may_lose(source: TensorSource | None, dtype: str) -> bool:
    if source is None or source.dtype == dtype:
        return False
    return DTYPES[source.dtype].is_mergeable and DTYPES[dtype].is_mergeable and may_lose(source.dtype, dtype)
