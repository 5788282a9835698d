"""What a thread holds while it works on tiles: of the kernel, of torch, and beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from rawmerge.combination import block_count
from rawmerge.computing.factor_parts import PART_BYTES, left_layout, right_layout, tile_height
from rawmerge.computing.plain_pairs import PlainPair
from rawmerge.dtypes import DTYPES
from rawmerge.engine.anonymous_memory import LARGE_FROM, large_pages, whole_pages
from rawmerge.engine.tiles import block_elements
from rawmerge.merge_plan import ROUNDING, ReplaceTensor, UpdateTensor, matrix_of

#: Elements of a tile that are compared with the base at a time.
_COMPARED_ELEMENTS: Final = 2**16
#: Elements of a cast whose losses are counted at a time.
_COUNTED_ELEMENTS: Final = 2**17


class Buffers:
    """What tiles take; a thread keeps the memory of the largest that it meets, and one without a tile takes none."""

    def __init__(self, tiles: Iterable[tuple[int, int]]) -> None:
        """Take (bytes of a tile, how many there are) of each tensor."""
        self._tiles = sorted(tiles, reverse=True)
        self.count = sum(count for _, count in self._tiles)

    def most(self, threads: int) -> int:
        """Return what so many threads take at most."""
        total = 0
        for size, count in self._tiles:
            total += size * min(count, threads)
            threads -= min(count, threads)
        return total


class PairBuffers:
    """What tiles take on the kernel's path: a thread keeps, for each purpose, the largest buffer that it needed."""

    def __init__(self, tensors: Iterable[Sequence[PlainPair]], tile_elements: int) -> None:
        """Take the pairs of each tensor."""
        self._purposes = [
            Buffers(sizes) for sizes in zip(*(_pair_sizes(pairs, tile_elements) for pairs in tensors), strict=True)
        ]

    def most(self, threads: int) -> int:
        """Return what so many threads take at most."""
        return sum(buffers.most(threads) for buffers in self._purposes)


def _pair_sizes(pairs: Sequence[PlainPair], tile_elements: int) -> Iterator[tuple[int, int]]:
    """Yield (bytes, how many tiles): a tile as stored and as written, the left factors' parts, and reading a factor."""
    recipe = pairs[0].recipe
    rows = min(recipe.rows, *(tile_height(pair.recipe, tile_elements) for pair in pairs))
    stored, result = (DTYPES[code].byte_count(rows * recipe.columns) for code in (recipe.stored, recipe.result))
    lefts = sum(left_layout(pair, rows).packed_bytes for pair in pairs)
    reading = max(_reading_bytes(pair, rows) for pair in pairs)
    for byte_count in (stored, result if result != stored else 0, lefts, reading):
        yield _buffer_bytes(byte_count), -(-recipe.rows // max(1, rows))


def _reading_bytes(pair: PlainPair, rows: int) -> int:
    """Return what reading a tile's part of a left factor takes, or the right one."""
    left_part = DTYPES[pair.left.source.dtype].byte_count(rows * pair.recipe.rank)
    return max(left_part, min(PART_BYTES, pair.right.source.byte_count))


def _buffer_bytes(byte_count: int) -> int:
    return large_pages(whole_pages(byte_count)) if byte_count >= LARGE_FROM else byte_count


def trial_bytes(pair: PlainPair) -> int:
    """Return what asking torch for its bits takes: its right factor, and blocks of torch's and of the kernel's."""
    block = block_elements(pair.recipe.columns) * (8 if pair.recipe.is_double else 4)
    return 2 * right_layout(pair).packed_bytes + 4 * block


def tile_bytes(step: UpdateTensor | ReplaceTensor, tile_elements: int, is_double: bool) -> tuple[int, int]:
    """Return what one thread holds on the torch path, and of how many tiles.

    That is a tile as stored, as merged and as written, a block and its delta.
    """
    matrix = matrix_of(step)
    elements, count = _highest_tile(step, tile_elements)
    # a low product is computed whole, however many elements it has
    block = elements if matrix.has_low else min(elements, block_elements(matrix.columns))
    is_double = is_double or "F64" in (step.source.dtype, step.entry.dtype)
    deltas = block_count(step) * (8 if is_double else 4) * block
    # float64 is rounded to half precision by way of float32, of which the ties are looked for
    rounded = (28 if _rounds_apart(step, is_double) else 16) if is_double else 8
    blocks = deltas + rounded * block + _between_bytes(step, block)
    held = sum(DTYPES[code].byte_count(elements) for code in _tile_dtypes(step, is_double))
    return held + blocks + _other_dtype_bytes(step, elements, is_double), count


def cast_bytes(step: UpdateTensor | ReplaceTensor, tile_elements: int, is_double: bool) -> tuple[int, int]:
    """Return what counting the losses of a cast takes of one thread, beside its tile, and of how many tiles.

    That is three times some values in the dtype of the arithmetic, and what tells which are looked at.
    """
    elements, count = _highest_tile(step, tile_elements)
    return min(elements, _COUNTED_ELEMENTS) * (3 * (8 if is_double else 4) + 2), count


def _highest_tile(step: UpdateTensor | ReplaceTensor, tile_elements: int) -> tuple[int, int]:
    """Return the elements of a step's largest tile, and how many tiles it has."""
    matrix = matrix_of(step)
    heights = [count for _, count in matrix.tiles(tile_elements)]
    return max(heights, default=0) * matrix.columns, len(heights)


def _tile_dtypes(step: UpdateTensor | ReplaceTensor, is_double: bool) -> Iterator[str]:
    """Yield the dtypes in which a tile lies in memory whole: from the base's file to the output's."""
    yield from (step.source.dtype, step.entry.dtype)
    if step.held_dtype:
        yield step.held_dtype
    if isinstance(step, UpdateTensor) and (step.overlay or (step.updates and step.base_dtype != step.source.dtype)):
        yield "F64" if step.overlay and is_double else "F32" if step.overlay else step.base_dtype


def _between_bytes(step: UpdateTensor | ReplaceTensor, block: int) -> int:
    """Return what a block takes as the next of several adapters meets it."""
    is_rounded = isinstance(step, UpdateTensor) and any(update.kind == ROUNDING for update in step.updates)
    return DTYPES[step.held_dtype or step.entry.dtype].byte_count(block) if is_rounded else 0


def _other_dtype_bytes(step: UpdateTensor | ReplaceTensor, elements: int, is_double: bool) -> int:
    """Return what comparing with the base takes where that has another dtype, and what the allocator keeps for it.

    Measured with 1 to 32 threads; where no dtype changes, it is within what each thread is given anyway.
    """
    widened = DTYPES[step.entry.dtype].byte_count(elements) - DTYPES[step.source.dtype].byte_count(elements)
    is_other = is_double or step.entry.dtype != step.source.dtype or bool(step.held_dtype)
    return max(0, widened) + (56 if _rounds_apart(step, is_double) else 16) * _COMPARED_ELEMENTS * is_other


def _rounds_apart(step: UpdateTensor | ReplaceTensor, is_double: bool) -> bool:
    return is_double and DTYPES[step.held_dtype or step.entry.dtype].bits < 32
