"""In which order torch's products are summed here, found by trial: the kernel's bits beside those of the torch path.

A matrix library sums each element of `B @ A` as a chain of fused multiply-adds, in blocks of the summed dimension
that depend on the library, the processor and the shape. The order does not depend on the values, so a comparison of all
elements of a random product of the same shape, cut as the torch path cuts it, tells the block, or that no block gives
torch's bits. Importing this imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

import torch

from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.rounding import round_into
from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.engine.tiles import BLOCK_ELEMENTS, is_low, tile_rows
from rawmerge.methods.lora import WHOLE_ELEMENTS, PreparedLora
from rawmerge.native.pair_kernel import PairKernel, pack_factor
from rawmerge.native.recipe import Recipe

#: Blocks that are tried, besides the whole sum and its halves: what matrix libraries use on x86-64.
_BLOCKS: Final = (192, 256, 384, 128, 320, 336, 240, 512)
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SCALING: Final = 1.3


def find_block(recipe: Recipe, blas: BlasThreads) -> int:
    """Return the block of the sum with which the kernel has torch's bits; 0 where there is none."""
    # float32 results show every bit of the product; the recipe's own dtypes show the roundings as well
    exact = replace(recipe, stored="F32", result="F32", rounds_delta=False)
    factors = _Factors(recipe)
    trials = [_Trial(wanted, factors, blas) for wanted in dict.fromkeys((exact, recipe))]
    factors.forget_torch()
    candidates = dict.fromkeys((recipe.rank, recipe.rank // 2, *_BLOCKS))
    fitting = (block for block in candidates if 0 < block <= recipe.rank)
    return next((block for block in fitting if all(trial.agrees(block) for trial in trials)), 0)


class _Factors:
    """Random factors of a recipe's shape, for torch and for the kernel.

    Of the left one only rows that a tile needs are ever touched, so that the others take no memory.
    """

    def __init__(self, recipe: Recipe) -> None:
        random = torch.Generator().manual_seed(20)
        self.tiles = list(_tiles(recipe))
        left = self._left(recipe, random)
        # as (rank, columns), which is how an adapter's file has it, and torch takes it, where nothing is transposed
        right = torch.randn(recipe.rank, recipe.columns, generator=random)
        self.packed_right = pack_factor(
            _bytes(right),
            "F32",
            (recipe.columns, recipe.rank),
            lies_transposed=True,
            is_right=True,
            is_double=recipe.is_double,
        )
        self.packed_left = [
            pack_factor(
                _bytes(left[first : first + count].float()), "F32", (count, recipe.rank), is_double=recipe.is_double
            )
            for first, count, _ in self.tiles
        ]
        right = right.to(left.dtype)
        self._pair = (left.T, right.T.contiguous()) if recipe.is_transposed else (right, left)

    def prepared(self, recipe: Recipe) -> PreparedLora:
        """Return the pair as the torch path has it."""
        return PreparedLora(
            lora_a=self._pair[0],
            lora_b=self._pair[1],
            scaling=_SCALING,
            is_transposed=recipe.is_transposed,
            rounding_dtype=_DTYPES[recipe.result] if recipe.rounds_delta else None,
        )

    def forget_torch(self) -> None:
        """Let go of what only the torch path needs."""
        del self._pair

    def _left(self, recipe: Recipe, random: torch.Generator) -> torch.Tensor:
        """Return (rows, rank) values, uninitialised where no tile needs them; it lies transposed where products are."""
        shape = (recipe.rank, recipe.rows) if recipe.is_transposed else (recipe.rows, recipe.rank)
        left = torch.empty(shape, dtype=torch.float64 if recipe.is_double else torch.float32)
        left = left.T if recipe.is_transposed else left
        is_small = recipe.rows * recipe.columns <= WHOLE_ELEMENTS  # whose product torch makes whole
        for first, count in [(0, recipe.rows)] if is_small else [tile[:2] for tile in self.tiles]:
            left[first : first + count] = torch.randn(count, recipe.rank, generator=random)
        return left


class _Trial:
    """What the torch path makes of random values of a recipe."""

    def __init__(self, recipe: Recipe, factors: _Factors, blas: BlasThreads) -> None:
        self._recipe = recipe
        self._factors = factors
        random = torch.Generator().manual_seed(21)
        height = max(count for _, count, _ in factors.tiles)
        self._stored = torch.randn(height, recipe.columns, generator=random).to(_DTYPES[recipe.stored])
        prepared = factors.prepared(recipe)
        self._expected = []
        for first, count, is_whole in factors.tiles:
            with blas.whole() if is_whole else nullcontext():
                self._expected.append(self._by_torch(prepared, first, self._stored[:count]))

    def agrees(self, block: int) -> bool:
        """Whether the kernel's bits are torch's with this block."""
        factors = self._factors
        for expected, left in zip(self._expected, factors.packed_left, strict=True):
            part, found = self._stored[: len(expected)], torch.empty_like(expected)
            kernel = PairKernel(self._recipe, block, _SCALING, left, factors.packed_right)
            kernel.merge(_bytes(part), _bytes(found), (0, len(part)), finds_changes=False)
            if not torch.equal(_integers(found), _integers(expected)):
                return False
        return True

    def _by_torch(self, prepared: PreparedLora, first: int, stored: torch.Tensor) -> torch.Tensor:
        tile = stored.to(prepared.lora_a.dtype, copy=True)
        result = torch.empty(stored.shape, dtype=_DTYPES[self._recipe.result])
        prepared.apply(tile, first, TileScratch())
        round_into(result, tile)
        return result


def _tiles(recipe: Recipe) -> Iterator[tuple[int, int, bool]]:
    """Yield (first row, row count, whether PEFT's own call) of a tile of each height in the torch path."""
    seen: set[int] = set()
    for first, count in tile_rows(recipe.rows, recipe.columns):
        is_whole = count == recipe.rows and is_low(recipe.rows, recipe.columns)
        blocks = [(0, count)] if is_whole else tile_rows(count, recipe.columns, BLOCK_ELEMENTS)
        for inner, height in blocks:
            if height not in seen:
                seen.add(height)
                yield first + inner, height, is_whole


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
