"""What a dtype cannot hold: how many values of a tensor, how large, and what would. Importing it imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

import torch

from rawmerge.computing.tensor_reading import torch_dtype
from rawmerge.dtypes import OUTPUT_DTYPES
from rawmerge.errors import NonFiniteTensorError
from rawmerge.formats.shard_header import TensorEntry

_OTHERS: Final = "; the merge ends at the first such tensor, and there may be others"


@dataclass(frozen=True, slots=True)
class Overflow:
    """Values that are finite in the base and come out infinite or NaN.

    Attributes:
        count: how many.
        nans: how many of them come out as NaN.
        largest: the largest magnitude before the rounding of those that do not; infinite where the sum is; 0 for none.
    """

    count: int = 0
    nans: int = 0
    largest: float = 0.0

    def __add__(self, other: Overflow) -> Overflow:
        """Return both together."""
        return Overflow(self.count + other.count, self.nans + other.nans, max(self.largest, other.largest))

    def error(self, entry: TensorEntry, *, is_whole: bool) -> NonFiniteTensorError:
        """Return what to raise for a tensor; `is_whole` says whether all of it was looked at."""
        of = f"{'' if is_whole else 'at least '}{self.count:,} of {prod(entry.shape):,} elements"
        if self.nans:
            return NonFiniteTensorError(
                entry.name,
                entry.dtype,
                f"NaN or inf where the base is finite, in {of}",
                "the values of the adapter, or of the base, may be broken",
            )
        limit = torch.finfo(torch_dtype(entry.dtype)).max
        found = f"inf in {of}: beyond {limit:.6g}, the largest {self.largest:.6g}"
        return NonFiniteTensorError(entry.name, entry.dtype, found, self._way_forward())

    def _way_forward(self) -> str:
        wide = [name for name, code in OUTPUT_DTYPES.items() if self.largest <= torch.finfo(torch_dtype(code)).max]
        if not wide:
            return f"no output dtype holds it: the adapter may be broken{_OTHERS}"
        return f"--dtype {' or '.join(wide)} holds it, or the adapter may be broken{_OTHERS}"


def beyond(values: torch.Tensor, result: torch.Tensor, before: torch.Tensor | None = None) -> Overflow:
    """Return what came out infinite or NaN in the result.

    Args:
        values: just before the rounding, in any float dtype.
        result: the same rounded; shape and device as of `values`.
        before: the same before the updates, where these may have made `values` infinite or NaN; else `values`.
    """
    lost = ~torch.isfinite(result) & torch.isfinite(values if before is None else before)
    nans = int((lost & torch.isnan(result)).sum())
    magnitudes = values[lost & ~torch.isnan(result)].abs()
    largest = float(magnitudes.max()) if len(magnitudes) else 0.0
    return Overflow(int(lost.sum()), nans, largest)
