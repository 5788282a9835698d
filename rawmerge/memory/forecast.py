"""How much memory a merge will take, told from its plan.

The prediction is an upper bound for the usual case: Python with the plan, torch as it lies in memory after its import
if a step needs it, the buffers of each thread, and the adapter tensors and working memory of as many tensors as
threads work on at a time. A tile whose values overflow is computed by torch even where the kernel does all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

from rawmerge.combination import block_count, parts_of
from rawmerge.computing.factor_parts import PART_BYTES, right_layout, tile_height
from rawmerge.computing.large_factors import left_role
from rawmerge.computing.plain_pairs import PlainPair
from rawmerge.computing.shared_tensors import count_uses
from rawmerge.computing.step_paths import StepPaths
from rawmerge.dtypes import DTYPES
from rawmerge.engine.anonymous_memory import LARGE_FROM, large_pages, whole_pages
from rawmerge.engine.kept_ranges import JOB_BYTES, KeptRange, kept_ranges
from rawmerge.engine.shard_writer import BUFFER_BYTES
from rawmerge.engine.tiles import BLOCK_ELEMENTS, TILE_ELEMENTS, block_elements
from rawmerge.inputs.tensor_source import SCAN_BYTES, TensorSource
from rawmerge.memory.plan_size import plan_bytes
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, Step, UpdateTensor, matrix_of
from rawmerge.methods.interface import ROWS, WHOLE
from rawmerge.native.pair_kernel import FactorLayout

#: Resident memory of Python 3.11 with all of rawmerge but torch, on Linux.
PYTHON_BYTES: Final = 32 * 10**6
#: What importing torch 2.13 for the CPU adds, with its libraries' own buffers once they have multiplied.
TORCH_BYTES: Final = 219 * 10**6
#: What each thread takes on the torch path beside its tiles: libraries' own buffers and the allocator's pools. Measured
#: with 1 to 64 threads: up to 2.3 MB for each beyond the first.
THREAD_BYTES: Final = 2_300_000
#: What torch's libraries for decompositions and Fourier transforms take on top when they are first called.
LIBRARY_BYTES: Final = 30 * 10**6
#: What a thread takes that copies: its buffer, and as much of the source mapped while the system writes from it.
_COPY_BYTES: Final = 2 * BUFFER_BYTES
#: Elements of a tile that are compared with the base at a time.
_COMPARED_ELEMENTS: Final = 2**16


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tensor takes, in bytes.

    Attributes:
        name: of the tensor.
        held: its updates' tensors and working memory, while it is in work.
        needs_torch: whether torch is imported for it.
        step: what is done.
        pairs: what the kernel merges, none on the torch path.
    """

    name: str
    held: int
    needs_torch: bool
    step: UpdateTensor | ReplaceTensor
    pairs: tuple[PlainPair, ...]


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


