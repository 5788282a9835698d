"""Counts how the elements of one tensor differ from what they should be, piece by piece, in bounded memory.

The scale of the delta is the least-squares fit of (found - base) to (expected - base), over the pieces that differ.
"""

from __future__ import annotations

import threading
from math import inf, isfinite, sqrt

from rawmerge.dtypes import DTYPES
from rawmerge.verifying.findings import TensorDifference
from rawmerge.verifying.piece_sums import PIECE_ELEMENTS, PieceSummers, PieceSums


class TensorTally:
    """The differences of one tensor; pieces may come from any thread."""

    def __init__(
        self, name: str, dtype: str, element_count: int, *, is_updated: bool, summers: PieceSummers | None = None
    ) -> None:
        """Begin with no difference.

        Args:
            name: the tensor.
            dtype: its storage dtype code.
            element_count: its elements.
            is_updated: whether the adapter changes it.
            summers: those that all tensors share; one of its own where None.
        """
        self.name = name
        self._dtype = dtype
        self._element_count = element_count
        self._is_updated = is_updated
        self._differing = 0
        self._max_ulps = 0.0
        # of the wanted change with itself and with the one found, of what is wrong, and of the last places
        self._products = [0.0, 0.0, 0.0, 0.0]
        # elements that differ in the delta's direction, against it, and that have the base's value
        self._counts = [0, 0, 0]
        self._equals_base = is_updated
        self._has_base = True
        self._summers = summers or PieceSummers(1)
        self._adding = threading.Lock()

    @property
    def has_differences(self) -> bool:
        """Whether any element differs."""
        return self._differing > 0

    def add_bytes(self, expected: memoryview, found: memoryview, offset: int) -> None:
        """Count the elements of a piece that may begin and end within one; `offset` is in bytes from the first.

        Elements of less than a byte count by the byte.
        """
        import numpy as np

        item = max(1, DTYPES[self._dtype].bits // 8)
        with self._summers.one():  # as few threads as with sums
            different = np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8)) + offset
            count = len(np.unique(different // item))
        with self._adding:
            self._differing += count
            self._max_ulps = inf if DTYPES[self._dtype].is_mergeable else self._max_ulps  # not measured
            self._equals_base = False

    def add(self, expected: memoryview, found: memoryview, base: memoryview | None, base_dtype: str) -> None:
        """Count the elements of a piece of whole elements, and fit the scale of its delta.

        Args:
            expected: what should be there, in the tensor's dtype.
            found: what is there.
            base: the base's elements at the same place; None where there are none.
            base_dtype: their storage dtype code.
        """
        item, base_item = DTYPES[self._dtype].bits // 8, DTYPES[base_dtype].bits // 8
        for start in range(0, len(expected) // item, PIECE_ELEMENTS):
            end = start + PIECE_ELEMENTS
            place = slice(start * item, end * item)
            before = None if base is None else base[start * base_item : end * base_item]
            with self._summers.one() as summer:
                sums = summer.sum(expected[place], found[place], self._dtype, before, base_dtype)
            self._add(sums, has_base=base is not None)

    def _add(self, sums: PieceSums, *, has_base: bool) -> None:
        with self._adding:
            self._differing += sums.differing
            self._max_ulps = max(self._max_ulps, sums.max_ulps)
            self._products = [total + more for total, more in zip(self._products, sums.products, strict=True)]
            self._counts = [total + more for total, more in zip(self._counts, sums.counts, strict=True)]
            self._has_base = self._has_base and has_base
            self._equals_base = self._equals_base and sums.equals_base

    def difference(self) -> TensorDifference:
        """Return what was counted."""
        wanted, both, wrong, places = self._products
        is_fitted = self._is_updated and self._has_base and 0 < wanted < inf and isfinite(both)
        more, less, bare = self._counts
        scale = both / wanted if is_fitted else None
        # of a scaled delta, rounding twice leaves at most a unit in the last place of each element
        left = wrong - (scale - 1) ** 2 * wanted if scale is not None else 0.0
        return TensorDifference(
            self.name,
            self._is_updated,
            self._element_count,
            self._differing,
            self._max_ulps,
            scale,
            left <= places,
            sqrt(wrong / wanted) if is_fitted else 0.0,
            (more - less) / max(1, more + less) if is_fitted else 0.0,
            bare / max(1, self._differing),
            self._equals_base and self._has_base and self.has_differences,
        )
