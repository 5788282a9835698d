"""What a verification found, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rawmerge.errors import Problem

#: How the note begins of a verification without base and adapter, before what is said of the values.
NOT_REPLAYED: Final = "base and adapter were not given: values were "


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How one tensor of an output differs from what it should be.

    Attributes:
        name: the tensor.
        is_updated: whether the adapter changes or replaces it; else it should have the base's values, cast at most.
        element_count: its elements.
        differing: how many of them have other bits.
        max_ulps: largest distance, in units in the last place of the larger of the expected value and the base's;
            infinity where one of the two is not finite; 0 for dtypes that are no plain floats.
        scale: what the adapter's delta was multiplied by, to fit best; None where that cannot be told.
        is_explained: whether that factor explains the differences, but for rounding.
        error: the norm of what is wrong, over the norm of the delta, where it differs.
        alignment: how much the differences go along with the delta, from 1 (all in its direction) over 0 (half of them)
            to -1 (all against it). Another scale gives 1 or -1, for rounding keeps the order of values.
        bare: the share (0 to 1) of the elements that differ which have the base's value.
        equals_base: whether every element that was looked at has the base's bits: the delta is not there.
    """

    name: str
    is_updated: bool
    element_count: int
    differing: int
    max_ulps: float
    scale: float | None = None
    is_explained: bool = False
    error: float = 0.0
    alignment: float = 0.0
    bare: float = 0.0
    equals_base: bool = False


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification compared, and what it found.

    Attributes:
        output: the checkpoint that was verified.
        replayed: whether every tensor was computed again from base and adapter; else only the output was looked at.
        tensor_count: tensors compared; element_count: their elements.
        findings: what is wrong, each with subject, expected, found and what it probably means; empty for a good output.
        differences: every tensor whose bits differ, those within the tolerance included.
        notes: what a user may want to know, and what was not compared.
    """

    output: str
    replayed: bool
    tensor_count: int
    element_count: int
    findings: tuple[Problem, ...]
    differences: tuple[TensorDifference, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def is_equal(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings
