"""One tensor being computed: its updates' tensors in memory, its tiles read, updated, rounded.

The only module that does arithmetic on the base; importing it imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from rawmerge.blas_threads import BlasThreads
from rawmerge.dtypes import DTYPES
from rawmerge.errors import NonFiniteTensorError
from rawmerge.merge_plan import ReplaceTensor, UpdateTensor
from rawmerge.methods import METHODS
from rawmerge.methods.interface import PreparedUpdate, TileContext
from rawmerge.rounding import has_overflow, make_nans_canonical, newly_non_finite, round_into
from rawmerge.tensor_source import OpenFiles, TensorSource
from rawmerge.tiles import matrix_shape


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a mergeable storage dtype code."""
    dtype = getattr(torch, DTYPES[code].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class TileScratch:
    """Buffers that one thread reuses for all its tiles, grown to the largest tile it meets."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def tensor(self, slot: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor of (rows, columns), the same memory at every call with this slot."""
        byte_count = shape[0] * shape[1] * dtype.itemsize
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < byte_count:
            # torch allocates at multiples of 64 bytes, so every dtype's view is aligned
            buffer = self._buffers[slot] = torch.empty(byte_count, dtype=torch.uint8)
        return buffer[:byte_count].view(dtype).view(shape)


class TensorComputer:
    """Computes the tiles of one step, in any order, from any thread.

    Attributes:
        step: what is computed.
        changed: whether an element is known to differ from what it was before the updates.
    """

    def __init__(
        self, step: UpdateTensor | ReplaceTensor, files: OpenFiles, blas: BlasThreads, compute_dtype: str
    ) -> None:
        self.step = step
        self.changed = isinstance(step, ReplaceTensor)
        self._files = files
        self._blas = blas
        self._source_dtype = torch_dtype(step.source.dtype)
        self._output_dtype = torch_dtype(step.entry.dtype)
        base_dtype = torch_dtype(step.base_dtype) if isinstance(step, UpdateTensor) else self._source_dtype
        is_double = compute_dtype == "float64" or torch.float64 in (base_dtype, self._output_dtype)
        # PEFT, too, computes in float64 where the base is: it gives adapter tensors the base's dtype
        self._tile_dtype = torch.float64 if is_double else torch.float32
        # PEFT rounds some things to the base's dtype on the way; where it has no say, that would only lose precision
        is_peft = base_dtype == self._output_dtype and compute_dtype == "float32"
        self._rounding_dtype = base_dtype if is_peft else None
        self._lock = threading.Lock()
        self._prepared: tuple[PreparedUpdate, ...] | None = None

    def compute(self, first_row: int, row_count: int, scratch: TileScratch) -> memoryview:
        """Return the finished bytes of a tile; they stay valid until the thread's next tile.

        Args:
            first_row: the tile's first row.
            row_count: how many rows.
            scratch: the calling thread's buffers.

        Raises:
            NonFiniteTensorError: a value overflowed, or became NaN, where the base is finite.
            InputChangedError: a file ended early.
        """
        rows, columns = matrix_shape(self.step.source.shape)
        shape = (row_count, columns)
        before = self._read_tile(first_row, shape, scratch)
        tile = scratch.tensor("tile", shape, self._tile_dtype)
        tile.copy_(before)
        updates = self._updates()
        with self._blas.whole() if updates and row_count == rows else nullcontext():
            for update in updates:
                update.apply(tile, first_row, scratch)
        result = scratch.tensor("result", shape, self._output_dtype)
        round_into(result, tile)
        self._check(result, tile, before)
        return _as_bytes(result)

    def _read_tile(self, first_row: int, shape: tuple[int, int], scratch: TileScratch) -> torch.Tensor:
        """Return the rows as they are before the updates, in the dtype in which PEFT would hold them."""
        stored = scratch.tensor("stored", shape, self._source_dtype)
        offset = self.step.source.offset + first_row * shape[1] * self._source_dtype.itemsize
        self._files.read_into(self.step.source.path, offset, _as_bytes(stored))
        if self._rounding_dtype in (None, self._source_dtype):
            return stored
        rounded = scratch.tensor("rounded", shape, self._rounding_dtype)
        round_into(rounded, stored)
        return rounded

    def _check(self, result: torch.Tensor, tile: torch.Tensor, before: torch.Tensor) -> None:
        if has_overflow(tile, self._output_dtype):
            if newly_non_finite(result, before):
                raise NonFiniteTensorError(self.step.entry.name, self.step.entry.dtype)
            make_nans_canonical(result)
        if not self.changed and isinstance(self.step, UpdateTensor) and self.step.updates:
            unchanged = torch.empty_like(result)
            round_into(unchanged, before.to(tile.dtype))
            # NaN differs from itself, so a tensor of NaNs counts as changed; it is no evidence of a lost delta
            self.changed = not torch.equal(result, unchanged)

    def _updates(self) -> tuple[PreparedUpdate, ...]:
        with self._lock:
            if self._prepared is None:
                self._prepared = tuple(self._prepare())
            return self._prepared

    def _prepare(self) -> Iterator[PreparedUpdate]:
        context = TileContext(self.step.source.shape, self._tile_dtype, self._rounding_dtype)
        for update in self.step.updates if isinstance(self.step, UpdateTensor) else ():
            tensors = {role: self._read_tensor(source) for role, source in update.tensors.items()}
            yield METHODS[update.kind].prepare(update.settings, tensors, context)

    def _read_tensor(self, source: TensorSource) -> torch.Tensor:
        tensor = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
        self._files.read_into(source.path, source.offset, _as_bytes(tensor))
        return tensor


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