class _Buffers:
    """What tiles take; a thread keeps the memory of the largest that it meets, and one without a tile takes none."""

    def __init__(self, tiles: Iterable[tuple[int, int]]) -> None:
        """Take (bytes of a tile, how many there are) of each tensor."""
        self._tiles = sorted(tiles, reverse=True)
        self.count = sum(count for _, count in self._tiles)

    def most(self, threads: int) -> int:
        """Return what so many threads take at most."""
        total = 0
        for size, count in self._tiles:
            total += size * min(count, threads)
            threads -= min(count, threads)
        return total


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
        self._python = PYTHON_BYTES + plan_bytes(steps, len(plan.adapters))
        self._aside = _aside_bytes(plan, changed)
        self._copy_jobs = sum(map(_copy_jobs, plan.shards))
        self._shard_count = len(plan.shards)
        self._largest = sorted(self._demands, key=lambda demand: -demand.held)
        self._tiles: dict[int, tuple[_Buffers, _Buffers]] = {}
        self._shared = _shared_bytes(self._demands, count_uses(plan.shards))
        trials = (_trial_bytes(pair) for at in self._demands if at.needs_torch for pair in at.pairs)
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
        by_torch, others = self._buffers(tile_elements)
        # shards are made one after the other, each by threads of its own, and the allocator keeps what those before had
        torch_threads = max(threads, 2) if self._shard_count > 1 and self.needs_torch else threads
        tiles = by_torch.most(torch_threads) + others.most(threads) + _COPY_BYTES * min(threads, self._copy_jobs)
        pools = THREAD_BYTES * max(0, min(torch_threads, by_torch.count) - 1)
        libraries = LIBRARY_BYTES if any(reach == WHOLE for _, reach, _ in self._whole) else 0
        held = self._largest[:torch_threads]
        return MemoryForecast(
            python=self._python,
            torch=TORCH_BYTES if self.needs_torch else 0,
            buffers=tiles + pools + self._aside,
            updates=sum(demand.held for demand in held) + libraries + self._trial,
            shared=self._shared if shared_bytes is None else min(self._shared, shared_bytes),
            whole=self._whole,
            largest=(held[0].name, held[0].held) if held else ("", 0),
            is_first=all(demand.pairs or not demand.needs_torch for demand in self._demands),
        )

    def with_torch(self) -> int:
        """Return what one thread with the lowest tiles takes where a tile is left to torch."""
        held = max((_update_bytes(demand.step, self._is_double) for demand in self._demands), default=0)
        return self.forecast(1, BLOCK_ELEMENTS, 0).peak + (0 if self.needs_torch else TORCH_BYTES) + held

    def _demand(self, step: UpdateTensor | ReplaceTensor, paths: StepPaths | None) -> Demand:
        pairs = paths.pairs(step) if paths else ()
        blocks = [paths.block(pair) for pair in pairs] if paths else []
        if pairs and 0 not in blocks:  # None: torch will be asked
            held = sum(right_layout(pair).packed_bytes for pair in pairs)
            return Demand(step.entry.name, held, None in blocks, step, pairs)
        return Demand(step.entry.name, _update_bytes(step, self._is_double), True, step, ())

    def _buffers(self, tile_elements: int) -> tuple[_Buffers, _Buffers]:
        """Return what tiles of this size take on the torch path and on the kernel's; of each a thread keeps one."""
        if tile_elements not in self._tiles:
            pairs = [demand.pairs for demand in self._demands if demand.pairs]
            steps = [demand.step for demand in self._demands if not demand.pairs]
            self._tiles[tile_elements] = (
                _Buffers(_tile_bytes(step, tile_elements, self._is_double) for step in steps),
                _Buffers(_pair_bytes(own, tile_elements) for own in pairs),
            )
        return self._tiles[tile_elements]


def forecast_memory(plan: MergePlan, threads: int, paths: StepPaths | None = None) -> MemoryForecast:
    """Return what running a plan on so many threads takes; by torch, unless told what computes its steps."""
    return MemoryForecaster(plan, paths).forecast(threads)


def _whole_demands(steps: Iterable[Step]) -> Iterator[tuple[str, str, int]]:
    for step in steps:
        for update in step.updates if isinstance(step, UpdateTensor) else ():
            if update.reach != ROWS:
                yield step.entry.name, update.reach, update.working_bytes


def _aside_bytes(plan: MergePlan, steps: Iterable[UpdateTensor | ReplaceTensor]) -> int:
    """Return what reading the adapter for checksums takes, of its file and of each tensor, and copying side files."""
    sizes = [source.byte_count for step in steps for source in _adapter_sources(step)]
    file = max((file.byte_count for file in plan.adapter_files), default=0)
    return min(SCAN_BYTES, file) + min(SCAN_BYTES, max(sizes, default=0)) + BUFFER_BYTES


