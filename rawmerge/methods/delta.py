"""Prepared updates that most kinds share: rows of a delta to add, and rows to compute anew from the base's.

A delta is given for rows of the base as it is stored. Products of up to `WHOLE_ELEMENTS` elements are computed whole,
for the bits of a low product depend on how it is cut; higher ones have the same bits cut at the engine's tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rawmerge.methods.interface import Scratch, TileContext
from rawmerge.methods.lora import WHOLE_ELEMENTS
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PreparedDelta(Movable):
    """A delta that is added.

    Attributes:
        rows: returns rows `start` to `stop` of the delta as the base is stored, (rows, columns), in compute dtype.
        rounding_dtype: dtype to which the delta is rounded before it is added, or None.
    """

    rows: Callable[[int, int], torch.Tensor]
    rounding_dtype: torch.dtype | None = None

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Add the delta's rows to `tile` (rows, columns), in place."""
        delta = self.rows(first_row, first_row + tile.shape[0])
        tile.add_(delta if self.rounding_dtype is None else delta.to(self.rounding_dtype))


@dataclass(frozen=True, slots=True)
class PreparedChange(Movable):
    """Rows that are computed from the base's.

    Attributes:
        change: given rows (rows, columns) in compute dtype and which row is the first, returns what stands in their
            place, in any dtype whose values compute dtype holds.
    """

    change: Callable[[torch.Tensor, int], torch.Tensor]

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Replace `tile` (rows, columns), in place."""
        tile.copy_(self.change(tile, first_row))


def whole_delta(delta: torch.Tensor, rounding_dtype: torch.dtype | None = None) -> PreparedDelta:
    """Return the update that adds a delta that is in memory whole, of any shape whose first dimension is the base's.

    It stays on the CPU: a whole tensor in an accelerator's memory would be the largest thing there, for a mere sum.
    """
    matrix = delta.reshape(delta.shape[0], -1)
    return PreparedDelta(lambda start, stop: matrix[start:stop], rounding_dtype)


def whole_result(result: torch.Tensor) -> PreparedChange:
    """Return the update that puts a result that is in memory whole in the base's place."""
    matrix = result.reshape(result.shape[0], -1)
    return PreparedChange(lambda tile, first_row: matrix[first_row : first_row + len(tile)])


def row_delta(
    product: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    rounding_dtype: torch.dtype | None = None,
) -> PreparedDelta:
    """Return the update that adds a product whose rows can be had apart; low products are computed once, whole.

    It can be moved to an accelerator if `product` is a partial of a function without a closure.

    Args:
        product: returns rows `start` to `stop` of the delta as the base is stored.
        shape: rows and columns of the delta.
        rounding_dtype: dtype to which the delta is rounded before it is added, or None.
    """
    if shape[0] * shape[1] <= WHOLE_ELEMENTS:
        return PreparedDelta(partial(_rows_of, product(0, shape[0])), rounding_dtype)
    return PreparedDelta(product, rounding_dtype)


def _rows_of(matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return matrix[start:stop]


def upcast(tensors: Mapping[str, torch.Tensor], context: TileContext) -> dict[str, torch.Tensor]:
    """Return the float tensors in compute dtype, exactly upcast from their storage dtype, others as they are."""
    return {
        role: tensor.to(context.compute_dtype) if tensor.is_floating_point() else tensor
        for role, tensor in tensors.items()
    }


def decomposition_bytes(rows: int, columns: int) -> int:
    """Return what a decomposition takes: weight, its copy, product and result, the factors, and LAPACK's own memory."""
    lowest = min(rows, columns)
    return 4 * (4 * rows * columns + lowest * (rows + columns) + 4 * lowest * lowest)
