"""Deltas of several adapters that are pruned, weighed against each other and mixed, tile by tile. Imports torch.

Each delta is what its adapter alone would add, scaling included, in compute dtype; the weights come after the pruning,
so that signs are elected by what the adapters hold. The caller adds the mix to the base and rounds once.

Source: PEFT 0.21.2 `utils/merge_utils.py`: `prune`, `task_arithmetic`, `magnitude_prune`, `ties`, `dare_linear`,
`dare_ties`, in their order of operations; `tuners/lora/model.py`: `_svd_generalized_task_arithmetic_weighted_adapter`
calls them with deltas, and leaves out adapters without the module. TIES: https://arxiv.org/abs/2306.01708; DARE:
https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import nan

import torch

from rawmerge.combination import Combination
from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.magnitudes import kth_magnitude
from rawmerge.computing.random_masks import RandomMask, mask_key
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.engine.tiles import BLOCK_ELEMENTS, Matrix, tile_rows
from rawmerge.merge_plan import Update
from rawmerge.methods.interface import PreparedUpdate, Scratch


@dataclass(frozen=True, slots=True)
class PreparedTask:
    """One adapter's delta of a tensor.

    Attributes:
        updates: what adds up to it.
        weight: by what it is multiplied at last.
        threshold: the magnitude from which on elements are kept, None where size does not matter; NaN keeps none.
        mask: which elements are kept by chance, None where it has no say.
    """

    updates: tuple[PreparedUpdate, ...]
    weight: float
    threshold: float | None = None
    mask: RandomMask | None = None

    def add_to(self, zeros: torch.Tensor, first_row: int, scratch: Scratch) -> torch.Tensor:
        """Return rows (rows, columns) from `first_row` on of the whole delta, in the memory of `zeros`."""
        for update in self.updates:
            update.apply(zeros, first_row, scratch)
        return zeros

    def prune(self, delta: torch.Tensor, first_row: int) -> None:
        """Make those elements 0, in place, that are not kept; elements as large as the smallest that is are kept too.

        PEFT keeps an exact number, and of equal ones at the edge some or others.
        """
        if self.threshold is not None:
            delta.mul_(delta.abs() >= self.threshold)
        if self.mask is not None:
            kept = self.mask.kept(first_row * delta.shape[1], delta.numel())
            delta.mul_(kept.view(delta.shape)).div_(self.mask.density)


@dataclass(frozen=True, slots=True)
class PreparedCombination:
    """The mix of a tensor's deltas; it stays on the processor, where the thresholds were found.

    Attributes:
        tasks: the deltas, in the order in which they are summed.
        divisor: of the sum.
        majority: `total` or `frequency`, empty where no signs are elected.
    """

    tasks: tuple[PreparedTask, ...]
    divisor: int
    majority: str

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add the mix's rows to `tile` (rows, columns), in place."""
        deltas = []
        for place, task in enumerate(self.tasks):
            zeros = _zeros(f"task {place}", tile, scratch)
            deltas.append(task.add_to(zeros, first_row, scratch))
            task.prune(deltas[-1], first_row)
        weights = [task.weight for task in self.tasks]
        if self.majority:
            mixed = _disjoint_mean(deltas, weights, self.majority, scratch)
        else:
            mixed = _sum(deltas, weights, scratch)
        tile.add_(mixed.div_(self.divisor) if self.divisor != 1 else mixed)


def _zeros(slot: str, like: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    return scratch.tensor(slot, (like.shape[0], like.shape[1]), like.dtype).zero_()


def _sum(deltas: Sequence[torch.Tensor], weights: Sequence[float], scratch: Scratch) -> torch.Tensor:
    """Return the weighted sum; each product is rounded, then each sum, from the first to the last."""
    total = _zeros("mixed", deltas[0], scratch)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta.mul_(weight))
    return total


def _disjoint_mean(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], majority: str, scratch: Scratch
) -> torch.Tensor:
    """Return the mean of what has the sign that most have, of each element; 0 has no sign, and counts for nobody."""
    elected = _zeros("elected", deltas[0], scratch)
    signs = _zeros("signs", deltas[0], scratch)
    for delta in deltas:
        elected.add_(delta if majority == "total" else torch.sign(delta, out=signs))
    is_positive = elected >= 0
    total, count = _zeros("mixed", deltas[0], scratch), elected.zero_()
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(is_positive, delta > 0, delta < 0)
        total.add_(delta.mul_(weight).mul_(agrees))
        count.add_(agrees)
    return total.div_(count.clamp_(min=1))


def prepare_combination(
    combination: Combination,
    prepare: Callable[[Update], PreparedUpdate],
    matrix: Matrix,
    dtype: torch.dtype,
    blas: BlasThreads,
) -> PreparedCombination:
    """Return a combination with all its updates in memory, and the thresholds found where size decides.

    Args:
        combination: what is combined.
        prepare: gives one of its updates, ready to be applied.
        matrix: the tensor's, for thresholds are found in deltas cut as the merge cuts them: their bits must agree.
        dtype: of the arithmetic.
        blas: the merge's thread count.
    """
    tasks = []
    for task in combination.tasks:
        prepared = PreparedTask(tuple(map(prepare, task.updates)), task.weight)
        if combination.prunes_by_magnitude:
            kept = combination.kept_of(matrix.rows * matrix.columns)
            prepared = replace(prepared, threshold=_threshold(prepared, kept, matrix, dtype, blas))
        if combination.prunes_by_chance:
            key = mask_key(combination.seed, combination.tensor, task.place)
            prepared = replace(prepared, mask=RandomMask(key, combination.density))
        tasks.append(prepared)
    majority = combination.majority_sign if combination.elects_signs else ""
    divisor = combination.count if combination.how == "average" else 1
    return PreparedCombination(tuple(tasks), divisor, majority)


def _threshold(task: PreparedTask, kept: int, matrix: Matrix, dtype: torch.dtype, blas: BlasThreads) -> float:
    """Return the smallest magnitude of a delta's elements of which so many are kept, NaN where none is."""
    return kth_magnitude(lambda: _deltas(task, matrix, dtype, blas), kept, dtype) if kept else nan


def _deltas(task: PreparedTask, matrix: Matrix, dtype: torch.dtype, blas: BlasThreads) -> Iterator[torch.Tensor]:
    """Yield a delta's rows in blocks; each is valid until the next."""
    scratch = TileScratch()
    for first, count, is_whole in blocks(matrix):
        zeros = scratch.tensor("delta of all", (count, matrix.columns), dtype).zero_()
        with blas.whole() if is_whole else nullcontext():
            delta = task.add_to(zeros, first, scratch)
        yield delta


def blocks(matrix: Matrix) -> Iterator[tuple[int, int, bool]]:
    """Yield (first row, row count) of what is computed at a time, and whether by the very call that PEFT makes."""
    for top, height in matrix.tiles():
        stretch = matrix.stretch_at(top)
        is_whole = height == stretch.row_count and stretch.is_low
        cuts = [(0, height)] if is_whole else tile_rows(height, matrix.columns, BLOCK_ELEMENTS)
        yield from ((top + first, count, is_whole) for first, count in cuts)
