"""The property that tiling rests on: rows of a product cut into tiles have the bits of the whole product.

The whole product is torch's own, with the threads it would use for PEFT.
"""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from rawmerge.computing.tile_computer import TileScratch
from rawmerge.engine.tiles import TILE_ELEMENTS, is_low, tile_rows
from rawmerge.methods.expert_lora import ExpertLoraMethod
from rawmerge.methods.interface import TileContext
from rawmerge.methods.lora import LoraMethod

SHAPES = [
    (17, 100_000),
    (151, 20_000),
    (4096, 1024),
    (1100, 3000),
    (7, 100),
    (1000, 1000),
    (64, 64),
    (20, 70_001),
    (7, 299_593),
    (10, 150_000),
]


def random_shapes(count: int) -> list[tuple[int, int]]:
    numbers = random.Random(5)
    return [(numbers.randint(1, 900), numbers.choice((numbers.randint(1, 40), 4000))) for _ in range(count)]


@pytest.mark.parametrize("rank", [3, 16, 100])
def test_tiles_have_the_whole_product_s_bits(rank: int) -> None:
    for out_features, in_features in [*SHAPES, *random_shapes(10)]:
        generator = torch.Generator().manual_seed(out_features * in_features)
        lora_a = torch.randn(rank, in_features, generator=generator)
        lora_b = torch.randn(out_features, rank, generator=generator)
        whole = lora_b @ lora_a + 0.0
        for is_transposed, tile_elements in product((False, True), (TILE_ELEMENTS, 2**16)):
            tiled = in_tiles(lora_a, lora_b, is_transposed, tile_elements)
            expected = whole.T if is_transposed else whole
            assert torch.equal(tiled, expected), (out_features, in_features, is_transposed, tile_elements)


def in_tiles(lora_a: torch.Tensor, lora_b: torch.Tensor, is_transposed: bool, tile_elements: int) -> torch.Tensor:
    """Return the product as a merge computes it; as many threads as PEFT's for a tile that is whole and low."""
    rows, columns = len(lora_b), lora_a.shape[1]
    rows, columns = (columns, rows) if is_transposed else (rows, columns)
    threads, tiled = torch.get_num_threads(), torch.zeros(rows, columns)
    settings = {"scaling": 1.0, "is_transposed": is_transposed, "rounds_delta": False}
    context = TileContext((rows, columns), torch.float32, None)
    update = LoraMethod().prepare(settings, {"lora_a": lora_a, "lora_b": lora_b}, context)
    for first, count in tile_rows(rows, columns, tile_elements):
        torch.set_num_threads(threads if count == rows and is_low(rows, columns) else 1)
        update.apply(tiled[first : first + count], first, TileScratch())
    torch.set_num_threads(threads)
    return tiled


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rank", [3, 16])
def test_parts_of_experts_have_the_bits_of_torch_s_einsum(rank: int, is_transposed: bool) -> None:
    threads, experts = torch.get_num_threads(), 3
    equation = "ore,eri->eio" if is_transposed else "ore,eri->eoi"
    context = TileContext((), torch.float32, None)
    for (rows, columns), cut in product([(30, 21), (5, 7), (600, 1100), (17, 15_001), (1500, 40)], (0, 0.5)):
        generator = torch.Generator().manual_seed(rows)
        width, height = (rows, columns) if is_transposed else (columns, rows)
        lora_a = torch.randn(rank * experts, width, generator=generator)
        lora_b = torch.randn(height, rank * experts, generator=generator)
        expected = torch.einsum(equation, lora_b.view(height, -1, experts), lora_a.view(experts, -1, width))
        for expert in range(experts):
            settings = {"scaling": 1.0, "experts": experts, "rank": rank, "expert": expert}
            settings |= {"is_transposed": is_transposed, "grouped_by_expert": False}
            own = {"lora_a": lora_a[expert * rank : (expert + 1) * rank].clone(), "lora_b": lora_b}
            update = ExpertLoraMethod().prepare(settings, own, context)
            tiled, start = torch.zeros(rows, columns), int(rows * cut)
            for begin, end in ((0, start), (start, rows)):
                for first, count in tile_rows(end - begin, columns):
                    torch.set_num_threads(threads if count == end - begin and is_low(count, columns) else 1)
                    update.apply(tiled[begin + first : begin + first + count], begin + first, TileScratch())
            torch.set_num_threads(threads)
            assert torch.equal(tiled, expected[expert] + 0.0), (rows, columns, expert)
