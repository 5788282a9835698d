"""A tensor's plain pairs being merged by the compiled kernel: right factors packed, tiles read and merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from rawmerge.computing.factor_parts import left_parts, right_factor, tile_height
from rawmerge.computing.plain_pairs import PlainPair
from rawmerge.computing.survival import SurvivalTally
from rawmerge.dtypes import DTYPES
from rawmerge.engine.anonymous_memory import LARGE_FROM, anonymous_memory, large_memory, whole_pages
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.native.pair_kernel import PairChain, PairKernel
from rawmerge.native.row_sums import RowSums

#: What the other path makes of the same rows of the same tensor.
Careful = Callable[[int, int], memoryview]


class PairScratch:
    """Buffers that one thread reuses for all its tiles, grown to the largest tile it meets."""

    def __init__(self) -> None:
        self._buffers: dict[str, memoryview] = {}

    def bytes(self, slot: str, byte_count: int) -> memoryview:
        """Return uninitialised memory, the same at every call with a slot."""
        return self.pages(slot, byte_count)[:byte_count]

    def pages(self, slot: str, byte_count: int) -> memoryview:
        """Return the whole pages of that memory, at least as many as `byte_count` bytes take wherever they begin."""
        least = whole_pages(byte_count)
        if len(self._buffers.get(slot, b"")) < least:
            self._buffers[slot] = memoryview(b"")  # the smaller one goes first
            make = large_memory if byte_count >= LARGE_FROM else anonymous_memory
            self._buffers[slot] = make(least)
        return self._buffers[slot]


class PairComputer:
    """Merges the tiles of a tensor's plain pairs, all of them in one pass, in any order, from any thread.

    Attributes:
        changed: whether an element is known to differ from what it was before.
        row_bytes: of a finished row.
    """

    def __init__(
        self,
        stages: Sequence[tuple[PlainPair, int]],
        files: OpenFiles,
        careful: Careful,
        tally: SurvivalTally | None = None,
    ) -> None:
        """Prepare nothing yet.

        Args:
            stages: what is merged, and the block with which the kernel has torch's bits.
            files: what base and adapter are read through.
            careful: computes a tile that the kernel leaves, for overflow and the like.
            tally: where what is left of the delta goes, None for nowhere.
        """
        self.changed = False
        recipe = stages[0][0].recipe
        self.row_bytes = DTYPES[recipe.result].byte_count(recipe.columns)
        self._stages = stages
        self._files = files
        self._careful = careful
        self._tally = tally
        self._lock = threading.Lock()
        self._right: list[memoryview] = []

    def tiles(self, tile_elements: int) -> Iterator[tuple[int, int]]:
        """Yield (first row, row count); the kernel's bits do not depend on how a matrix is cut."""
        recipe = self._stages[0][0].recipe
        most = min(tile_height(pair.recipe, tile_elements) for pair, _ in self._stages)
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
        first, source = self._stages[0][0].recipe, self._stages[0][0].step.source
        row_bytes = DTYPES[first.stored].byte_count(first.columns)
        pages = scratch.pages("stored", row_count * row_bytes)
        stored = pages[phase:][: row_count * row_bytes]
        self._files.read_into(source.path, source.offset + first_row * row_bytes, stored)
        result = stored  # in place where it fits, to stay in the processor's cache
        if self.row_bytes != row_bytes:
            pages = scratch.pages("result", row_count * self.row_bytes)
            result = pages[phase:][: row_count * self.row_bytes]
        changed, needs_care = self._merge(right, (stored, result), (first_row, row_count), scratch)
        if needs_care:
            result[:] = self._careful(first_row, row_count)
            return pages
        self.changed = self.changed or changed
        return pages

    def _merge(
        self,
        right: Sequence[memoryview],
        buffers: tuple[memoryview, memoryview],
        rows: tuple[int, int],
        scratch: PairScratch,
    ) -> tuple[bool, bool]:
        """Merge all pairs, from one buffer into the other, which may be the same; return as `PairChain.merge`."""
        left = left_parts([pair for pair, _ in self._stages], self._files, rows, scratch)
        kernels = [
            PairKernel(pair.recipe, block, pair.scaling, own_left, own_right)
            for (pair, block), own_left, own_right in zip(self._stages, left, right, strict=True)
        ]
        is_summed, tally = self._stages[0][0].is_summed, self._tally
        stages = range(1 if is_summed else len(kernels)) if tally else ()
        sums = [RowSums(tally.sums(stage), rows[0], tally.stride) for stage in stages] if tally else ()
        chain = PairChain(kernels, rounds_between=not is_summed)
        return chain.merge(*buffers, (0, rows[1]), finds_changes=not self.changed, tallies=sums)

    def _prepared(self, scratch: PairScratch) -> list[memoryview]:
        with self._lock:
            if not self._right:
                self._right = [right_factor(pair, self._files, scratch) for pair, _ in self._stages]
            return self._right
