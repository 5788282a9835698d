"""One plain pair being merged by the compiled kernel: its right factor packed, its tiles read and merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from rawmerge.computing.factor_parts import left_rows, right_factor, tile_height
from rawmerge.computing.plain_pairs import PlainPair
from rawmerge.computing.survival import SurvivalTally
from rawmerge.dtypes import DTYPES
from rawmerge.engine.anonymous_memory import LARGE_FROM, anonymous_memory, large_memory, whole_pages
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.native.pair_kernel import PairKernel
from rawmerge.native.row_sums import RowSums

#: What the other path makes of the same rows of the same tensor.
Careful = Callable[[int, int], memoryview]


class PairScratch:
    """Buffers that one thread reuses for all its tiles, grown to the largest tile it meets."""

    def __init__(self) -> None:
        self._buffers = dict.fromkeys(("stored", "result", "factor", "left"), memoryview(b""))

    def bytes(self, slot: str, byte_count: int) -> memoryview:
        """Return uninitialised memory, the same at every call with a slot."""
        return self.pages(slot, byte_count)[:byte_count]

    def pages(self, slot: str, byte_count: int) -> memoryview:
        """Return the whole pages of that memory, at least as many as `byte_count` bytes take wherever they begin."""
        least = whole_pages(byte_count)
        if len(self._buffers[slot]) < least:
            self._buffers[slot] = memoryview(b"")  # the smaller one goes first
            make = large_memory if byte_count >= LARGE_FROM else anonymous_memory
            self._buffers[slot] = make(least)
        return self._buffers[slot]


class PairComputer:
    """Merges the tiles of one plain pair, in any order, from any thread.

    Attributes:
        changed: whether an element is known to differ from what it was before.
        row_bytes: of a finished row.
    """

    def __init__(
        self, pair: PlainPair, block: int, files: OpenFiles, careful: Careful, tally: SurvivalTally | None = None
    ) -> None:
        """Prepare nothing yet.

        Args:
            pair: what is merged.
            block: with which the kernel has torch's bits.
            files: what base and adapter are read through.
            careful: computes a tile that the kernel leaves, for overflow and the like.
            tally: where what is left of the delta goes, None for nowhere.
        """
        self.changed = False
        self.row_bytes = DTYPES[pair.recipe.result].byte_count(pair.recipe.columns)
        self._pair = pair
        self._block = block
        self._files = files
        self._careful = careful
        self._tally = tally
        self._lock = threading.Lock()
        self._right: memoryview | None = None

    def tiles(self, tile_elements: int) -> Iterator[tuple[int, int]]:
        """Yield (first row, row count); the kernel's bits do not depend on how a matrix is cut."""
        recipe = self._pair.recipe
        most = tile_height(recipe, tile_elements)
        height = -(-recipe.rows // -(-recipe.rows // most)) if recipe.rows else most  # alike, for even work
        for first in range(0, recipe.rows, height):
            yield first, min(height, recipe.rows - first)

    def compute(self, first_row: int, row_count: int, scratch: PairScratch, phase: int = 0) -> memoryview:
        """Return whole pages of memory with the merged bytes of some rows, `phase` bytes behind their beginning.

        They stay valid until the thread's next tile.

        Raises:
            NonFiniteTensorError: a value overflowed, or became NaN, where the base is finite.
            InputChangedError: a file ended early.
        """
        right = self._prepared(scratch)
        recipe, source = self._pair.recipe, self._pair.step.source
        row_bytes = DTYPES[recipe.stored].byte_count(recipe.columns)
        pages = scratch.pages("stored", row_count * row_bytes)
        stored = pages[phase:][: row_count * row_bytes]
        self._files.read_into(source.path, source.offset + first_row * row_bytes, stored)
        result = stored  # in place where it fits, to stay in the processor's cache
        if self.row_bytes != row_bytes:
            pages = scratch.pages("result", row_count * self.row_bytes)
            result = pages[phase:][: row_count * self.row_bytes]
        left = left_rows(self._pair, self._files, (first_row, row_count), scratch)
        kernel = PairKernel(recipe, self._block, self._pair.scaling, left, right)
        sums = RowSums(self._tally.sums(), first_row, self._tally.stride) if self._tally else None
        changed, needs_care = kernel.merge(stored, result, (0, row_count), finds_changes=not self.changed, tally=sums)
        if needs_care:
            result[:] = self._careful(first_row, row_count)
        else:
            self.changed = self.changed or changed
        return pages

    def _prepared(self, scratch: PairScratch) -> memoryview:
        with self._lock:
            if self._right is None:
                self._right = right_factor(self._pair, self._files, scratch)
            return self._right
