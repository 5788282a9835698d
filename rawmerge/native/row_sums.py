"""Where the compiled kernel sums what is left of a delta, and the call that sums rows which others have merged."""

from __future__ import annotations

from dataclasses import dataclass

from rawmerge.native import DTYPE_CODES, kernel


@dataclass(frozen=True, slots=True)
class RowSums:
    """Where the sums of a tile's sampled rows go.

    Attributes:
        sums: float64, five for each sampled row of the tensor, as `rawmerge.computing.survival` has them.
        first_row: which row of the tensor the tile begins with.
        stride: row r is sampled where it divides r, and is the r / stride-th.
    """

    sums: memoryview
    first_row: int
    stride: int


@dataclass(frozen=True, slots=True)
class MergedRows:
    """A tile that others than the kernel have merged, row by row in memory.

    Attributes:
        shape: (rows, columns).
        before: the base's values, as they are stored.
        after: what was rounded: float32, or float64 where `is_double`.
        now: the result's values, as they are stored.
        codes: keys of `DTYPE_CODES`, of `before` and of `now`.
        is_double: whether it was computed in float64.
    """

    shape: tuple[int, int]
    before: memoryview
    after: memoryview
    now: memoryview
    codes: tuple[str, str]
    is_double: bool

    def measure(self, tally: RowSums) -> None:
        """Put the sums of the sampled rows where they go; the interpreter lock is let go meanwhile.

        Raises:
            ValueError: a buffer is too small.
        """
        compiled = kernel()
        if compiled is None:
            raise RuntimeError("the compiled kernel is not there; ask kernel() first")
        stored, result = (DTYPE_CODES[code] for code in self.codes)
        place = tally.sums, self.shape, tally.first_row, tally.stride
        compiled.measure(self.before, self.after, self.now, *place, stored, result, self.is_double, compiled.LEVEL)
