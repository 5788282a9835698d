"""An update of a part of a tensor: some rows of its matrix view, or some of its columns. Importing it imports torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rawmerge.methods.interface import PreparedUpdate, Scratch
from rawmerge.methods.movable import Movable
from rawmerge.window import Window


@dataclass(frozen=True, slots=True)
class WindowedUpdate(Movable):
    """An update of a part of a tensor's matrix view; the update itself sees that part alone."""

    inner: PreparedUpdate
    window: Window

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Change, in place, the rows and columns of `tile` (rows, columns) that lie in the window."""
        window = self.window
        start = max(first_row, window.row)
        stop = min(first_row + tile.shape[0], window.row + window.row_count)
        if start < stop:
            part = tile[start - first_row : stop - first_row, window.columns(tile.shape[1])]
            self.inner.apply(part, window.delta_row + start - window.row, scratch)
