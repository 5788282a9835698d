"""LoRA on fused experts: what is settled from shapes, and the maths against exact arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.computing.tile_computer import TileScratch
from rawmerge.methods.expert_lora import ExpertLoraMethod
from rawmerge.methods.interface import ModuleFacts, Shape, ShapeMismatchError, TileContext
from rawmerge.window import Window
from tests.builders import random_tensor
from tests.step_runs import Workbench
from tests.strategies import SETTINGS

RANK, SCALING = 4, 1.5
sizes = st.integers(1, 6)


def settle(a: Shape, b: Shape, base: Shape, *, rank: int = RANK, square_is_transposed: bool | None = None) -> Any:
    facts = ModuleFacts(base, rank, SCALING, square_is_transposed)
    return ExpertLoraMethod().settings({"lora_b": b, "lora_a": a}, facts)


def test_the_settings_are_for_all_experts_in_peft_s_column_order() -> None:
    assert settle((12, 8), (10, 12), (3, 10, 8)) == {
        "scaling": SCALING,
        "experts": 3,
        "rank": RANK,
        "expert": -1,
        "is_transposed": False,
        "grouped_by_expert": False,
    }


@pytest.mark.parametrize("known", [True, False, None])
def test_experts_that_are_not_square_show_their_orientation(known: bool | None) -> None:
    assert settle((12, 8), (10, 12), (3, 10, 8), square_is_transposed=known)["is_transposed"] is False
    assert settle((12, 8), (10, 12), (3, 8, 10), square_is_transposed=known)["is_transposed"] is True


@pytest.mark.parametrize("known", [True, False])
def test_square_experts_follow_what_is_known(known: bool) -> None:
    assert settle((12, 8), (8, 12), (3, 8, 8), square_is_transposed=known)["is_transposed"] is known


def test_square_experts_of_unknown_orientation_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="undecidable") as caught:
        settle((12, 8), (8, 12), (3, 8, 8))
    assert "peft_version" in caught.value.hint


def test_a_single_expert_is_a_plain_pair_and_never_transposed() -> None:
    assert settle((4, 8), (8, 4), (1, 8, 8), square_is_transposed=None)["is_transposed"] is False
    with pytest.raises(ShapeMismatchError, match="a delta of"):
        settle((4, 8), (10, 4), (1, 8, 10))


@pytest.mark.parametrize("role", ["lora_a", "lora_b"])
@pytest.mark.parametrize("shape", [(), (0,), (96,), (0, 8), (12, 0)], ids=str)
def test_a_factor_that_was_not_gathered_is_refused_as_such(role: str, shape: Shape) -> None:
    shapes = {"lora_a": (12, 8), "lora_b": (10, 12), role: shape}
    with pytest.raises(ShapeMismatchError, match="a matrix") as caught:
        settle(shapes["lora_a"], shapes["lora_b"], (3, 10, 8))
    assert caught.value.role == role
    assert "ZeRO-3 or FSDP" in caught.value.hint


@pytest.mark.parametrize(
    ("a", "b", "base", "role", "expected", "found"),
    [
        ((12, 8, 1), (10, 12), (3, 10, 8), "lora_a", "a matrix", "shape [12, 8, 1]"),
        ((12, 8), (10, 12), (10, 8), "lora_b @ lora_a", "a base of three dimensions", "shape [10, 8]"),
        ((12, 8), (10, 9), (3, 10, 8), "lora_b", "12 columns like lora_a's rows", "9"),
        ((12, 8), (10, 12), (5, 10, 8), "lora_a", "rows for each of the base's 5 experts", "12 rows"),
        ((12, 8), (10, 12), (0, 10, 8), "lora_a", "rows for each of the base's 0 experts", "12 rows"),
        ((12, 8), (10, 12), (4, 10, 8), "lora_a", "rank 4 as the config says", "rank 3 for 4 experts"),
        ((12, 8), (10, 12), (3, 10, 9), "lora_b @ lora_a", "the base's shape [3, 10, 9]", "a delta of [3, 10, 8]"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_role(
    a: Shape, b: Shape, base: Shape, role: str, expected: str, found: str
) -> None:
    with pytest.raises(ShapeMismatchError, match=re.escape(expected)) as caught:
        settle(a, b, base)
    assert caught.value.role == role
    assert caught.value.found.startswith(found)


def exact_delta(settings: Any, lora_a: torch.Tensor, lora_b: torch.Tensor) -> Any:
    """Return the delta (experts, d1, d2) by loops over ranks, in float64."""
    experts, rank = settings["experts"], settings["rank"]
    a, b = lora_a.double().numpy(), lora_b.double().numpy()
    deltas = []
    for expert in range(experts):
        delta = np.zeros((b.shape[0], a.shape[1]))
        for number in range(rank):
            column = expert * rank + number if settings["grouped_by_expert"] else number * experts + expert
            delta += np.outer(b[:, column], a[expert * rank + number])
        deltas.append(delta.T if settings["is_transposed"] else delta)
    return np.stack(deltas) * settings["scaling"]


@SETTINGS
@given(sizes, sizes, sizes, sizes, st.booleans(), st.booleans())
def test_the_delta_is_the_formula(
    experts: int, rank: int, rows: int, columns: int, is_transposed: bool, is_grouped: bool
) -> None:
    settings = {"scaling": SCALING, "experts": experts, "rank": rank, "expert": -1}
    settings |= {"is_transposed": is_transposed, "grouped_by_expert": is_grouped}
    generator = torch.Generator().manual_seed(rows)
    height, width = (columns, rows) if is_transposed else (rows, columns)
    lora_a = torch.randn(rank * experts, width, generator=generator)
    lora_b = torch.randn(height, rank * experts, generator=generator)
    context = TileContext((experts, rows, columns), torch.float64, None)
    expected = exact_delta(settings, lora_a, lora_b)
    whole = ExpertLoraMethod().prepare(settings, {"lora_a": lora_a, "lora_b": lora_b}, context)
    for expert in range(experts):
        own = {"lora_a": lora_a[expert * rank : (expert + 1) * rank], "lora_b": lora_b}
        for update, first in (
            (whole, expert * rows),
            (ExpertLoraMethod().prepare({**settings, "expert": expert}, own, context), 0),
        ):
            tile = torch.zeros(rows, columns, dtype=torch.float64)
            split = rows // 2
            update.apply(tile[:split], first, TileScratch())
            update.apply(tile[split:], first + split, TileScratch())
            np.testing.assert_allclose(tile.numpy(), expected[expert], rtol=1e-12, atol=1e-12)


def test_a_tile_of_two_experts_is_an_error() -> None:
    pair = {"lora_a": torch.ones(12, 8), "lora_b": torch.ones(10, 12)}
    context = TileContext((3, 10, 8), torch.float32, None)
    update = ExpertLoraMethod().prepare(settle((12, 8), (10, 12), (3, 10, 8)), pair, context)
    with pytest.raises(ValueError, match="crosses experts of 10 rows"):
        update.apply(torch.zeros(3, 8), 8, TileScratch())


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float64_rounds_the_exact_sum_once(tmp_path: Path, base_dtype: torch.dtype) -> None:
    bench = Workbench(tmp_path)
    base = random_tensor((3, 10, 8), base_dtype)
    pair = {"lora_a": random_tensor((12, 8), torch.float32), "lora_b": random_tensor((10, 12), torch.float32) + 0.5}
    settings = settle((12, 8), (10, 12), (3, 10, 8))
    step = bench.step(base, [bench.update("expert_lora", pair, settings)], columns=8, cuts=(10, 20))
    expected = base.double() + torch.from_numpy(exact_delta(settings, **pair))
    found = bench.run_one(step, compute_dtype="float64")
    assert torch.equal(found, expected.float().to(base_dtype))  # no value lies near a tie


def test_one_tensor_may_hold_the_experts_interleaved_halves(tmp_path: Path) -> None:
    """Two pairs, one on the even columns of the fused tensor, one on the odd."""
    bench = Workbench(tmp_path)
    base, settings = random_tensor((3, 10, 16), torch.float32), settle((12, 8), (10, 12), (3, 10, 8))
    expected, updates = base.double().numpy().copy(), []
    for side in (0, 1):
        pair = {
            "lora_a": random_tensor((12, 8), torch.float32, side),
            "lora_b": random_tensor((10, 12), torch.float32, side) + 0.5,
        }
        updates.append(bench.update("expert_lora", pair, settings, Window(0, 30, 0, side, 2, 8)))
        expected[:, :, side::2] += exact_delta(settings, **pair)
    found = bench.run_one(bench.step(base, updates, columns=16, cuts=(10, 20)))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(found.numpy(), base.numpy(), rtol=1e-3)
