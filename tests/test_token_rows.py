"""Trained tokens and trained biases: what is settled from shapes, and the maths."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.computing.tile_computer import TileScratch
from rawmerge.errors import NonFiniteTensorError
from rawmerge.methods.interface import ModuleFacts, Shape, ShapeMismatchError, TileContext
from rawmerge.methods.lora_bias import LoraBiasMethod
from rawmerge.methods.token_rows import TokenRowsMethod
from tests.builders import random_tensor, raw
from tests.step_runs import Workbench
from tests.strategies import SETTINGS


def settle(shape: Shape, base: Shape, indices: tuple[int, ...]) -> Any:
    return TokenRowsMethod().settings({"rows": shape}, ModuleFacts(base, 8, 1.0, None, token_indices=indices))


def test_the_indices_are_the_settings_in_the_adapter_s_order() -> None:
    assert settle((3, 4), (10, 4), (7, 0, 9)) == {"indices": (7, 0, 9)}


@pytest.mark.parametrize(
    ("shape", "base", "indices", "expected", "found"),
    [
        ((2, 4), (10, 4), (7, 0, 9), "3 rows, one for each token index", "shape [2, 4]"),
        ((3, 5), (10, 4), (7, 0, 9), "for a base of shape [10, 4]", "shape [3, 5]"),
        ((12,), (10, 4), (7, 0, 9), "3 rows", "shape [12]"),
        ((3, 4), (10, 4, 1), (7, 0, 9), "for a base of shape [10, 4, 1]", "shape [3, 4]"),
        ((3, 4), (10, 4), (7, 0, 10), "token indices below 10", "[10]"),
        ((3, 4), (10, 4), (7, -1, 9), "token indices below 10", "[-1]"),
        ((3, 4), (10, 4), (7, 0, 7), "different token indices", "[7] more than once"),
    ],
)
def test_rows_that_have_no_place_are_refused(
    shape: Shape, base: Shape, indices: tuple[int, ...], expected: str, found: str
) -> None:
    with pytest.raises(ShapeMismatchError, match=re.escape(expected)) as caught:
        settle(shape, base, indices)
    assert (caught.value.role, caught.value.found) == ("rows", found)


@SETTINGS
@given(st.integers(1, 60), st.data())
def test_rows_are_replaced_whatever_the_tiles(vocabulary: int, data: st.DataObject) -> None:
    indices = tuple(data.draw(st.lists(st.integers(0, vocabulary - 1), unique=True, min_size=1)))
    cuts = sorted(data.draw(st.sets(st.integers(0, vocabulary))) | {0, vocabulary})
    rows = random_tensor((len(indices), 3), torch.float32)
    context = TileContext((vocabulary, 3), torch.float32, torch.bfloat16)
    update = TokenRowsMethod().prepare({"indices": indices}, {"rows": rows}, context)
    found = torch.zeros(vocabulary, 3)
    for start, stop in pairwise(cuts):
        update.apply(found[start:stop], start, TileScratch())
    expected = torch.zeros(vocabulary, 3)
    for place, index in enumerate(indices):
        expected[index] = rows[place].bfloat16()
    assert torch.equal(found, expected)


def test_rows_of_a_cast_tensor_are_rounded_once(tmp_path: Path) -> None:
    bench, rows = Workbench(tmp_path), random_tensor((2, 4), torch.float32)
    base = random_tensor((9, 4))
    update = bench.update("token_rows", {"rows": rows}, {"indices": (8, 2)})
    found = bench.run_one(bench.step(base, [update], dtype=torch.float32))
    expected = base.float()
    expected[[8, 2]] = rows
    assert raw(found) == raw(expected)


def test_a_row_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    update = bench.update("token_rows", {"rows": torch.full((1, 4), 1e30)}, {"indices": (3,)})
    with pytest.raises(NonFiniteTensorError):
        bench.run_one(bench.step(random_tensor((9, 4), torch.float16), [update]))


def bias_settings(shape: Shape, base: Shape) -> Any:
    return LoraBiasMethod().settings({"lora_b_bias": shape}, ModuleFacts(base, 8, 1.5, None))


def test_a_bias_is_scaled_and_added(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    base, bias = random_tensor((700,)), random_tensor((700,), torch.float32) * 9
    update = bench.update("lora_bias", {"lora_b_bias": bias}, bias_settings((700,), (700,)))
    expected = (base.float() + bias * 1.5).bfloat16()
    assert raw(bench.run_one(bench.step(base, [update]))) == raw(expected)


@pytest.mark.parametrize(("shape", "base"), [((7,), (8,)), ((8, 1), (8, 1)), ((), ()), ((8,), (8, 4))], ids=str)
def test_a_bias_that_is_no_vector_of_the_base_s_size_is_refused(shape: Shape, base: Shape) -> None:
    with pytest.raises(ShapeMismatchError, match="a vector of the base bias's shape"):
        bias_settings(shape, base)
