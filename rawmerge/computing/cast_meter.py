"""Counts what a cast takes, beside the rounding of a tile. Importing it imports torch."""

from __future__ import annotations

from math import isnan
from typing import Final

import torch

from rawmerge.computing.cast_loss import CastLoss, CastTally
from rawmerge.computing.tile_scratch import TileScratch

#: Elements that are looked at together: of fewer, calling torch takes longer than its work; float32 counts so many.
_ELEMENTS: Final = 2**17


class CastMeter:
    """Counts the tiles of one tensor, for any number of threads."""

    def __init__(self, tally: CastTally) -> None:
        """Count nothing yet; `tally` is where the counts go."""
        self._tally = tally

    def measure(self, values: torch.Tensor, rounded: torch.Tensor, scratch: TileScratch) -> None:
        """Count the elements of some rows, each row once.

        Args:
            values: (rows, columns) before the rounding, in float32 or float64, contiguous, in the processor's memory.
            rounded: the same as they are stored; none is infinite or NaN where the value is not.
            scratch: the calling thread's buffers.
        """
        flat, stored = values.view(-1), rounded.view(-1)
        for first in range(0, len(flat), _ELEMENTS):
            part = slice(first, first + _ELEMENTS)
            self._tally.add(_loss(flat[part], stored[part], scratch, self._tally.dtype))


def _loss(values: torch.Tensor, stored: torch.Tensor, scratch: TileScratch, dtype: str) -> CastLoss:
    """Return the loss of at most `_ELEMENTS` values, made in memory that is there; sums of floats count fastest."""
    count = len(values)
    wide, error, is_rounded = (scratch.tensor(f"cast {place}", (1, count), values.dtype)[0] for place in range(3))
    if torch.equal(wide.copy_(stored), values):
        return CastLoss(dtype, count)
    torch.sub(wide, values, out=error).div_(values)
    largest = _largest(error)
    rounded = int(torch.ne(error, 0, out=is_rounded).sum())
    limit = torch.finfo(stored.dtype).smallest_normal
    low = int(torch.dot(torch.lt(wide.abs_(), limit, out=wide), is_rounded))
    zeroed = int(torch.dot(torch.eq(stored, 0, out=wide), is_rounded)) if low else 0
    if zeroed:  # of which each error is -1, and would hide the others'
        largest = _largest(error.addcmul_(wide, is_rounded))
    return CastLoss(dtype, count, rounded, zeroed, low - zeroed, largest)


def _largest(error: torch.Tensor) -> float:
    """Return the largest magnitude; NaN, of zeros, infinities and NaN, which are stored as they are, becomes 0."""
    lowest, highest = map(float, torch.aminmax(error))
    if isnan(lowest):  # few tensors hold any
        lowest, highest = map(float, torch.aminmax(error.nan_to_num_(0.0)))
    return max(-lowest, highest)
