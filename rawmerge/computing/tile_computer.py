"""One tensor being computed: its updates' tensors in memory, its tiles read, updated, rounded.

The only module that does arithmetic on the base; importing it imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod

import torch

from rawmerge.combination import combination_of
from rawmerge.computing.base_rows import BaseRows, stored_dtypes
from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.cast_meter import CastMeter
from rawmerge.computing.device_tiles import updates_on
from rawmerge.computing.devices import Device, Lane
from rawmerge.computing.large_factors import left_role
from rawmerge.computing.last_cast import LastCast
from rawmerge.computing.overflow import Overflow, beyond
from rawmerge.computing.prepared_combination import prepare_combination
from rawmerge.computing.rounding import differs, make_nans_canonical, may_overflow, newly_non_finite, round_into
from rawmerge.computing.row_meter import RowMeter
from rawmerge.computing.shared_tensors import SharedTensors
from rawmerge.computing.sliced_lora import SlicedLora
from rawmerge.computing.stages import PreparedRounding, stages
from rawmerge.computing.survival import SUMS
from rawmerge.computing.tensor_reading import as_bytes, read_part, read_tensor
from rawmerge.computing.tensor_reading import torch_dtype as torch_dtype
from rawmerge.computing.tile_scratch import TileScratch as TileScratch  # the engine and tests take it from here
from rawmerge.computing.windowed_update import WindowedUpdate as WindowedUpdate
from rawmerge.engine.tiles import BLOCK_ELEMENTS, tile_rows
from rawmerge.errors import UnfitValuesError
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.merge_plan import COMBINATION, ROUNDING, SUMMED, ReplaceTensor, Update, UpdateTensor, matrix_of
from rawmerge.methods import METHODS
from rawmerge.methods.interface import WHOLE, PreparedUpdate, TileContext
from rawmerge.methods.lora import PreparedLora
from rawmerge.window import Window


class TensorComputer:
    """Computes the tiles of one step, in any order, from any thread.

    Attributes:
        step: what is computed.
        changed: whether an element is known to differ from what it was before the updates.
    """

    def __init__(  # noqa: PLR0913  # most are the merge's own, which all steps share
        self,
        step: UpdateTensor | ReplaceTensor,
        files: OpenFiles,
        shared: SharedTensors[torch.Tensor],
        blas: BlasThreads,
        compute_dtype: str,
        device: Device | None = None,
        *,
        meter: RowMeter | CastMeter | None = None,
    ) -> None:
        """Make the computer of a step; nothing is read yet.

        Args:
            step: what to compute.
            files: where tensors are read from.
            shared: the adapter's tensors that several steps use.
            blas: the merge's thread count.
            compute_dtype: `float32` or `float64`.
            device: where updates are computed if they can be, None for the CPU.
            meter: measures what is left of the delta, or counts what a cast takes; None for nobody.
        """
        self.step = step
        self.changed = isinstance(step, ReplaceTensor)
        self._matrix = matrix_of(step)
        self._meter = meter if isinstance(meter, RowMeter) else None
        self._casts = meter if isinstance(meter, CastMeter) else None
        self._files = files
        self._shared = shared
        self._blas = blas
        source_dtype = torch_dtype(step.source.dtype)
        self._last = LastCast(step)
        self._output_dtype = self._last.held_dtype
        base_dtype = torch_dtype(step.base_dtype) if isinstance(step, UpdateTensor) else source_dtype
        updates = step.updates if isinstance(step, UpdateTensor) else ()
        # what is only cast is rounded once, from its own dtype
        sources = () if updates else stored_dtypes(step)
        is_double = compute_dtype == "float64" or torch.float64 in (base_dtype, self._output_dtype, *sources)
        self._base_dtype = base_dtype
        # PEFT, too, computes in float64 where the base is: it gives adapter tensors the base's dtype
        self._tile_dtype = torch.float64 if is_double else torch.float32
        # PEFT rounds some things to the base's dtype on the way; where it has no say, that would only lose precision
        is_peft = base_dtype == self._output_dtype and compute_dtype == "float32"
        self._is_double = compute_dtype == "float64"
        self._rounding_dtype = base_dtype if is_peft and updates else None
        self._rows = BaseRows(step, files, self._rounding_dtype, self._tile_dtype)
        kinds = [update.kind for update in updates if update.kind != ROUNDING]
        # float64 is rounded once only if it is rounded at all: results stored so are the CPU's own
        place = None if self._output_dtype == torch.float64 or step.held_dtype else device
        stored = (source_dtype, base_dtype, self._output_dtype)
        self._there = updates_on(place, kinds, self._tile_dtype, stored)
        self._lock = threading.Lock()
        self._prepared: tuple[PreparedUpdate, ...] | None = None
        self._overflow: Overflow | None = None

    def compute(
        self, first_row: int, row_count: int, scratch: TileScratch, measured: range | None = None
    ) -> memoryview:
        """Return the finished bytes of a tile of one stretch; they stay valid until the thread's next tile.

        Args:
            first_row: the tile's first row.
            row_count: how many rows.
            scratch: the calling thread's buffers.
            measured: which rows go into the tally; None for all of the tile.

        Raises:
            NonFiniteTensorError: a value overflowed, or became NaN, where the base is finite.
            InputChangedError: a file ended early.
        """
        updates = self._updates()  # before the thread count is held still, which preparing may have to do itself
        if self._there is not None:
            result = self._there.attempt(updates, partial(self._compute_there, first_row, row_count))
            if result is not None:
                return as_bytes(result)
        rows = range(first_row, first_row + row_count)
        return as_bytes(self._compute_here(rows, updates, scratch, rows if measured is None else measured))

    def _compute_here(
        self, rows: range, updates: Sequence[PreparedUpdate], scratch: TileScratch, measured: range
    ) -> torch.Tensor:
        """Return a finished tile of one stretch, computed on the CPU."""
        first_row, row_count = rows.start, len(rows)
        shape = (row_count, self._matrix.columns)
        before = self._rows.read(first_row, shape, scratch)
        result = scratch.tensor("result", shape, self._output_dtype)
        stretch = self._matrix.stretch_at(first_row)
        own = stages(updates[place] for place in stretch.updates)
        # the whole of a low product must be PEFT's own call
        is_whole = row_count == stretch.row_count and stretch.is_low
        for first, count in [(0, row_count)] if is_whole else tile_rows(*shape, BLOCK_ELEMENTS):
            block, rounded = before[first : first + count], result[first : first + count]
            for stage, applied in own:
                if stage != own[0][0]:
                    block = scratch.tensor("between", (count, shape[1]), self._output_dtype).copy_(rounded)
                # other threads' counts cost time, and more of it in spinning; so only where bits depend on it
                with self._blas.whole() if is_whole else nullcontext():
                    tile = self._update_block(block, first_row + first, applied, scratch)
                round_into(rounded, tile)
                self._check(rounded, tile, block)
                if self._meter and applied:
                    self._meter.measure(first_row + first, (block, tile, rounded), measured, scratch, stage)
            if self._casts:
                self._casts.measure(tile, self._last.apply(rounded, scratch), scratch)
        return self._last.apply(result, scratch)

    def _compute_there(
        self, first_row: int, row_count: int, lane: Lane, updates: Sequence[PreparedUpdate], elements: int
    ) -> torch.Tensor:
        """Return the same, computed on a device, so many elements at a time; it lies in the CPU's memory."""
        shape = (row_count, self._matrix.columns)
        before = self._rows.read(first_row, shape, lane.host)
        result = lane.host.tensor("result", shape, self._output_dtype)
        own = stages(updates[place] for place in self._matrix.stretch_at(first_row).updates)
        sampled = self._meter.count(first_row, row_count) if self._meter and own[0][1] else 0
        sums, begun = lane.host.tensor("sums", (len(own) * sampled, SUMS), torch.float64), 0
        with lane.working():
            for first, count in tile_rows(*shape, elements):
                block, part = lane.upload(before[first : first + count]), sums[:0]
                rounded = lane.scratch.tensor("result", (count, shape[1]), self._output_dtype)
                for place, (_, applied) in enumerate(own):
                    if place:
                        block = lane.scratch.tensor("between", (count, shape[1]), self._output_dtype).copy_(rounded)
                    tile = self._update_block(block, first_row + first, applied, lane.scratch)
                    round_into(rounded, tile)
                    self._check(rounded, tile, block)
                    if self._meter and sampled:
                        part = self._meter.sums(first_row + first, (block, tile, rounded), lane.scratch)
                        start = place * sampled + begun
                        lane.download(part, sums[start : start + len(part)])
                lane.download(rounded, result[first : first + count])
                begun += len(part)
        for place, (stage, _) in enumerate(own):
            if self._meter and sampled:
                self._meter.put(first_row, sums[place * sampled : (place + 1) * sampled], stage)
        return result

    def _update_block(
        self, before: torch.Tensor, first_row: int, updates: Iterable[PreparedUpdate], scratch: TileScratch
    ) -> torch.Tensor:
        """Return the block (rows, columns) after its updates, in compute dtype."""
        rows, columns = before.shape
        tile = scratch.tensor("tile", (rows, columns), self._tile_dtype)
        tile.copy_(before)
        for update in updates:
            update.apply(tile, first_row, scratch)
        return tile

    def _check(self, result: torch.Tensor, tile: torch.Tensor, before: torch.Tensor) -> None:
        has_updates = isinstance(self.step, UpdateTensor) and self.step.updates
        if may_overflow(tile, self._output_dtype):
            if newly_non_finite(result, before):
                if has_updates:  # to compute all others first may take long
                    raise beyond(tile, result, before).error(self.step.entry, is_whole=False)
                raise self._overflow_of_all().error(self.step.entry, is_whole=True)
            make_nans_canonical(result)
        # a tensor of NaNs counts as changed: it is no evidence of a lost delta
        if not self.changed and has_updates and differs(result, before, tile.dtype):
            self.changed = True  # never back to False: another thread's tile may have changed meanwhile

    def _overflow_of_all(self) -> Overflow:
        """Return what overflows of a tensor that is only cast, in all of its tiles."""
        with self._lock:
            if self._overflow is None:
                self._overflow, scratch = Overflow(), TileScratch()
                for first, count in self._matrix.tiles(BLOCK_ELEMENTS):
                    before = self._rows.read(first, (count, self._matrix.columns), scratch)
                    result = torch.empty(before.shape, dtype=self._output_dtype)
                    round_into(result, before)
                    self._overflow += beyond(before, result)
            return self._overflow

    def _updates(self) -> tuple[PreparedUpdate, ...]:
        with self._lock:
            if self._prepared is None:
                self._prepared = tuple(self._prepare())
            return self._prepared

    def _prepare(self) -> Iterator[PreparedUpdate]:
        earlier: list[tuple[int, PreparedUpdate]] = []
        dtypes = self._base_dtype, self._rounding_dtype
        for place, update in enumerate(self.step.updates if isinstance(self.step, UpdateTensor) else ()):
            if update.kind == ROUNDING:  # what follows has the output so far for its base
                dtypes = self._output_dtype, None if self._is_double else self._output_dtype
                prepared: PreparedUpdate = PreparedRounding(self._output_dtype)
            elif update.kind == COMBINATION:  # no delta is rounded before its elements are compared
                prepare = partial(self._prepare_one, past=(), dtypes=(dtypes[0], None))
                own = combination_of(update)
                prepared = prepare_combination(own, prepare, self._matrix, self._tile_dtype, self._blas)
            else:
                prepared = self._prepare_one(update, tuple(earlier), dtypes)
            earlier.append((place, prepared))
            yield prepared

    def _prepare_one(
        self, update: Update, past: Sequence[tuple[int, PreparedUpdate]], dtypes: tuple[torch.dtype, torch.dtype | None]
    ) -> PreparedUpdate:
        sliced = left_role(update) if self._there is None else ""
        held = {role: source for role, source in update.tensors.items() if role != sliced}
        tensors = {role: self._shared.read(source, partial(read_tensor, self._files)) for role, source in held.items()}
        tensors |= {sliced: torch.empty(0)} if sliced else {}
        context = TileContext(
            shape=self._shape_of(update.window),
            compute_dtype=self._tile_dtype,
            rounding_dtype=None if update.settings.get(SUMMED) else dtypes[1],
            base_dtype=dtypes[0],
            tiles=partial(self._base_tiles, past, update.window),
        )
        # what sees the whole tensor makes PEFT's own calls, threads included; one at a time, for its memory
        is_whole = update.reach == WHOLE or any(stretch.is_low for stretch in self._matrix.stretches)
        with self._blas.whole() if is_whole else nullcontext():
            prepared = self._by_method(update, tensors, context)
        if sliced and isinstance(prepared, PreparedLora):
            prepared = SlicedLora(prepared, update.tensors[sliced], partial(read_part, self._files))
        return WindowedUpdate(prepared, update.window) if update.window else prepared

    def _by_method(self, update: Update, tensors: Mapping[str, torch.Tensor], context: TileContext) -> PreparedUpdate:
        try:
            return METHODS[update.kind].prepare(update.settings, tensors, context)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not mark it public
            found = f"base or adapter values that have none ({error})"
            raise UnfitValuesError(self.step.entry.name, "a decomposition", found) from error

    def _shape_of(self, window: Window | None) -> tuple[int, ...]:
        """Return the shape that an update meets."""
        shape = self.step.source.shape
        if window is None or not shape:
            return shape
        columns = len(range(self._matrix.columns)[window.columns(self._matrix.columns)])
        return (window.row_count, *(shape[1:] if columns == prod(shape[1:]) else (columns,)))

    def _base_tiles(
        self, earlier: Sequence[tuple[int, PreparedUpdate]], window: Window | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows) of what an update meets, after the updates before it."""
        scratch, columns = TileScratch(), self._matrix.columns
        part = window or Window(0, self._matrix.rows)
        for first, count in self._matrix.tiles(BLOCK_ELEMENTS):
            start, stop = max(first, part.row), min(first + count, part.row + part.row_count)
            if start >= stop:
                continue
            tile = scratch.tensor("tile", (count, columns), self._tile_dtype)
            tile.copy_(self._rows.read(first, (count, columns), scratch))
            for place, update in earlier:
                if place in self._matrix.stretch_at(first).updates:
                    update.apply(tile, first, scratch)
            yield start - part.row, tile[start - first : stop - first, part.columns(columns)]
