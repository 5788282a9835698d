"""The rows of a tensor as they are before its updates, read into a thread's buffers. Importing it imports torch."""

from __future__ import annotations

from math import prod

import torch

from rawmerge.computing.overflow import beyond
from rawmerge.computing.rounding import may_overflow, newly_non_finite, round_into
from rawmerge.computing.tensor_reading import as_bytes, torch_dtype
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import ReplaceTensor, UpdateTensor


class BaseRows:
    """Reads a step's source, and what lies over its first rows, in any order, from any thread."""

    def __init__(
        self,
        step: UpdateTensor | ReplaceTensor,
        files: OpenFiles,
        rounding_dtype: torch.dtype | None,
        tile_dtype: torch.dtype,
    ) -> None:
        """Read nothing yet.

        Args:
            step: whose rows.
            files: where they are read from.
            rounding_dtype: the dtype in which PEFT would hold them, None where it has no say.
            tile_dtype: of the arithmetic.
        """
        self._step = step
        self._files = files
        self._rounding_dtype = rounding_dtype
        self._tile_dtype = tile_dtype
        self._overlay = step.overlay if isinstance(step, UpdateTensor) else None

    def read(self, first_row: int, shape: tuple[int, int], scratch: TileScratch) -> torch.Tensor:
        """Return rows (rows, columns) in a float dtype; they stay valid until the thread's next read.

        Raises:
            NonFiniteTensorError: what the adapter stores is too large for the dtype in which PEFT would hold it.
            InputChangedError: a file ended early.
        """
        overlay_rows = prod(self._overlay.shape) // shape[1] - first_row if self._overlay else 0
        if self._overlay is None or overlay_rows <= 0:
            stored = self._stored(self._step.source, first_row, shape, scratch)
            if self._rounding_dtype in (None, stored.dtype):
                return stored
            before = scratch.tensor("before", shape, self._rounding_dtype)
            self._round(before, stored)
            return before
        before = scratch.tensor("before", shape, self._rounding_dtype or self._tile_dtype)
        upper = min(overlay_rows, shape[0])
        self._round(before[:upper], self._stored(self._overlay, first_row, (upper, shape[1]), scratch))
        lower = shape[0] - upper, shape[1]
        self._round(before[upper:], self._stored(self._step.source, first_row + upper, lower, scratch))
        return before

    def _stored(
        self, source: TensorSource, first_row: int, shape: tuple[int, int], scratch: TileScratch
    ) -> torch.Tensor:
        """Return rows of a stored tensor, in its own dtype; they stay valid until the thread's next read."""
        stored = scratch.tensor("stored", shape, torch_dtype(source.dtype))
        offset = source.offset + first_row * shape[1] * stored.itemsize
        self._files.read_into(source.path, offset, as_bytes(stored))
        return stored

    def _round(self, before: torch.Tensor, stored: torch.Tensor) -> None:
        round_into(before, stored)
        is_narrower = torch.finfo(before.dtype).max < torch.finfo(stored.dtype).max
        if is_narrower and may_overflow(stored, before.dtype) and newly_non_finite(before, stored):
            raise beyond(stored, before).error(self._step.entry, is_whole=False)


def stored_dtypes(step: UpdateTensor | ReplaceTensor) -> list[torch.dtype]:
    """Return the dtypes in which a step's rows are stored."""
    overlay = step.overlay if isinstance(step, UpdateTensor) else None
    return [torch_dtype(source.dtype) for source in (step.source, overlay) if source]
