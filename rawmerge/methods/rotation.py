"""Rotations of a weight's inputs by a block diagonal matrix: what OFT and BOFT share.

Where PEFT's bits are wanted, rows are multiplied by the whole matrix, zeros and all, as PEFT does: BLAS cuts long sums
into parts that are added up, and where a block lies across a cut, a product of that block alone has other bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

#: Given rows (rows, columns), returns them rotated.
Rotation: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


def whole_rotation(blocks: torch.Tensor, *, is_embedding: bool = False) -> Rotation:
    """Return W -> (D @ W.T).T, or W @ D of an embedding, where D is block diagonal.

    Args:
        blocks: (blocks, size, size), in compute dtype.
        is_embedding: rows are multiplied from the right.
    """
    return partial(_times_embedded if is_embedding else _times, _block_diagonal(blocks))


def _times_embedded(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows @ matrix


def _times(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (matrix @ rows.t()).t()


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    import torch

    count, size = blocks.shape[:2]
    matrix = torch.zeros(count, size, count, size, dtype=blocks.dtype)
    places = torch.arange(count)
    matrix[places, :, places] = blocks
    return matrix.view(count * size, count * size)


def block_rotation(blocks: torch.Tensor, *, is_embedding: bool = False) -> Rotation:
    """Return the same, computed block by block."""
    return partial(_times_blocks, blocks if is_embedding else blocks.transpose(1, 2))


def _times_blocks(right: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    import torch

    parts = rows.reshape(-1, *right.shape[:2]).transpose(0, 1)
    return torch.bmm(parts, right).transpose(0, 1).reshape(rows.shape)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """Return (I - Q) (I + Q)^-1 of skew-symmetric blocks (blocks, size, size).

    A block that holds what is no number gives none, where PEFT stops: the caller's check of results says so.
    """
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype).unsqueeze(0).expand(skew.shape)
    result: torch.Tensor = torch.linalg.solve_ex(identity + skew, identity - skew, left=False).result
    return result


def rotation_bytes(columns: int, block_count: int, block_size: int) -> int:
    """Return the bytes that a rotation takes at most: the matrix, and some copies of its blocks, in float32."""
    return 4 * columns * columns + 6 * 4 * block_count * block_size * block_size
