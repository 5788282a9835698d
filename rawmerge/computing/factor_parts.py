"""Parts of a plain pair's factors, read and packed for the compiled kernel some rows at a time.

Only the right factor is ever whole in memory, and that once: of a vocabulary's left factor a tile needs a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Protocol

from rawmerge.computing.plain_pairs import Factor, PlainPair
from rawmerge.dtypes import DTYPES
from rawmerge.engine.anonymous_memory import PAGE_BYTES, anonymous_memory
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.native import PANEL
from rawmerge.native.pair_kernel import FactorLayout, pack_into
from rawmerge.native.recipe import Recipe

#: Elements of the smallest dtype in a page: a tile is so much smaller, to fit large pages wherever in a page it begins.
_ROOM_ELEMENTS: Final = PAGE_BYTES // 2
#: Bytes of a right factor, as stored, that are read before they are packed.
PART_BYTES: Final = 2**20


class Slots(Protocol):
    """Memory that the calling thread reuses."""

    def bytes(self, slot: str, byte_count: int) -> memoryview:
        """Return uninitialised memory, the same at every call with this slot."""


def tile_height(recipe: Recipe, tile_elements: int) -> int:
    """Return how many rows a tile has: neither they nor their part of the left factor have too many elements."""
    most = tile_elements - _ROOM_ELEMENTS if tile_elements > 2 * _ROOM_ELEMENTS else tile_elements
    return max(1, most // max(recipe.columns, recipe.rank))


def left_parts(pairs: Sequence[PlainPair], files: OpenFiles, rows: tuple[int, int], slots: Slots) -> list[memoryview]:
    """Return (first row, row count) of each left factor, packed one behind the other in the thread's memory.

    Raises:
        InputChangedError: a file ended early; OSError: it cannot be read.
    """
    layouts = [left_layout(pair, rows[1]) for pair in pairs]
    packed = slots.bytes("left", sum(layout.packed_bytes for layout in layouts))
    parts, start = [], 0
    for pair, layout in zip(pairs, layouts, strict=True):
        parts.append(packed[start : start + layout.packed_bytes])
        stored = _read(pair.left, files, (pair.recipe.rows, pair.recipe.rank), rows, slots)
        pack_into(parts[-1], stored, pair.left.source.dtype, layout)
        start += layout.packed_bytes
    return parts


def left_layout(pair: PlainPair, row_count: int) -> FactorLayout:
    """Return how some rows of the left factor are packed."""
    recipe = pair.recipe
    return FactorLayout(row_count, recipe.rank, pair.left.lies_transposed, is_double=recipe.is_double)


def right_factor(pair: PlainPair, files: OpenFiles, slots: Slots) -> memoryview:
    """Return the whole right factor, packed in memory of its own.

    Raises:
        InputChangedError: the file ended early; OSError: it cannot be read.
    """
    whole = right_layout(pair)
    outer, rank, dtype = whole.outer, whole.rank, pair.right.source.dtype
    packed = anonymous_memory(whole.packed_bytes)
    panel_bytes = replace(whole, outer=PANEL).packed_bytes
    columns = max(1, PART_BYTES // DTYPES[dtype].byte_count(PANEL * rank)) * PANEL
    for first in range(0, outer, columns):
        count = min(columns, outer - first)
        stored = _read(pair.right, files, (outer, rank), (first, count), slots)
        pack_into(packed[first // PANEL * panel_bytes :], stored, dtype, replace(whole, outer=count))
    return packed


def right_layout(pair: PlainPair) -> FactorLayout:
    """Return how the whole right factor is packed."""
    recipe = pair.recipe
    return FactorLayout(recipe.columns, recipe.rank, pair.right.lies_transposed, True, recipe.is_double)


def _read(factor: Factor, files: OpenFiles, shape: tuple[int, int], part: tuple[int, int], slots: Slots) -> memoryview:
    """Return rows of a factor of `shape` (outer, rank) as stored: (count, rank), or (rank, count) where transposed."""
    (outer, rank), (first, count), source = shape, part, factor.source
    size = DTYPES[source.dtype].byte_count(1)
    stored = slots.bytes("factor", count * rank * size)
    if not factor.lies_transposed:
        files.read_into(source.path, source.offset + first * rank * size, stored)
    elif count == outer:
        files.read_into(source.path, source.offset, stored)
    else:
        for k in range(rank):
            start = source.offset + (k * outer + first) * size
            files.read_into(source.path, start, stored[k * count * size : (k + 1) * count * size])
    return stored
