"""RoAD against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.merge_plan import UpdateTensor
from rawmerge.methods.interface import ROWS, WHOLE
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

GROUP = 16


def config(variant: str = "road_1", group: int = GROUP, targets: tuple[str, ...] = kinds.LLAMA_TARGETS) -> Any:
    return peft.RoadConfig(variant=variant, group_size=group, target_modules=list(targets))


def case(variant: str, group: int = GROUP, **fields: Any) -> kinds.Case:
    return kinds.Case(lambda: config(variant, group), **fields)


VARIANTS = ("road_1", "road_2", "road_4")
BERT = ("query", "dense")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_is_bit_equal(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    kinds.check_merge(case(variant), tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [2, 16, 48])
def test_biases_are_bit_equal(tmp_path: Path, group: int, dtype: torch.dtype) -> None:
    def model() -> Any:
        return tiny.bert(intermediate_size=96)

    biased = kinds.Case(lambda: config("road_2", group, BERT), "AutoModel", model, BERT)
    kinds.check_merge(biased, tmp_path, dtype)


#: Of 1024 and 320 outputs: groups inside tiles of 64 rows, and groups that such tiles cut.
@pytest.mark.parametrize("group", [64, 40, 80, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_several_tiles_are_bit_equal(tmp_path: Path, group: int, dtype: torch.dtype) -> None:
    def model() -> Any:
        return tiny.llama(hidden_size=640, intermediate_size=960, num_hidden_layers=1, head_dim=160)

    kinds.check_merge(case("road_1", group, model=model), tmp_path, dtype)


@pytest.mark.parametrize(("group", "reach"), [(8, ROWS), (64, ROWS), (48, WHOLE), (96, WHOLE)])
def test_only_groups_that_tiles_cut_need_the_whole_weight(tmp_path: Path, group: int, reach: str) -> None:
    def model() -> Any:
        return tiny.llama(hidden_size=192, intermediate_size=192, num_attention_heads=1, num_key_value_heads=1)

    base, adapter = kinds.write_case(case("road_1", group, model=model), tmp_path, torch.bfloat16)
    steps = [step for step in rawmerge.plan_merge(base, adapter).steps() if isinstance(step, UpdateTensor)]
    updates = [update for step in steps for update in step.updates]
    assert {update.reach for update in updates} == {reach}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [16, 6])
def test_float64_is_the_formula(tmp_path: Path, variant: str, group: int) -> None:
    def model() -> Any:
        return tiny.llama(hidden_size=96, intermediate_size=144)

    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}.road_"
        if f"{path}theta" not in own:
            return None
        theta, alpha, result = own[f"{path}theta"], own[f"{path}alpha"], torch.empty_like(weight)
        half = group // 2
        for row in range(len(weight)):
            start, place = row // group * group, row % group
            is_first = place < half
            other = row + half if is_first else row - half
            if variant == "road_1":
                keep = cross = start // 2 + place % half
            elif variant == "road_2":
                keep = cross = row
            else:
                keep, cross = 2 * start + place, 2 * start + group + place
            sign = -1 if is_first else 1
            result[row] = weight[row] * alpha[keep] * torch.cos(theta[keep])
            result[row] += sign * weight[other] * alpha[cross] * torch.sin(theta[cross])
        return result

    kinds.check_float64(case(variant, group, model=model), tmp_path, formula)


@pytest.mark.parametrize("variant", VARIANTS)
def test_damage_is_refused_by_name(tmp_path: Path, variant: str) -> None:
    kinds.check_damage(case(variant), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("group_size", 7), ("group_size", 24), ("group_size", -2), ("variant", "x")]
)
def test_wrong_settings_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    base, adapter = kinds.write_case(case("road_1"), tmp_path, torch.float32)
    kinds.edit_config(adapter, **{field: value})
    with pytest.raises(rawmerge.RefusedError, match=field):
        rawmerge.plan_merge(base, adapter)