def _copy_jobs(shard: ShardPlan) -> int:
    """Return how many jobs copy what is kept."""
    kept = (item.byte_count for item in kept_ranges(shard.steps) if isinstance(item, KeptRange))
    return sum(-(-count // JOB_BYTES) for count in kept)


def _adapter_sources(step: UpdateTensor | ReplaceTensor) -> Iterator[TensorSource]:
    for update in step.updates if isinstance(step, UpdateTensor) else ():
        yield from update.tensors.values()


def _shared_bytes(demands: Iterable[Demand], uses: Counter[TensorSource]) -> int:
    by_torch = (demand.step for demand in demands if not demand.pairs)
    sources = {source for step in by_torch for source in _adapter_sources(step)}
    return sum(source.byte_count for source in sources if uses[source] > 1)


def _update_bytes(step: UpdateTensor | ReplaceTensor, is_double: bool) -> int:
    if isinstance(step, ReplaceTensor):
        return 0
    compute, total = 8 if is_double else 4, sum(at.working_bytes for at in step.updates) * (2 if is_double else 1)
    for update in (part for at in step.updates for part in parts_of(at)):
        held = [source for role, source in update.tensors.items() if role != left_role(update)]
        upcast = sum(prod(source.shape) * compute for source in held if DTYPES[source.dtype].is_mergeable)
        total += sum(source.byte_count for source in held) + upcast
    return total


def _pair_bytes(pairs: Sequence[PlainPair], tile_elements: int) -> tuple[int, int]:
    """Return what one thread holds in the kernel's path, and of how many tiles.

    That is a tile as stored and as written, and the left factors' parts.
    """
    recipe = pairs[0].recipe
    rows = min(recipe.rows, *(tile_height(pair.recipe, tile_elements) for pair in pairs))
    stored, result = (_buffer_bytes(code, rows * recipe.columns) for code in (recipe.stored, recipe.result))
    lefts = (FactorLayout(rows, pair.recipe.rank, is_double=recipe.is_double).packed_bytes for pair in pairs)
    factors = sum(lefts) + max(_reading_bytes(pair, rows) for pair in pairs)
    return stored + (result if result != stored else 0) + factors, -(-recipe.rows // max(1, rows))


def _reading_bytes(pair: PlainPair, rows: int) -> int:
    """Return what reading a tile's part of a left factor takes, or the right one."""
    left_part = DTYPES[pair.left.source.dtype].byte_count(rows * pair.recipe.rank)
    return max(left_part, min(PART_BYTES, pair.right.source.byte_count))


def _buffer_bytes(code: str, elements: int) -> int:
    count = DTYPES[code].byte_count(elements)
    return large_pages(whole_pages(count)) if count >= LARGE_FROM else count


def _trial_bytes(pair: PlainPair) -> int:
    """Return what asking torch for its bits takes: its right factor, and blocks of torch's and of the kernel's."""
    block = block_elements(pair.recipe.columns) * (8 if pair.recipe.is_double else 4)
    return 2 * right_layout(pair).packed_bytes + 4 * block


def _tile_bytes(step: UpdateTensor | ReplaceTensor, tile_elements: int, is_double: bool) -> tuple[int, int]:
    """Return what one thread holds on the torch path, and of how many tiles.

    That is a tile as stored and as written, a block and its delta.
    """
    matrix = matrix_of(step)
    heights = [count for _, count in matrix.tiles(tile_elements)]
    elements = max(heights, default=0) * matrix.columns
    stored = DTYPES[step.source.dtype].byte_count(elements) + DTYPES[step.entry.dtype].byte_count(elements)
    stored += DTYPES[step.held_dtype].byte_count(elements) if step.held_dtype else 0
    block = min(elements, block_elements(matrix.columns))
    is_double = is_double or "F64" in (step.source.dtype, step.entry.dtype)
    # a low product is computed whole, however many elements it has
    deltas = block_count(step) * (8 if is_double else 4) * (elements if matrix.has_low else block)
    # float64 is rounded by way of float32, of which the ties are looked for
    blocks = deltas + (28 if is_double else 8) * block
    return stored + blocks + _other_dtype_bytes(step, elements, is_double), len(heights)


def _other_dtype_bytes(step: UpdateTensor | ReplaceTensor, elements: int, is_double: bool) -> int:
    """Return what comparing with the base takes where that has another dtype, and what the allocator keeps for it.

    Measured with 1 to 32 threads; where no dtype changes, it is within what each thread is given anyway.
    """
    widened = DTYPES[step.entry.dtype].byte_count(elements) - DTYPES[step.source.dtype].byte_count(elements)
    is_other = is_double or step.entry.dtype != step.source.dtype
    return max(0, widened) + (56 if is_double else 16) * _COMPARED_ELEMENTS * is_other
