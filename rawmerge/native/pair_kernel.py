"""Plain pairs ready for the compiled kernel: both factors packed, and the call that merges rows of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rawmerge.engine.anonymous_memory import anonymous_memory
from rawmerge.native import DTYPE_CODES, PANEL, kernel
from rawmerge.native.recipe import Recipe
from rawmerge.native.row_sums import RowSums


@dataclass(frozen=True, slots=True)
class FactorLayout:
    """How a factor lies in its file, and how the kernel reads it.

    Attributes:
        outer: rows or columns of the delta.
        rank: of the pair.
        lies_transposed: whether it is stored as (rank, outer).
        is_right: whether it is packed in panels of 64 columns of the delta, the last padded with zeros.
        is_double: packed as float64 rather than float32.
    """

    outer: int
    rank: int
    lies_transposed: bool = False
    is_right: bool = False
    is_double: bool = False

    @property
    def packed_bytes(self) -> int:
        """What it takes when it is packed."""
        padded = -(-self.outer // PANEL) * PANEL if self.is_right else self.outer
        return padded * self.rank * (8 if self.is_double else 4)


def pack_factor(
    stored: memoryview,
    dtype: str,
    shape: tuple[int, int],
    *,
    lies_transposed: bool = False,
    is_right: bool = False,
    is_double: bool = False,
) -> memoryview:
    """Return a factor of `shape` (outer, rank), packed in memory of its own; all else as in `pack_into`."""
    layout = FactorLayout(*shape, lies_transposed, is_right, is_double)
    packed = anonymous_memory(layout.packed_bytes)
    pack_into(packed, stored, dtype, layout)
    return packed


def pack_into(packed: memoryview, stored: memoryview, dtype: str, layout: FactorLayout) -> None:
    """Upcast a factor exactly to float32 or float64, and put it in the order in which the kernel reads it.

    Args:
        packed: where it goes.
        stored: its bytes.
        dtype: their storage dtype code, a key of `DTYPE_CODES`.
        layout: how it lies in them, and is to lie.

    Raises:
        ValueError: a buffer is too small.
    """
    steps = (1, layout.outer) if layout.lies_transposed else (layout.rank, 1)
    shape = (layout.outer, layout.rank, *steps)
    _compiled().pack(stored, packed, DTYPE_CODES[dtype], shape, layout.is_right, layout.is_double)


@dataclass(frozen=True, slots=True)
class PairKernel:
    """A pair of factors and in which order their product is summed.

    Attributes:
        recipe: what is computed.
        block: terms of a product's element that are summed as one chain; the sums are added up in order.
        scaling: dimensionless.
        left, right: from `pack_factor`.
        level: the instruction set, 2 for AVX-512, 1 for AVX2; 0 for the best that there is.
    """

    recipe: Recipe
    block: int
    scaling: float
    left: memoryview
    right: memoryview
    level: int = 0

    def merge(
        self,
        stored: memoryview,
        result: memoryview,
        rows: tuple[int, int],
        *,
        finds_changes: bool,
        tally: RowSums | None = None,
    ) -> tuple[bool, bool]:
        """Merge a tile of whole rows with this pair alone; all else as in `PairChain.merge`.

        Args:
            stored: the base's rows.
            result: where the merged rows go.
            rows: the first row's number in the left factor, and how many.
            finds_changes: whether to look for a changed element.
            tally: where the sums of sampled rows go.
        """
        tallies = [tally] if tally else ()
        return PairChain((self,)).merge(stored, result, rows, finds_changes=finds_changes, tallies=tallies)

    def argument(self, rows: tuple[int, int], sums: memoryview | None) -> tuple[Any, ...]:
        """Return what the compiled kernel takes for this pair and some rows of its left factor."""
        first, count = rows
        row_bytes = self.recipe.rank * (8 if self.recipe.is_double else 4)
        left = self.left[first * row_bytes : (first + count) * row_bytes]
        return left, self.right, self.recipe.rank, self.block, self.scaling, self.recipe.rounds_delta, sums


@dataclass(frozen=True, slots=True)
class PairChain:
    """Pairs on the same matrix that one pass merges, in this order.

    Attributes:
        pairs: one or more.
        rounds_between: whether each pair meets values that are rounded to the result's dtype; else all are added up,
            and the sum is rounded once.
    """

    pairs: Sequence[PairKernel]
    rounds_between: bool = False

    def merge(
        self,
        stored: memoryview,
        result: memoryview,
        rows: tuple[int, int],
        *,
        finds_changes: bool,
        tallies: Sequence[RowSums] = (),
    ) -> tuple[bool, bool]:
        """Merge a tile of whole rows; the interpreter lock is let go meanwhile.

        Args:
            stored: the base's rows.
            result: where the merged rows go; may be `stored` where both dtypes have the same size.
            rows: the first row's number in the left factors, and how many.
            finds_changes: whether to look for a changed element; else it is taken for granted.
            tallies: where the sums of sampled rows go, of each pair where `rounds_between`, else of all pairs
                together; none for nowhere. They are of no use where the result is not.

        Returns:
            Whether an element has changed, by any of the pairs where `rounds_between`; and whether a value is not
            finite, overflowed or is subnormal, so that the result is of no use.

        Raises:
            ValueError: a buffer is too small.
        """
        recipe, compiled = self.pairs[0].recipe, _compiled()
        # the sum of all is the last one's
        sums = [*([None] * (len(self.pairs) - len(tallies))), *(tally.sums for tally in tallies)]
        found = compiled.merge(
            stored,
            result,
            tuple(pair.argument(rows, own) for pair, own in zip(self.pairs, sums, strict=True)),
            (rows[1], recipe.columns),
            (DTYPE_CODES[recipe.stored], DTYPE_CODES[recipe.result]),
            recipe.is_double,
            self.rounds_between,
            finds_changes,
            self.pairs[0].level or compiled.LEVEL,
            (tallies[0].first_row, tallies[0].stride) if tallies else (0, 0),
        )
        return bool(found & compiled.CHANGED), bool(found & compiled.CARE)


def _compiled() -> ModuleType:
    compiled = kernel()
    if compiled is None:
        raise RuntimeError("the compiled kernel is not there; ask kernel() first")
    return compiled
