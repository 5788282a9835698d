"""The cast of a finished tile from the dtype in which it was merged to the one that is stored. Imports torch."""

from __future__ import annotations

import torch

from rawmerge.computing.overflow import beyond
from rawmerge.computing.rounding import make_nans_canonical, may_overflow, newly_non_finite, round_into
from rawmerge.computing.tensor_reading import torch_dtype
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.merge_plan import ReplaceTensor, UpdateTensor


class LastCast:
    """Casts the tiles of one step, from any thread.

    Attributes:
        held_dtype: in which they are merged.
    """

    def __init__(self, step: UpdateTensor | ReplaceTensor) -> None:
        self.held_dtype = torch_dtype(step.held_dtype or step.entry.dtype)
        self._entry = step.entry
        self._stored_dtype = torch_dtype(step.entry.dtype)

    def apply(self, held: torch.Tensor, scratch: TileScratch) -> torch.Tensor:
        """Return rows (rows, columns) as they are stored; the same tensor where that is what they are.

        Raises:
            NonFiniteTensorError: a finite value is beyond what is stored.
        """
        if held.dtype == self._stored_dtype:
            return held
        stored = scratch.tensor("last cast", (held.shape[0], held.shape[1]), self._stored_dtype)
        round_into(stored, held)
        if may_overflow(held, self._stored_dtype):
            if newly_non_finite(stored, held):
                raise beyond(held, stored).error(self._entry, is_whole=False)
            make_nans_canonical(stored)
        return stored
