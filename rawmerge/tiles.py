"""How a tensor is cut into tiles of whole rows: low enough for the memory, high enough for stable bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def is_low(rows: int, columns: int) -> bool:
    """Whether the thread count may change bits of a product of this shape, however it is cut."""
    return min(rows, columns) < ROW_BLOCK or rows * columns <= _LOW_ELEMENTS


def tile_rows(rows: int, columns: int, tile_elements: int = TILE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Yield (first row, row count) of each tile of a matrix, in order.

    The tiles are as high as `tile_elements` allows, in multiples of 64; very wide rows come in lower blocks.
    A rest too low for stable bits joins the tile before it; a matrix of few columns is one tile.
    """
    if rows == 0 or columns == 0:
        return
    if columns < _LOWEST_BLOCK and rows * columns <= _NARROW_ELEMENTS:
        yield 0, rows
        return
    block = ROW_BLOCK if ROW_BLOCK * columns <= _WIDE_TILE_ELEMENTS else _LOWEST_BLOCK
    height = max(block, tile_elements // columns // block * block)
    count = max(1, rows // height + (rows % height >= block))
    for index in range(count):
        first = index * height
        yield first, (rows if index == count - 1 else first + height) - first
