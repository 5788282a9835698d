"""One tensor being computed: its updates' tensors in memory, its tiles read, updated, rounded.

The only module that does arithmetic on the base; importing it imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from rawmerge.blas_threads import BlasThreads
from rawmerge.dtypes import DTYPES
from rawmerge.errors import NonFiniteTensorError
from rawmerge.merge_plan import ReplaceTensor, UpdateTensor
from rawmerge.methods import METHODS
from rawmerge.methods.interface import PreparedUpdate, TileContext
from rawmerge.rounding import make_nans_canonical, may_overflow, newly_non_finite, round_into
from rawmerge.tensor_source import OpenFiles, TensorSource
from rawmerge.tiles import BLOCK_ELEMENTS, is_low, matrix_shape, tile_rows


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
        shape = (row_count, matrix_shape(self.step.source.shape)[1])
        before = self._read_tile(first_row, shape, scratch)
        result = scratch.tensor("result", shape, self._output_dtype)
        for first, count in self._blocks(shape):
            rows = slice(first, first + count)
            self._compute_block(before[rows], result[rows], first_row + first, scratch)
        return _as_bytes(result)

    def _blocks(self, shape: tuple[int, int]) -> Iterable[tuple[int, int]]:
        """Return (first row, row count) of the parts of a tile that are computed at a time."""
        return [(0, shape[0])] if self._is_low(shape[0]) else tile_rows(*shape, BLOCK_ELEMENTS)

    def _is_low(self, row_count: int) -> bool:
        """Whether these rows are the whole of a tensor whose product must be PEFT's own call."""
        rows, columns = matrix_shape(self.step.source.shape)
        return row_count == rows and is_low(rows, columns)

    def _compute_block(self, before: torch.Tensor, result: torch.Tensor, first_row: int, scratch: TileScratch) -> None:
        rows, columns = before.shape
        tile = scratch.tensor("tile", (rows, columns), self._tile_dtype)
        tile.copy_(before)
        # other threads' counts cost time, and more of it in spinning; so only where bits depend on it
        with self._blas.whole() if self._is_low(rows) else nullcontext():
            for update in self._updates():
                update.apply(tile, first_row, scratch)
        round_into(result, tile)
        self._check(result, tile, before)

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
        if may_overflow(tile, self._output_dtype):
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
