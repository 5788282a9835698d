"""Adapters merged one after the other in one pass: after each, a tile is rounded as its own output would have been."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from rawmerge.computing.rounding import round_into
from rawmerge.methods.interface import PreparedUpdate, Scratch
from rawmerge.methods.movable import Movable

#: A stage's number, from 0, and what is applied in it.
Stage: TypeAlias = tuple[int, Sequence[PreparedUpdate]]


@dataclass(frozen=True, slots=True)
class PreparedRounding(Movable):
    """The end of a stage.

    Attributes:
        dtype: of the output.
    """

    dtype: torch.dtype

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Round `tile` (rows, columns) in place."""
        rounded = scratch.tensor("rounded", (tile.shape[0], tile.shape[1]), self.dtype)
        round_into(rounded, tile)
        tile.copy_(rounded)


def stages(updates: Iterable[PreparedUpdate]) -> list[Stage]:
    """Return the stages of a tile that has updates; one without any where nothing is left to apply."""
    found: list[list[PreparedUpdate]] = [[]]
    for update in updates:
        if isinstance(update, PreparedRounding):
            found.append([])
        else:
            found[-1].append(update)
    # of a stage that changes other rows only, the rounding has been done
    return [(number, own) for number, own in enumerate(found) if own] or [(0, [])]
