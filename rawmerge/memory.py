"""How much memory a merge will take, told from its plan.

The prediction is an upper bound for the usual case: Python with the plan, torch as it lies in memory after its import
if a step needs it, the buffers of each thread, and the adapter tensors and working memory of as many tensors as
threads work on at a time. A tile whose values overflow is computed by torch even where the kernel does all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import nlargest
from math import prod
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.factor_parts import PART_BYTES, right_layout, tile_height
from rawmerge.large_factors import left_role
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, Step, Update, UpdateTensor, matrix_of
from rawmerge.methods.interface import COLUMNS, ROWS, WHOLE
from rawmerge.native.pair_kernel import FactorLayout
from rawmerge.plain_pairs import PlainPair
from rawmerge.shared_tensors import count_uses
from rawmerge.step_paths import StepPaths
from rawmerge.tensor_source import SCAN_BYTES, TensorSource
from rawmerge.tiles import BLOCK_ELEMENTS, ROW_BLOCK, TILE_ELEMENTS

#: Resident memory of Python 3.11 with all of rawmerge but torch, on Linux.
PYTHON_BYTES: Final = 32 * 10**6
#: What a planned tensor takes: one that is changed, with its updates and names, and one that is kept.
CHANGED_BYTES: Final = 5500
KEPT_BYTES: Final = 1200
#: What importing torch 2.13 for the CPU adds, with its libraries' own buffers once they have multiplied.
TORCH_BYTES: Final = 217 * 10**6
#: What each thread takes on the torch path beside its tiles: libraries' own buffers and the allocator's pools. Measured
#: with 1, 2, 3 and 8 threads: up to 2.3 MB for each beyond the first two.
THREAD_BYTES: Final = 2_300_000
#: What torch's libraries for decompositions and Fourier transforms take on top when they are first called.
LIBRARY_BYTES: Final = 30 * 10**6
#: Each thread's buffer for what is copied.
_COPY_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tensor takes, in bytes.

    Attributes:
        name: of the tensor.
        held: its updates' tensors and working memory, while it is in work.
        needs_torch: whether torch is imported for it.
        step: what is done.
        pair: what the kernel merges, None on the torch path.
    """

    name: str
    held: int
    needs_torch: bool
    step: UpdateTensor | ReplaceTensor
    pair: PlainPair | None


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes that a merge takes at its peak.

    Attributes:
        python: the interpreter, rawmerge and the plan.
        torch: torch; 0 where no step needs it.
        buffers: tiles of all threads.
        updates: adapter tensors, and what their arithmetic takes.
        shared: adapter tensors that are kept for further steps.
        whole: output tensors that must be in memory whole, the largest demands first: (name, reach, bytes).
        largest: the tensor that takes most while it is in work, and what it takes; an empty name for none.
        is_first: whether torch is needed only to be asked how it sums, which is remembered.
    """

    python: int
    torch: int
    buffers: int
    updates: int
    shared: int
    whole: tuple[tuple[str, str, int], ...]
    largest: tuple[str, int]
    is_first: bool = False

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.python + self.torch + self.buffers + self.updates + self.shared


class MemoryForecaster:
    """What one plan takes, for any number of threads and any size of tiles."""

    def __init__(self, plan: MergePlan, paths: StepPaths | None = None) -> None:
        """Look at every step once.

        Args:
            plan: what will be run.
            paths: what computes its steps; None for torch.
        """
        self._is_double = plan.options.compute_dtype == "float64"
        steps = list(plan.steps())
        changed = [step for step in steps if not isinstance(step, KeepTensor)]
        self._demands = [self._demand(step, paths) for step in changed]
        self._python = PYTHON_BYTES + CHANGED_BYTES * len(changed) + KEPT_BYTES * (len(steps) - len(changed))
        self._aside = _aside_bytes(plan, changed)
        self._copies = _COPY_BYTES if len(changed) < len(steps) else 0
        self._shared = _shared_bytes(self._demands, count_uses(plan.shards))
        trials = (_trial_bytes(at.pair) for at in self._demands if at.pair and at.needs_torch)
        self._trial = max(trials, default=0)  # they are made one after the other
        self._whole = tuple(sorted(_whole_demands(changed), key=lambda item: -item[2]))

    @property
    def needs_torch(self) -> bool:
        """Whether torch is imported, as far as the plan and this machine's certificates tell."""
        return any(demand.needs_torch for demand in self._demands)

    def forecast(
        self, threads: int, tile_elements: int = TILE_ELEMENTS, shared_bytes: int | None = None
    ) -> MemoryForecast:
        """Return what it takes.

        Args:
            threads: how many work.
            tile_elements: elements of a tile.
            shared_bytes: what is kept at most of adapter tensors that several steps read; None for all.
        """
        buffers = [self._buffer_bytes(demand, tile_elements) for demand in self._demands]
        by_torch = [size for size, demand in zip(buffers, self._demands, strict=True) if demand.pair is None]
        others = [size for size, demand in zip(buffers, self._demands, strict=True) if demand.pair is not None]
        tiles = max(by_torch, default=0) + max(others, default=0)
        pools = THREAD_BYTES * max(0, threads - 2)
        libraries = LIBRARY_BYTES if any(reach == WHOLE for _, reach, _ in self._whole) else 0
        held = nlargest(threads, self._demands, key=lambda demand: demand.held)
        return MemoryForecast(
            python=self._python,
            torch=TORCH_BYTES if self.needs_torch else 0,
            buffers=threads * (tiles + self._copies) + self._aside + (pools if by_torch else 0),
            updates=sum(demand.held for demand in held) + libraries + self._trial,
            shared=self._shared if shared_bytes is None else min(self._shared, shared_bytes),
            whole=self._whole,
            largest=(held[0].name, held[0].held) if held else ("", 0),
            is_first=all(demand.pair or not demand.needs_torch for demand in self._demands),
        )

    def with_torch(self) -> int:
        """Return what one thread with the lowest tiles takes where a tile is left to torch."""
        held = max((_update_bytes(demand.step, self._is_double) for demand in self._demands), default=0)
        return self.forecast(1, BLOCK_ELEMENTS, 0).peak + (0 if self.needs_torch else TORCH_BYTES) + held

    def _demand(self, step: UpdateTensor | ReplaceTensor, paths: StepPaths | None) -> Demand:
        pair = paths.pair(step) if paths else None
        block = paths.block(pair) if paths and pair else 0
        if pair and (block or block is None):
            return Demand(step.entry.name, right_layout(pair).packed_bytes, not block, step, pair)
        return Demand(step.entry.name, _update_bytes(step, self._is_double), True, step, None)

    def _buffer_bytes(self, demand: Demand, tile_elements: int) -> int:
        if demand.pair:
            return _pair_bytes(demand.pair, tile_elements)
        return _tile_bytes(demand.step, tile_elements, self._is_double)


