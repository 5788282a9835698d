"""Which path computes a step: the compiled kernel where its bits are torch's, torch for everything else.

torch is imported only when a step needs it, or when it must be asked how it sums.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from rawmerge.byte_sizes import format_bytes
from rawmerge.computing.cast_loss import CastTally
from rawmerge.computing.cast_steps import loses_in_cast
from rawmerge.computing.pair_computer import PairComputer, PairScratch
from rawmerge.computing.shared_tensors import SharedTensors, count_uses
from rawmerge.computing.step_paths import StepPaths
from rawmerge.computing.survival import SurvivalTally
from rawmerge.errors import MergeError
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.memory.budget import MemoryBudget
from rawmerge.merge_plan import ROUNDING, ReplaceTensor, ShardPlan, Step, UpdateTensor, matrix_of
from rawmerge.native.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from rawmerge.computing.blas_threads import BlasThreads
    from rawmerge.computing.devices import Device
    from rawmerge.computing.tile_computer import TensorComputer, TileScratch


class StepComputer(Protocol):
    """Computes the tiles of one step, in any order, from any thread."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a finished row."""

    @property
    def changed(self) -> bool:
        """Whether an element is known to differ from what it was before."""

    def tiles(self, tile_elements: int) -> Iterator[tuple[int, int]]:
        """Yield (first row, row count) of each tile."""

    @property
    def tally(self) -> SurvivalTally | CastTally | None:
        """Where what is left of the delta goes, or what a cast takes; None where nobody asks or there is neither."""

    @property
    def is_placed(self) -> bool:
        """Whether results are given as the whole pages of memory that they lie in, `phase` bytes behind the start."""

    def compute(self, first_row: int, row_count: int, phase: int = 0) -> memoryview:
        """Return the finished bytes of a tile, or the pages that they lie in, valid until the thread's next tile."""


class Computers:
    """Makes the computers of a merge's steps, and holds what they share."""

    def __init__(
        self,
        compute_dtype: str,
        paths: StepPaths,
        files: OpenFiles,
        budget: MemoryBudget,
        device: Device | None = None,
        *,
        measures: bool = False,
    ) -> None:
        self._device = device
        self._measures = measures
        self._budget = budget
        self._compute_dtype = compute_dtype
        self._paths = paths
        self._files = files
        self._shared: SharedTensors[torch.Tensor] = SharedTensors(Counter())
        self._blas_threads: BlasThreads | None = None
        self._lock = threading.Lock()
        self._local = threading.local()

    def expect(self, plans: Iterable[ShardPlan]) -> None:
        """Be told of the shards that will be asked for, whose shared tensors are then read once."""
        self._shared = SharedTensors(count_uses(plans), self._budget.shared_bytes)

    def needs_torch(self, step: Step) -> bool:
        """Whether torch must be imported before this step can be computed."""
        return self._paths.needs_torch(step)

    def load(self, steps: Iterable[Step]) -> None:
        """Import torch, and find out how it sums the products of these steps."""
        blas = self._blas()
        certificates = self._paths.certificates
        if certificates is None:
            return
        recipes = [pair.recipe for step in steps for pair in self._paths.pairs(step)]
        missing = certificates.missing(recipes)
        if missing:
            certificates.add(_tried(missing, blas))

    def computer(self, step: UpdateTensor | ReplaceTensor) -> StepComputer:
        """Return a computer for `step`; nothing is read yet."""
        tally = self._tally(step)
        by_torch = _TorchComputer(self, step, tally)
        if self._paths.needs_torch(step):
            return by_torch
        stages = [(pair, self._paths.block(pair) or 0) for pair in self._paths.pairs(step)]
        survival = tally if isinstance(tally, SurvivalTally) else None
        computer = PairComputer(stages, self._files, by_torch.rows, survival)
        return _PairComputer(computer, by_torch, self)

    def _tally(self, step: UpdateTensor | ReplaceTensor) -> SurvivalTally | CastTally | None:
        if not self._measures:
            return None
        matrix = matrix_of(step)
        if isinstance(step, ReplaceTensor) or not step.updates:
            return CastTally(step.entry.dtype, matrix.rows) if loses_in_cast(step) else None
        return SurvivalTally(matrix.rows, matrix.columns, 1 + sum(at.kind == ROUNDING for at in step.updates))

    def restore(self) -> None:
        """Give torch back what was changed of its settings."""
        if self._blas_threads:
            self._blas_threads.restore()

    def make(self, step: UpdateTensor | ReplaceTensor, tally: SurvivalTally | CastTally | None) -> TensorComputer:
        """Return torch's computer of a step."""
        from rawmerge.computing.cast_meter import CastMeter
        from rawmerge.computing.row_meter import RowMeter
        from rawmerge.computing.tile_computer import TensorComputer

        meter: RowMeter | CastMeter | None = CastMeter(tally) if isinstance(tally, CastTally) else None
        if isinstance(tally, SurvivalTally):
            meter = RowMeter(tally, is_compiled=self._paths.certificates is not None)
        return TensorComputer(
            step, self._files, self._shared, self._blas(), self._compute_dtype, self._device, meter=meter
        )

    def tile_scratch(self) -> TileScratch:
        """Return the calling thread's buffers on the torch path."""
        if not hasattr(self._local, "tiles"):
            from rawmerge.computing.tile_computer import TileScratch

            self._blas().adopt()
            self._local.tiles = TileScratch()
        scratch: TileScratch = self._local.tiles
        return scratch

    def pair_scratch(self) -> PairScratch:
        """Return the calling thread's buffers on the kernel's path."""
        if not hasattr(self._local, "pairs"):
            self._local.pairs = PairScratch()
        scratch: PairScratch = self._local.pairs
        return scratch

    def _blas(self) -> BlasThreads:
        with self._lock:
            if self._blas_threads is None:
                self._check_room()
                with _without_collection():
                    from rawmerge.computing.blas_threads import BlasThreads

                self._blas_threads = BlasThreads()
            return self._blas_threads

    def _check_room(self) -> None:
        """Do without torch rather than be killed.

        Raises:
            MergeError: there is no room for it.
        """
        if not self._budget.has_room_for_torch:
            raise MergeError(
                f"expected a merge without torch in {format_bytes(self._budget.limit or 0)}, found values that "
                "overflow, which only torch computes\n    hint: give it more memory"
            )


