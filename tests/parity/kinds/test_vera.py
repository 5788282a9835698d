"""VeRA and PVeRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK = 5
CONFIGS = {"vera": "VeraConfig", "pvera": "PveraConfig"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(kind: str, **fields: Any) -> Callable[[], Any]:
    targets = fields.pop("target_modules", list(kinds.LLAMA_TARGETS))
    return lambda: getattr(peft, CONFIGS[kind])(r=RANK, target_modules=targets, **fields)


def linear(kind: str, **fields: Any) -> kinds.Case:
    return kinds.Case(make(kind, **fields))


def conv1d(kind: str, **fields: Any) -> kinds.Case:
    made = make(kind, target_modules=list(kinds.GPT2_TARGETS), **fields)
    return kinds.Case(made, model=tiny.gpt2, targets=kinds.GPT2_TARGETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "drawn"])
@pytest.mark.parametrize("layout", [linear, conv1d])
@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_is_bit_equal(
    tmp_path: Path, kind: str, layout: Callable[..., kinds.Case], stored: bool, dtype: torch.dtype
) -> None:
    kinds.check_merge(layout(kind, save_projection=stored, projection_prng_key=9), tmp_path, dtype)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, model: Callable[[], Any]) -> None:
    case = linear("vera") if model is tiny.tall_llama else conv1d("vera", save_projection=False)
    kinds.check_merge(replace(case, model=model), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("kind", CONFIGS)
def test_float64_is_the_formula(tmp_path: Path, kind: str) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}{kind}_lambda"
        if f"{path}_b" not in own:
            return None
        result = weight.clone()
        for k in range(RANK):
            left = own[f"{path}_b"] * own[f"base_model.{kind}_B"][: weight.shape[0], k]
            right = own[f"{path}_d"][k] * own[f"base_model.{kind}_A"][k, : weight.shape[1]]
            result += torch.outer(left, right)
        return result

    kinds.check_float64(linear(kind), tmp_path, formula)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "drawn"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_damage_is_refused_by_name(tmp_path: Path, kind: str, stored: bool) -> None:
    kinds.check_damage(linear(kind, save_projection=stored), tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_pair_and_one_too_many_are_refused(tmp_path: Path, kind: str) -> None:
    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(f"{kind}_B")}

    base, adapter = kinds.write_case(replace(linear(kind), edit=without), tmp_path / "missing", torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=f"{kind}_B"):
        rawmerge.plan_merge(base, adapter)
    base, adapter = kinds.write_case(linear(kind), tmp_path / "extra", torch.float32)
    kinds.edit_config(adapter, save_projection=False)
    with pytest.raises(rawmerge.RefusedError, match=f"{kind}_A"):
        rawmerge.plan_merge(base, adapter)


def test_a_huge_rank_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(linear("vera", save_projection=False), tmp_path, torch.float32)
    kinds.edit_config(adapter, r=2**31)
    with pytest.raises(rawmerge.RefusedError, match="vera_lambda_d"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_lost_module_is_refused_where_projections_are_drawn(tmp_path: Path, kind: str) -> None:
    """The drawn projections are as large as the largest module's: without it the others would get other numbers."""

    def without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down_proj" not in name}

    base, adapter = kinds.write_case(
        replace(linear(kind, save_projection=False), edit=without), tmp_path, torch.float32
    )
    with pytest.raises(rawmerge.RefusedError, match=r"every module that target_modules fits(.|\n)*down_proj"):
        rawmerge.plan_merge(base, adapter)
    kinds.edit_config(adapter, layers_to_transform=[0])
    assert rawmerge.plan_merge(base, adapter)
