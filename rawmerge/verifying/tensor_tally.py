"""Counts how the elements of one tensor differ from what they should be, piece by piece, in bounded memory.

The scale of the delta is the least-squares fit of (found - base) to (expected - base), over the pieces that differ.
"""

from __future__ import annotations

import threading
from math import inf, isfinite, sqrt
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from rawmerge.dtypes import DTYPES
from rawmerge.verifying.findings import TensorDifference

if TYPE_CHECKING:
    import numpy as np

    _Array: TypeAlias = np.ndarray[Any, Any]

#: Elements that are looked at at a time.
_CHUNK: Final = 2**13
#: Storage dtype to (bits of the significand with the hidden one, exponent of the smallest subnormal).
_PRECISIONS: Final = {"F64": (53, -1074), "F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}
#: One thread looks at differences at a time, so that their memory is that of one.
_LOOKING: Final = threading.Lock()
_NUMPY_NAMES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class TensorTally:
    """The differences of one tensor; pieces may come from any thread."""

    def __init__(self, name: str, dtype: str, element_count: int, *, is_updated: bool) -> None:
        """Begin with no difference.

        Args:
            name: the tensor.
            dtype: its storage dtype code.
            element_count: its elements.
            is_updated: whether the adapter changes it.
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

    @property
    def has_differences(self) -> bool:
        """Whether any element differs."""
        return self._differing > 0

    def add_bytes(self, expected: memoryview, found: memoryview, offset: int) -> None:
        """Count the elements of a piece that may begin and end within one; `offset` is in bytes from the first.

        Elements of less than a byte count by the byte.
        """
        import numpy as np

        with _LOOKING:
            different = np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(found, np.uint8)) + offset
            self._differing += len(np.unique(different // max(1, DTYPES[self._dtype].bits // 8)))
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
        import numpy as np

        item, base_item = DTYPES[self._dtype].bits // 8, DTYPES[base_dtype].bits // 8
        for start in range(0, len(expected) // item, _CHUNK):
            place = slice(start * item, (start + _CHUNK) * item)
            left, right = (np.frombuffer(part[place], f"<u{item}") for part in (expected, found))
            values = [_values(part[place], self._dtype) for part in (expected, found)]
            before = None
            if base is not None:
                before = _values(base[start * base_item : (start + _CHUNK) * base_item], base_dtype)
            with _LOOKING, np.errstate(all="ignore"):
                self._add_chunk(left != right, values[0], values[1], before)

    def _add_chunk(self, differs: _Array, expected: _Array, found: _Array, base: _Array | None) -> None:
        import numpy as np

        largest = np.abs(expected) if base is None else np.maximum(np.abs(expected), np.abs(base))
        places = _last_place(largest, self._dtype)
        distance = np.abs(found - expected) / places
        worst = float(np.nan_to_num(distance[differs], nan=inf).max(initial=0.0))
        products, counts = [0.0, 0.0, 0.0, 0.0], [0, 0, 0]
        if base is not None:
            wanted, wrong = expected - base, found - expected
            pairs = ((wanted, wanted), (wanted, found - base), (wrong, wrong), (places, places))
            products = [float(left @ right) for left, right in pairs]
            direction = wrong * wanted
            counted = (direction > 0, direction < 0, differs & (found == base))
            counts = [int(np.count_nonzero(which)) for which in counted]
        self._differing += int(differs.sum())
        self._max_ulps = max(self._max_ulps, worst)
        self._products = [total + more for total, more in zip(self._products, products, strict=True)]
        self._counts = [total + more for total, more in zip(self._counts, counts, strict=True)]
        self._has_base = self._has_base and base is not None
        self._equals_base = self._equals_base and base is not None and not np.any(found != base)

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


def _values(raw: memoryview, dtype: str) -> _Array:
    """Return elements as float64, exactly."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, _NUMPY_NAMES[dtype]).astype(np.float64)


def _last_place(magnitudes: _Array, dtype: str) -> _Array:
    """Return the unit in the last place of each magnitude."""
    import numpy as np

    bits, smallest = _PRECISIONS[dtype]
    _, exponents = np.frexp(magnitudes)
    places: _Array = np.ldexp(1.0, np.maximum(exponents - bits, smallest))
    return places
