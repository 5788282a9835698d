"""Where a tensor of the trained model lies on disk: whole, in part, or spread over many tensors.

transformers holds some tensors otherwise than checkpoints store them: experts fused into one parameter, a fused
projection split in three. An adapter speaks of what the model held; a place says which rows of which disk tensors
that is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one disk tensor, seen as a matrix.

    Attributes:
        tensor: name of the disk tensor.
        row: first row, in the disk tensor's matrix view.
        rows: how many.
        at: first row of the trained model's tensor that they hold, in that tensor's matrix view.
        expert: which expert's matrix the rows belong to, -1 where there are no experts or the piece holds all.
        column: first column; column_step: distance between columns; columns: how many, -1 for all.
    """

    tensor: str
    row: int
    rows: int
    at: int = 0
    expert: int = -1
    column: int = 0
    column_step: int = 1
    columns: int = -1


@dataclass(frozen=True, slots=True)
class Place:
    """What one tensor of the trained model is on disk.

    Attributes:
        shape: its shape, in the trained model's terms.
        pieces: which rows of which disk tensors hold it.
        is_whole: whether it is one disk tensor, all of it.
        view_columns: columns of the disk tensors' matrix view; 0 for the default view.
        is_transposed: for a square part, whether it is stored (in, out); None where the part does not tell.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_whole: bool = False
    view_columns: int = 0
    is_transposed: bool | None = None

    @property
    def name(self) -> str:
        """The disk tensor, or the first of several."""
        return self.pieces[0].tensor

    @property
    def tensors(self) -> tuple[str, ...]:
        """All disk tensors that hold a part of it."""
        return tuple(piece.tensor for piece in self.pieces)


def whole(name: str, shape: tuple[int, ...]) -> Place:
    """Return the place of a tensor that is a disk tensor of its own."""
    return Place(shape, (Piece(name, 0, shape[0] if shape else 1),), is_whole=True)
