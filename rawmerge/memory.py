"""How much memory a merge will take, told from its plan.

The prediction is an upper bound for the usual case: torch as it lies in memory after its import, the buffers of each
thread, and the adapter tensors and working memory of as many tensors as threads work on at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest
from math import prod
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, Update, UpdateTensor, matrix_of
from rawmerge.methods.interface import COLUMNS, ROWS, WHOLE
from rawmerge.tiles import BLOCK_ELEMENTS

#: Resident memory of a process that has imported torch 2.13 for the CPU on Linux, with Python and rawmerge.
TORCH_BYTES: Final = 225 * 10**6
#: What torch's libraries for decompositions and Fourier transforms take on top when they are first called.
LIBRARY_BYTES: Final = 30 * 10**6


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes that a merge takes at its peak.

    Attributes:
        torch: the interpreter and torch.
        buffers: tiles of all threads.
        updates: adapter tensors, and what their arithmetic takes.
        whole: output tensors that must be in memory whole, the largest demands first: (name, reach, bytes).
    """

    torch: int
    buffers: int
    updates: int
    whole: tuple[tuple[str, str, int], ...]

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.torch + self.buffers + self.updates


def forecast_memory(plan: MergePlan, threads: int) -> MemoryForecast:
    """Return what running a plan on so many threads will take."""
    is_double = plan.options.compute_dtype == "float64"
    steps = [step for step in plan.steps() if not isinstance(step, KeepTensor)]
    demands = [_update_bytes(step, is_double) for step in steps]
    buffers = max((_buffer_bytes(step, is_double) for step in steps), default=0)
    wide = [
        (step.entry.name, update.reach, update.working_bytes)
        for step in steps
        if isinstance(step, UpdateTensor)
        for update in step.updates
        if update.reach != ROWS
    ]
    return MemoryForecast(
        torch=TORCH_BYTES if steps else 0,
        buffers=threads * buffers,
        updates=sum(nlargest(threads, demands)) + (LIBRARY_BYTES if any(item[1] == WHOLE for item in wide) else 0),
        whole=tuple(sorted(wide, key=lambda item: -item[2])),
    )


def describe_reach(update: Update) -> str:
    """Return what an update needs beyond its own rows, in words; empty for nothing."""
    return {COLUMNS: "the base read twice", WHOLE: "the whole tensor in memory"}.get(update.reach, "")


def _update_bytes(step: UpdateTensor | ReplaceTensor, is_double: bool) -> int:
    if isinstance(step, ReplaceTensor):
        return 0
    compute = 8 if is_double else 4
    total = 0
    for update in step.updates:
        sources = update.tensors.values()
        upcast = sum(prod(source.shape) * compute for source in sources if DTYPES[source.dtype].is_mergeable)
        total += sum(source.byte_count for source in sources) + upcast
        total += update.working_bytes * (2 if is_double else 1)
    return total


def _buffer_bytes(step: UpdateTensor | ReplaceTensor, is_double: bool) -> int:
    """Return what one thread holds of a tensor: a tile as stored and as written, a block and its delta in compute."""
    matrix, compute = matrix_of(step), 8 if is_double else 4
    _, rows = next(iter(matrix.tiles()), (0, 0))
    elements = rows * matrix.columns
    stored = DTYPES[step.source.dtype].byte_count(elements) + DTYPES[step.entry.dtype].byte_count(elements)
    block = max(BLOCK_ELEMENTS, 64 * matrix.columns) if elements > BLOCK_ELEMENTS else elements
    return stored + 2 * block * compute
