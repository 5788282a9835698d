"""The magnitude from which on a tensor's largest elements are kept, found in passes. Importing it imports torch.

The bits of floats that are not negative are ordered as the floats are. So a pass counts the elements by their 16 upper
bits, which tells those of the one that is looked for, and each further pass the next 16 of those that have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import torch

#: Bits that a pass tells.
_DIGIT: Final = 16
_INTEGERS: Final = {torch.float32: torch.int32, torch.float64: torch.int64}

#: Goes over a tensor's elements once, in parts of any shape.
Pass: TypeAlias = Callable[[], Iterator[torch.Tensor]]


def kth_magnitude(elements: Pass, k: int, dtype: torch.dtype) -> float:
    """Return the k-th largest magnitude, exactly, in memory that does not depend on the tensor's size.

    Args:
        elements: gives the same elements each time; NaN is larger than infinity.
        k: from 1 to the number of elements.
        dtype: theirs, float32 (two passes) or float64 (four).
    """
    digits: int | None = None
    for shift in reversed(range(0, 8 * dtype.itemsize, _DIGIT)):
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for part in elements():
            counts += _counts(part.abs().view(_INTEGERS[dtype]), shift, digits)
        so_far = counts.flip(0).cumsum(0)  # elements whose digit is at least so large, from the largest digit down
        place = int(torch.searchsorted(so_far, k))
        digit = len(counts) - 1 - place
        k -= int(so_far[place] - counts[digit])
        digits = digit if digits is None else digits << _DIGIT | digit
    return torch.tensor(digits, dtype=_INTEGERS[dtype]).view(dtype).item()


def _counts(bits: torch.Tensor, shift: int, digits: int | None) -> torch.Tensor:
    """Return how many elements have which 16 bits at `shift`, int64 (2^16); of those only that have `digits` above."""
    upper = bits >> shift
    found = upper if digits is None else upper[upper >> _DIGIT == digits] & (2**_DIGIT - 1)
    return torch.bincount(found.reshape(-1), minlength=2**_DIGIT)