def forecast_memory(plan: MergePlan, threads: int, paths: StepPaths | None = None) -> MemoryForecast:
    """Return what running a plan on so many threads takes; by torch, unless told what computes its steps."""
    return MemoryForecaster(plan, paths).forecast(threads)


def describe_reach(update: Update) -> str:
    """Return what an update needs beyond its own rows, in words; empty for nothing."""
    return {COLUMNS: "the base read twice", WHOLE: "the whole tensor in memory"}.get(update.reach, "")


def _whole_demands(steps: Iterable[Step]) -> Iterator[tuple[str, str, int]]:
    for step in steps:
        for update in step.updates if isinstance(step, UpdateTensor) else ():
            if update.reach != ROWS:
                yield step.entry.name, update.reach, update.working_bytes


def _aside_bytes(plan: MergePlan, steps: Iterable[UpdateTensor | ReplaceTensor]) -> int:
    """Return what reading the adapter for checksums takes, of its file and of each tensor, and copying side files."""
    sizes = [source.byte_count for step in steps for source in _adapter_sources(step)]
    file = max((file.byte_count for file in plan.adapter_files), default=0)
    return min(SCAN_BYTES, file) + min(SCAN_BYTES, max(sizes, default=0)) + _COPY_BYTES


def _adapter_sources(step: UpdateTensor | ReplaceTensor) -> Iterator[TensorSource]:
    for update in step.updates if isinstance(step, UpdateTensor) else ():
        yield from update.tensors.values()


def _shared_bytes(demands: Iterable[Demand], uses: Counter[TensorSource]) -> int:
    by_torch = (demand.step for demand in demands if demand.pair is None)
    sources = {source for step in by_torch for source in _adapter_sources(step)}
    return sum(source.byte_count for source in sources if uses[source] > 1)


def _update_bytes(step: UpdateTensor | ReplaceTensor, is_double: bool) -> int:
    if isinstance(step, ReplaceTensor):
        return 0
    compute, total = 8 if is_double else 4, 0
    for update in step.updates:
        held = [source for role, source in update.tensors.items() if role != left_role(update)]
        upcast = sum(prod(source.shape) * compute for source in held if DTYPES[source.dtype].is_mergeable)
        total += sum(source.byte_count for source in held) + upcast
        total += update.working_bytes * (2 if is_double else 1)
    return total


def _pair_bytes(pair: PlainPair, tile_elements: int) -> int:
    """Return what one thread holds in the kernel's path: a tile as stored and as written, and its left factor."""
    recipe = pair.recipe
    rows = min(recipe.rows, tile_height(recipe, tile_elements))
    stored, result = (DTYPES[code].byte_count(rows * recipe.columns) for code in (recipe.stored, recipe.result))
    left = FactorLayout(rows, recipe.rank, is_double=recipe.is_double).packed_bytes
    left_part = DTYPES[pair.left.source.dtype].byte_count(rows * recipe.rank)
    part = max(left_part, min(PART_BYTES, pair.right.source.byte_count))
    return stored + (result if result != stored else 0) + left + part


def _trial_bytes(pair: PlainPair) -> int:
    """Return what asking torch for its bits takes: its right factor, and blocks of torch's and of the kernel's."""
    block = _block_elements(pair.recipe.columns) * (8 if pair.recipe.is_double else 4)
    return 2 * right_layout(pair).packed_bytes + 4 * block


def _tile_bytes(step: UpdateTensor | ReplaceTensor, tile_elements: int, is_double: bool) -> int:
    """Return what one thread holds on the torch path: a tile as stored and as written, a block and its delta."""
    matrix = matrix_of(step)
    elements = max((count for _, count in matrix.tiles(tile_elements)), default=0) * matrix.columns
    stored = DTYPES[step.source.dtype].byte_count(elements) + DTYPES[step.entry.dtype].byte_count(elements)
    block = min(elements, _block_elements(matrix.columns))
    is_double = is_double or "F64" in (step.source.dtype, step.entry.dtype)
    # float64 is rounded by way of float32, of which the ties are looked for
    return stored + (28 if is_double else 8) * block


def _block_elements(columns: int) -> int:
    return max(BLOCK_ELEMENTS, ROW_BLOCK * columns)
