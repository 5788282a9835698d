"""Trained tokens: rows of an embedding replaced by the adapter's.

Source: PEFT 0.21.2 `tuners/trainable_tokens/layer.py`: `TrainableTokensLayer.merge`. The tensor that PEFT calls a delta
holds whole rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rawmerge.methods.interface import ModuleFacts, Scratch, Setting, Shape, ShapeMismatchError, TileContext
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

KIND: Final = "token_rows"


class TokenRowsMethod:
    """`trainable_token_indices` of a LoRA adapter, and TRAINABLE_TOKENS."""

    def settings(self, shapes: Mapping[str, Shape], facts: ModuleFacts) -> Mapping[str, Setting]:
        """Return `indices`: which row of the base each of the adapter's rows replaces.

        Shapes: one tensor of any role, (tokens, dim); base (vocabulary, dim). `facts` states the indices; its rank and
        scaling are not used.
        """
        ((role, shape),) = shapes.items()
        indices, base_shape = facts.token_indices, facts.base_shape
        if len(base_shape) != 2 or shape != (len(indices), base_shape[1]):
            expected = f"{len(indices)} rows, one for each token index, for a base of shape {list(base_shape)}"
            hint = "is this the base the adapter was trained on?"
            raise ShapeMismatchError(role, expected, f"shape {list(shape)}", hint)
        if outside := [index for index in indices if not 0 <= index < base_shape[0]]:
            hint = "the adapter was trained on a larger vocabulary"
            raise ShapeMismatchError(role, f"token indices below {base_shape[0]}", f"{outside[:5]}", hint)
        if len(set(indices)) < len(indices):
            repeated = sorted({index for index in indices if indices.count(index) > 1})
            raise ShapeMismatchError(role, "different token indices", f"{repeated[:5]} more than once")
        return {"indices": indices}

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedRows:
        """Return the rows as PEFT writes them: rounded to the base's dtype where PEFT has a say."""
        indices = settings["indices"]
        if not isinstance(indices, tuple):
            raise TypeError(f"setting indices must be a tuple, not {indices!r}")
        (rows,) = tensors.values()
        order = sorted(range(len(indices)), key=indices.__getitem__)
        rows = rows if context.rounding_dtype is None else rows.to(context.rounding_dtype)
        return PreparedRows(tuple(indices[place] for place in order), rows[order].to(context.compute_dtype))


@dataclass(frozen=True, slots=True)
class PreparedRows(Movable):
    """Rows that replace the base's.

    Attributes:
        indices: which rows of the base, ascending.
        rows: (tokens, dim) in compute dtype, in the same order.
    """

    indices: tuple[int, ...]
    rows: torch.Tensor

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Replace those rows of `tile` (rows, dim) that are trained, in place."""
        start = bisect_left(self.indices, first_row)
        stop = bisect_left(self.indices, first_row + tile.shape[0])
        if start < stop:
            places = [index - first_row for index in self.indices[start:stop]]
            tile[places] = self.rows[start:stop]
