"""What the differences in one piece of a tensor add up to.

Values of two bytes are looked at as float32, which holds them exactly and takes half the time of float64; a difference
of two of them may be rounded, by 2^-24 of itself, but is zero or of another sign only where theirs is. Pieces with
values that are not finite, or whose differences overflow, are looked at again as float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from rawmerge.dtypes import DTYPES

if TYPE_CHECKING:
    import numpy as np

    _Array: TypeAlias = np.ndarray[Any, Any]

#: Elements of a piece: few calls, and arrays that stay in the processor's cache; some 1 MB in all.
PIECE_ELEMENTS: Final = 2**14
#: Elements that BLAS sums at a time: longer ones it would share out to threads, each with memory of its own.
_DOT: Final = 2**13
#: Storage dtype to (bits of the significand without the hidden one, exponent of the smallest normal number).
_PRECISIONS: Final = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}
_NUMPY_NAMES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
#: Bytes of a float to a mask of its exponent.
_EXPONENTS: Final = {4: 0x7F800000, 8: 0x7FF0000000000000}


@dataclass(frozen=True, slots=True)
class PieceSums:
    """Sums over the elements of one piece.

    Attributes:
        differing: elements with other bits.
        max_ulps: largest distance of those, in units in the last place of the larger of the expected value and the
            base's; infinity where one is not finite.
        products: of the wanted change with itself and with the one found, of what is wrong with itself, and of the
            units in the last place with themselves; zeros where there is no base.
        counts: elements that differ in the delta's direction, against it, and that have the base's value. Directions
            of differences below 1e-154, which only float64 holds, may be lost.
        equals_base: whether every element has the base's value.
    """

    differing: int
    max_ulps: float
    products: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    counts: tuple[int, int, int] = (0, 0, 0)
    equals_base: bool = False


class PieceSummer:
    """Sums over one piece after another, in the same arrays: new ones would cost more than the arithmetic."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._rows: dict[int, _Array] = {}

    def sum(
        self, expected: memoryview, found: memoryview, dtype: str, base: memoryview | None, base_dtype: str
    ) -> PieceSums:
        """Return the sums over a piece of whole elements.

        Args:
            expected: what should be there, in `dtype`; at most `PIECE_ELEMENTS` elements.
            found: what is there.
            dtype: storage dtype code of both.
            base: the base's elements at the same place; None where there are none.
            base_dtype: their storage dtype code.
        """
        import numpy as np

        bits = f"<u{DTYPES[dtype].bits // 8}"
        differs = np.frombuffer(expected, bits) != np.frombuffer(found, bits)
        parts = [(expected, dtype), (found, dtype), *([(base, base_dtype)] if base is not None else [])]
        with np.errstate(all="ignore"):
            if all(DTYPES[code].bits == 16 for _, code in parts):
                sums = self._sum(parts, differs, dtype, 4)
                if all(map(isfinite, (sums.max_ulps, *sums.products))):
                    return sums
            return self._sum(parts, differs, dtype, 8)

    def _sum(self, parts: Sequence[tuple[memoryview, str]], differs: _Array, dtype: str, item: int) -> PieceSums:
        """Return the sums, of values of `item` bytes."""
        import numpy as np

        rows = self._arrays(item, len(differs))
        for row, (raw, code) in zip(rows, parts, strict=False):
            self._fill(row, raw, code)
        expected, found, base, wrong, powers, spare = rows
        has_base = len(parts) > 2
        np.subtract(found, expected, out=wrong)
        _set_powers(powers, expected, base if has_base else expected, spare, dtype)
        distance = np.divide(np.abs(wrong, out=spare), powers, out=spare)
        worst = float(distance.max(initial=0.0))
        if not isfinite(worst):  # equal infinities and NaNs have no distance
            worst = float(np.nan_to_num(distance[differs], nan=inf, posinf=inf).max(initial=0.0))
        sums = PieceSums(int(np.count_nonzero(differs)), worst * 2.0 ** _PRECISIONS[dtype][0])
        if not has_base:
            return sums
        bare = found == base
        wanted = np.subtract(expected, base, out=expected)
        return self._with_base(sums, (wanted, wrong, powers), bare, differs, dtype)

    def _with_base(
        self, sums: PieceSums, arrays: Sequence[_Array], is_base: _Array, differs: _Array, dtype: str
    ) -> PieceSums:
        import numpy as np

        if arrays[0].itemsize < 8:
            arrays = [_copied(array, row) for array, row in zip(arrays, self._arrays(8, len(differs)), strict=False)]
        squares = [_square(array) for array in arrays]
        direction = np.multiply(arrays[0], arrays[1], out=arrays[0])
        bare = int(np.count_nonzero(is_base))
        equals_base = bare == len(is_base)
        if bare and sums.differing < len(differs):
            bare = int(np.count_nonzero(is_base & differs))
        return PieceSums(
            sums.differing,
            sums.max_ulps,
            (squares[0], squares[0] + float(direction.sum()), squares[1], squares[2] * 4.0 ** -_PRECISIONS[dtype][0]),
            (int(np.count_nonzero(direction > 0)), int(np.count_nonzero(direction < 0)), bare),
            equals_base,
        )

    def _arrays(self, item: int, count: int) -> list[_Array]:
        """Return six arrays of so many floats of `item` bytes, with anything in them."""
        import numpy as np

        if item not in self._rows:
            self._rows[item] = np.empty((6, PIECE_ELEMENTS), f"f{item}")
        return [row[:count] for row in self._rows[item]]

    def _fill(self, row: _Array, raw: memoryview, dtype: str) -> None:
        """Set a row to elements in a storage dtype, exactly."""
        import numpy as np

        if dtype != "BF16":
            np.copyto(row, np.frombuffer(raw, _NUMPY_NAMES[dtype]))
            return
        values = row if row.itemsize == 4 else self._arrays(4, len(row))[0]
        bits = values.view(np.uint32)
        np.copyto(bits, np.frombuffer(raw, "<u2"))
        np.left_shift(bits, 16, out=bits)
        if values is not row:
            np.copyto(row, values)


class PieceSummers:
    """A few summers for many threads: what they take is the memory of a few."""

    def __init__(self, count: int = 2) -> None:
        """Make so many."""
        self._free: SimpleQueue[PieceSummer] = SimpleQueue()
        for _ in range(count):
            self._free.put(PieceSummer())

    @contextmanager
    def one(self) -> Iterator[PieceSummer]:
        """Give a summer that no other thread has; waits until there is one."""
        summer = self._free.get()
        try:
            yield summer
        finally:
            self._free.put(summer)


def _copied(source: _Array, row: _Array) -> _Array:
    row[:] = source
    return row


def _square(values: _Array) -> float:
    """Return the sum of the squares."""
    return sum(float(part @ part) for part in (values[at : at + _DOT] for at in range(0, len(values), _DOT)))


def _set_powers(powers: _Array, expected: _Array, base: _Array, spare: _Array, dtype: str) -> None:
    """Set `powers` to the power of two at or below the larger magnitude, at least the smallest normal number's.

    It is a unit in the last place times 2 to the bits of the significand.
    """
    import numpy as np

    np.abs(expected, out=powers)
    np.maximum(powers, np.abs(base, out=spare), out=powers)
    bits = powers.view(f"u{powers.itemsize}")
    np.bitwise_and(bits, bits.dtype.type(_EXPONENTS[powers.itemsize]), out=bits)
    np.maximum(powers, powers.dtype.type(2.0 ** _PRECISIONS[dtype][1]), out=powers)
