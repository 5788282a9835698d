"""A magnitude for each row, as weight decomposition trains it: (W + delta) * m / ||W + delta||, norms over the rows.

Source: mlx-lm 0.32.2 `tuner/dora.py` `DoRALinear.fuse`; LyCORIS 4.1.3 `functional/general.py` `_weight_decompose`,
which adds float32's epsilon to the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rawmerge.methods.interface import PreparedUpdate, Scratch
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PreparedMagnitude(Movable):
    """An update that adds a delta, and rows scaled to trained norms after it.

    Attributes:
        delta: adds the delta.
        magnitude: norm of each row of the result, (rows,), in compute dtype.
        epsilon: added to the norm of what is scaled, so that a row of zeros stays.
    """

    delta: PreparedUpdate
    magnitude: torch.Tensor
    epsilon: float

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Replace `tile` (rows, columns), in place."""
        import torch

        self.delta.apply(tile, first_row, scratch)
        norms = torch.linalg.vector_norm(tile, dim=1).add_(self.epsilon)
        tile.mul_((self.magnitude[first_row : first_row + len(tile)] / norms)[:, None])
