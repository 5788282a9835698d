"""How a tensor is cut into tiles of whole rows: low enough for the memory, high enough for stable bits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

#: Elements that are read and written at a time where nothing else decides: 2 MiB of bfloat16, 4 MiB of float32.
TILE_ELEMENTS: Final = 2**20
#: Elements that are computed at a time: with the delta beside them they stay in the processor's cache.
BLOCK_ELEMENTS: Final = 2**18
#: BLAS libraries use other kernels at the edge of a product than inside. Products cut at multiples of 64 rows have
#: shown no difference in any row to the whole product; products of fewer than 16 rows have.
ROW_BLOCK: Final = 64
_LOWEST_BLOCK: Final = 16
_LOW_ELEMENTS: Final = 2**16
_WIDE_TILE_ELEMENTS: Final = 4 * TILE_ELEMENTS
#: A transposed delta of a narrow tensor is a low product, which must not be cut either.
_NARROW_ELEMENTS: Final = 8 * TILE_ELEMENTS


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor seen as a matrix: its first dimension, and all others."""
    return (1, 1) if not shape else (shape[0], prod(shape[1:]))


def elementwise_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor without a product: rows as short as tiles of them are sensible to cut."""
    for first in range(len(shape) - 1, 1, -1):
        if prod(shape[first:]) >= _LOWEST_BLOCK:
            return prod(shape[:first]), prod(shape[first:])
    return matrix_shape(shape)


def block_elements(columns: int) -> int:
    """Return how many elements of a tile are computed at a time, at most, where no low product is computed whole."""
    return max(BLOCK_ELEMENTS, ROW_BLOCK * columns)


def is_low(rows: int, columns: int) -> bool:
    """Whether the thread count may change bits of a product of this shape, however it is cut."""
    return min(rows, columns) < ROW_BLOCK or rows * columns <= _LOW_ELEMENTS


def tile_rows(
    rows: int, columns: int, tile_elements: int = TILE_ELEMENTS, product_columns: int | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (first row, row count) of each tile of a matrix, in order.

    The tiles are as high as `tile_elements` allows, in multiples of 64; very wide rows come in lower blocks.
    A rest too low for stable bits joins the tile before it; a matrix of few columns is one tile, and so is one with
    an update of few columns (`product_columns`; all, unless told).
    """
    if rows == 0 or columns == 0:
        return
    narrowest = columns if product_columns is None else product_columns
    if narrowest < _LOWEST_BLOCK and rows * columns <= _NARROW_ELEMENTS:
        yield 0, rows
        return
    block = ROW_BLOCK if ROW_BLOCK * columns <= _WIDE_TILE_ELEMENTS else _LOWEST_BLOCK
    height = max(block, tile_elements // columns // block * block)
    count = max(1, rows // height + (rows % height >= block))
    for index in range(count):
        first = index * height
        yield first, (rows if index == count - 1 else first + height) - first


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows that products neither begin nor end in: they are cut into tiles on their own.

    Attributes:
        first_row: first of them; row_count: how many.
        product_columns: columns of the narrowest product that changes them.
        updates: which updates change them, as places in the step's tuple.
    """

    first_row: int
    row_count: int
    product_columns: int
    updates: tuple[int, ...]

    @property
    def is_low(self) -> bool:
        """Whether the thread count may change bits of a product as high as these rows."""
        return bool(self.updates) and is_low(self.row_count, self.product_columns)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor seen as a matrix, and its stretches: every row in one, in order."""

    rows: int
    columns: int
    stretches: tuple[Stretch, ...]

    def tiles(self, tile_elements: int = TILE_ELEMENTS) -> Iterator[tuple[int, int]]:
        """Yield (first row, row count) of each tile, in order."""
        for stretch in self.stretches:
            for first, count in tile_rows(stretch.row_count, self.columns, tile_elements, stretch.product_columns):
                yield stretch.first_row + first, count

    @property
    def has_low(self) -> bool:
        """Whether a stretch is low."""
        return any(stretch.is_low for stretch in self.stretches)

    def stretch_at(self, row: int) -> Stretch:
        """Return the stretch that a row belongs to."""
        return self.stretches[bisect_right(self.stretches, row, key=lambda stretch: stretch.first_row) - 1]
