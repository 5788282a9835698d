"""The part of a tensor that an update changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a tensor that an update changes, in the tensor's matrix view, and where its delta begins.

    Attributes:
        row: first row; row_count: how many.
        delta_row: which row of the delta goes to the first of them.
        column: first column; column_step: distance between columns; column_count: how many, -1 for all to the end.
    """

    row: int
    row_count: int
    delta_row: int = 0
    column: int = 0
    column_step: int = 1
    column_count: int = -1

    def columns(self, count: int) -> slice:
        """Return which of a matrix's `count` columns are changed."""
        stop = count if self.column_count < 0 else min(count, self.column + self.column_count * self.column_step)
        return slice(self.column, stop, self.column_step)