class _PairComputer:
    """A pair's computer with the calling thread's buffers, and the one that it leaves some tiles to."""

    def __init__(self, computer: PairComputer, careful: _TorchComputer, computers: Computers) -> None:
        self.tiles = computer.tiles
        self.row_bytes = computer.row_bytes
        self.tally = careful.tally
        self.is_placed = True
        self._computer = computer
        self._careful = careful
        self._computers = computers

    @property
    def changed(self) -> bool:
        return self._computer.changed or self._careful.changed

    def compute(self, first_row: int, row_count: int, phase: int = 0) -> memoryview:
        return self._computer.compute(first_row, row_count, self._computers.pair_scratch(), phase)


class _TorchComputer:
    """torch's computer of a step, made when its first tile comes up."""

    def __init__(
        self, computers: Computers, step: UpdateTensor | ReplaceTensor, tally: SurvivalTally | CastTally | None
    ) -> None:
        matrix = matrix_of(step)
        self.tally = tally
        self.tiles = matrix.tiles
        self.row_bytes = step.entry.byte_count // matrix.rows if matrix.rows else 0
        self.is_placed = False
        self._computers = computers
        self._step = step
        self._lock = threading.Lock()
        self._computer: TensorComputer | None = None

    @property
    def changed(self) -> bool:
        return self._computer is not None and self._computer.changed

    def compute(self, first_row: int, row_count: int, phase: int = 0) -> memoryview:  # noqa: ARG002  # a StepComputer
        return self._compute(first_row, row_count, None)

    def _compute(self, first_row: int, row_count: int, measured: range | None) -> memoryview:
        scratch = self._computers.tile_scratch()
        with self._lock:
            if self._computer is None:
                self._computer = self._computers.make(self._step, self.tally)
        return self._computer.compute(first_row, row_count, scratch, measured)

    def rows(self, first_row: int, row_count: int) -> memoryview:
        """Return the finished bytes of any rows, from whole tiles: cut otherwise, products would have other bits."""
        wanted, size = memoryview(bytearray(row_count * self.row_bytes)), self.row_bytes
        measured = range(first_row, first_row + row_count)  # the others are or will be the kernel's
        for first, count in self.tiles():
            start, stop = max(first, first_row), min(first + count, first_row + row_count)
            if start < stop:
                tile = self._compute(first, count, measured)
                part = tile[(start - first) * size : (stop - first) * size]
                wanted[(start - first_row) * size : (stop - first_row) * size] = part
        return wanted


def _tried(recipes: Iterable[Recipe], blas: BlasThreads) -> dict[Recipe, int]:
    from rawmerge.computing.calibration import find_block

    blas.adopt()
    return {recipe: find_block(recipe, blas) for recipe in recipes}


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from searching what an import makes: of torch's time that is a seventh."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
