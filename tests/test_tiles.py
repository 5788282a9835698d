"""How tensors are cut: every row once, in blocks that keep a product's bits, no larger than asked but for those."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.engine.tiles import ROW_BLOCK, TILE_ELEMENTS, elementwise_shape, matrix_shape, tile_rows
from tests.strategies import SETTINGS

LOWEST = 16  # fewer rows change bits: see the module
rows_of_a_tensor = st.integers(0, 3000) | st.sampled_from([4096, 128_256, 262_144])
columns_of_a_tensor = st.integers(0, 300) | st.integers(1000, 2**21) | st.sampled_from([4096, 2**16, 2**16 + 1, 2**24])
tile_sizes = st.sampled_from([1, 1000, 2**16, TILE_ELEMENTS, 2**24])


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor, tile_sizes)
def test_tiles_cover_every_row_exactly_once_in_order(rows: int, columns: int, size: int) -> None:
    position = 0
    for first, count in tile_rows(rows, columns, size):
        assert first == position
        assert count > 0
        position += count
    assert position == (rows if columns else 0)


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor, tile_sizes)
def test_no_tile_is_lower_than_a_block_unless_it_is_the_whole_tensor(rows: int, columns: int, size: int) -> None:
    tiles = list(tile_rows(rows, columns, size))
    block = ROW_BLOCK if columns <= 2**16 else LOWEST
    assert len(tiles) <= 1 or min(count for _, count in tiles) >= block


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor, tile_sizes)
def test_every_cut_is_at_a_multiple_of_the_block(rows: int, columns: int, size: int) -> None:
    block = ROW_BLOCK if columns <= 2**16 else LOWEST
    assert all(first % block == 0 for first, _ in tile_rows(rows, columns, size))


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor, tile_sizes)
def test_tiles_are_of_one_height_but_for_the_last(rows: int, columns: int, size: int) -> None:
    counts = [count for _, count in tile_rows(rows, columns, size)]
    assert len(set(counts[:-1])) <= 1


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor, tile_sizes)
def test_a_tile_exceeds_its_size_by_less_than_two_blocks(rows: int, columns: int, size: int) -> None:
    block = ROW_BLOCK if columns <= 2**16 else LOWEST
    if columns < LOWEST and rows * columns <= 8 * TILE_ELEMENTS:
        assert len(list(tile_rows(rows, columns, size))) == bool(rows and columns)  # narrow: never cut
        return
    largest = max((count for _, count in tile_rows(rows, columns, size)), default=0)
    assert largest * columns < max(size, block * columns) + block * max(columns, 1)


@SETTINGS
@given(rows_of_a_tensor, columns_of_a_tensor)
def test_the_cut_depends_on_the_shape_alone(rows: int, columns: int) -> None:
    assert list(tile_rows(rows, columns)) == list(tile_rows(rows, columns, TILE_ELEMENTS))


@pytest.mark.parametrize(
    ("rows", "columns", "tiles"),
    [
        (4096, 4096, [(first, 256) for first in range(0, 4096, 256)]),
        (300, 4096, [(0, 300)]),
        (320, 4096, [(0, 256), (256, 64)]),
        (319, 4096, [(0, 319)]),
        (128, 2**16, [(0, 64), (64, 64)]),
        (40, 2**16 + 1, [(0, 16), (16, 24)]),
        (1, 2**30, [(0, 1)]),
        (0, 7, []),
        (7, 0, []),
    ],
)
def test_examples(rows: int, columns: int, tiles: list[tuple[int, int]]) -> None:
    assert list(tile_rows(rows, columns)) == tiles


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((5,), (5, 1)), ((5, 3), (5, 3)), ((5, 3, 2, 2), (5, 12)), ((0, 3), (0, 3)), ((3, 0), (3, 0))],
)
def test_a_tensor_is_a_matrix_of_its_first_dimension(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(shape) == matrix
    assert prod(matrix) == prod(shape)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((5,), (5, 1)),
        ((5, 3), (5, 3)),
        ((128, 2880, 5760), (128 * 2880, 5760)),
        ((4, 3, 2, 20), (24, 20)),
        ((64, 32, 3, 3), (64, 288)),
        ((4, 3, 5, 5), (12, 25)),
        ((0, 7, 20), (0, 20)),
        ((3, 0, 20), (0, 20)),
    ],
)
def test_a_tensor_without_products_is_a_matrix_of_its_last_dimension_if_that_is_not_narrow(
    shape: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    assert elementwise_shape(shape) == matrix
    assert prod(matrix) == prod(shape)


def test_an_update_of_few_columns_is_not_cut() -> None:
    assert len(list(tile_rows(3000, 300, 2**16))) > 1
    assert list(tile_rows(3000, 300, 2**16, product_columns=15)) == [(0, 3000)]
