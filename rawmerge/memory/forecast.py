"""How much memory a merge will take, told from its plan.

The prediction is an upper bound for the usual case: Python with the plan, torch as it lies in memory after its import
if a step needs it, the buffers of each thread, and the adapter tensors and working memory of as many tensors as
threads work on at a time. A tile whose values overflow is computed by torch even where the kernel does all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

from rawmerge.combination import parts_of
from rawmerge.computing.cast_steps import loses_in_cast
from rawmerge.computing.factor_parts import right_layout
from rawmerge.computing.large_factors import left_role
from rawmerge.computing.plain_pairs import PlainPair
from rawmerge.computing.shared_tensors import count_uses
from rawmerge.computing.step_paths import StepPaths
from rawmerge.dtypes import DTYPES
from rawmerge.engine.kept_ranges import JOB_BYTES, KeptRange, is_copied, kept_ranges
from rawmerge.engine.shard_writer import BUFFER_BYTES
from rawmerge.engine.tiles import BLOCK_ELEMENTS, TILE_ELEMENTS
from rawmerge.inputs.tensor_source import SCAN_BYTES, TensorSource
from rawmerge.memory.plan_size import plan_bytes, table_bytes
from rawmerge.memory.tile_memory import Buffers, PairBuffers, cast_bytes, tile_bytes, trial_bytes
from rawmerge.memory.torch_need import TorchNeed, torch_need, torch_reason
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, Step, UpdateTensor
from rawmerge.methods.interface import ROWS, WHOLE

#: Resident memory of Python 3.11 with all of rawmerge but torch, on Linux.
PYTHON_BYTES: Final = 32 * 10**6
#: What importing torch 2.13 for the CPU adds, with its libraries' own buffers once they have multiplied.
TORCH_BYTES: Final = 219 * 10**6
#: What each thread takes on the torch path beside its tiles: libraries' own buffers and the allocator's pools. Measured
#: with 1 to 64 threads: up to 2.6 MB for each.
THREAD_BYTES: Final = 2_600_000
#: What torch's libraries for decompositions and Fourier transforms take on top when they are first called.
LIBRARY_BYTES: Final = 30 * 10**6
#: What a thread takes that copies: its buffer, and as much of the source mapped while the system writes from it.
_COPY_BYTES: Final = 2 * BUFFER_BYTES


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tensor takes, in bytes.

    Attributes:
        name: of the tensor.
        held: its updates' tensors and working memory, while it is in work.
        need: why torch is imported for it; empty where it is not.
        step: what is done.
        pairs: what the kernel merges, none on the torch path.
    """

    name: str
    held: int
    need: str
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
        need: what torch is needed for.
    """

    python: int
    torch: int
    buffers: int
    updates: int
    shared: int
    whole: tuple[tuple[str, str, int], ...]
    largest: tuple[str, int]
    need: TorchNeed

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
        self._compute_dtype = plan.options.compute_dtype
        self._is_double = self._compute_dtype == "float64"
        steps = list(plan.steps())
        changed = [step for step in steps if not isinstance(step, KeepTensor) and not is_copied(step)]
        self._demands = [self._demand(step, paths) for step in changed]
        self._need = torch_need((demand.need, demand.name) for demand in self._demands if demand.need)
        self._python = PYTHON_BYTES + plan_bytes(steps, len(plan.adapters)) + table_bytes(plan)
        self._aside = _aside_bytes(plan, changed)
        self._copy_jobs = sum(map(_copy_jobs, plan.shards))
        self._shard_count = len(plan.shards)
        self._largest = sorted(self._demands, key=lambda demand: -demand.held)
        self._tiles: dict[int, tuple[Buffers, PairBuffers, Buffers]] = {}
        self._shared = _shared_bytes(self._demands, count_uses(plan.shards))
        trials = (trial_bytes(pair) for at in self._demands if at.need for pair in at.pairs)
        self._trial = max(trials, default=0)  # they are made one after the other
        self._whole = tuple(sorted(_whole_demands(changed), key=lambda item: -item[2]))

    @property
    def needs_torch(self) -> bool:
        """Whether torch is imported, as far as the plan and this machine's certificates tell."""
        return any(demand.need for demand in self._demands)

    def forecast(
        self, threads: int, tile_elements: int = TILE_ELEMENTS, shared_bytes: int | None = None
    ) -> MemoryForecast:
        """Return what it takes.

        Args:
            threads: how many work.
            tile_elements: elements of a tile.
            shared_bytes: what is kept at most of adapter tensors that several steps read; None for all.
        """
        by_torch, others, casts = self._buffers(tile_elements)
        # shards are made one after the other, each by threads of its own, and the allocator keeps what those before had
        torch_threads = max(threads, 2) if self._shard_count > 1 and self.needs_torch else threads
        tiles = by_torch.most(torch_threads) + casts.most(torch_threads) + others.most(threads)
        tiles += _COPY_BYTES * min(threads, self._copy_jobs)
        pools = THREAD_BYTES * min(torch_threads, by_torch.count)
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
            need=self._need,
        )

    def with_torch(self) -> int:
        """Return what one thread with the lowest tiles takes where a tile is left to torch."""
        held = max((_update_bytes(demand.step, self._is_double) for demand in self._demands), default=0)
        return self.forecast(1, BLOCK_ELEMENTS, 0).peak + (0 if self.needs_torch else TORCH_BYTES) + held

    def _demand(self, step: UpdateTensor | ReplaceTensor, paths: StepPaths | None) -> Demand:
        pairs = paths.pairs(step) if paths else ()
        blocks = [paths.block(pair) for pair in pairs] if paths else []
        has_kernel = bool(paths and paths.certificates)
        need = torch_reason(step, blocks, self._compute_dtype, has_kernel=has_kernel)
        if pairs and 0 not in blocks:  # None: torch will be asked
            held = sum(right_layout(pair).packed_bytes for pair in pairs)
            return Demand(step.entry.name, held, need, step, pairs)
        return Demand(step.entry.name, _update_bytes(step, self._is_double), need, step, ())

    def _buffers(self, tile_elements: int) -> tuple[Buffers, PairBuffers, Buffers]:
        """Return what tiles of this size take on the torch path and on the kernel's, and what counting casts does.

        A thread keeps one of each.
        """
        if tile_elements not in self._tiles:
            pairs = [demand.pairs for demand in self._demands if demand.pairs]
            steps = [demand.step for demand in self._demands if not demand.pairs]
            self._tiles[tile_elements] = (
                Buffers(tile_bytes(step, tile_elements, self._is_double) for step in steps),
                PairBuffers(pairs, tile_elements),
                Buffers(cast_bytes(step, tile_elements, self._is_double) for step in steps if loses_in_cast(step)),
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
