"""BOFT against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
layer = pytest.importorskip("peft.tuners.boft.layer")
pytestmark = pytest.mark.parity


class BlockDiagonal:
    """What PEFT's extension for CUDA does, on any device."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        factors, count, size, _ = blocks.shape
        whole = torch.zeros(factors, count * size, count * size)
        for block in range(count):
            places = slice(block * size, block * size + size)
            whole[:, places, places] = blocks[:, block]
        return [whole]


@pytest.fixture(autouse=True)
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would try to compile its extension for each layer."""
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "get_fbd_cuda", BlockDiagonal)


def case(**fields: Any) -> kinds.Case:
    fields = {"target_modules": list(kinds.LLAMA_TARGETS), "boft_block_size": 8, **fields}
    return kinds.Case(lambda: peft.BOFTConfig(**fields))


SIZE = case()
COUNT = case(boft_block_size=0, boft_block_num=4)
BUTTERFLY = case(boft_block_size=4, boft_n_butterfly_factor=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [SIZE, COUNT], ids=["size", "count"])
def test_linear_is_bit_equal(tmp_path: Path, one: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(one, tmp_path, dtype)


def test_factors_that_peft_did_not_make_are_not_missed(tmp_path: Path) -> None:
    kinds.check_merge(BUTTERFLY, tmp_path, torch.bfloat16)


@pytest.mark.usefixtures("with_extension")
@pytest.mark.parametrize("one", [case(boft_n_butterfly_factor=2), BUTTERFLY], ids=["2 factors", "3 factors"])
def test_butterflies_are_those_of_peft(tmp_path: Path, one: kinds.Case) -> None:
    kinds.check_merge(replace(one, tolerance=1e-6), tmp_path, torch.float32)


@pytest.mark.usefixtures("with_extension")
def test_butterflies_of_counted_blocks_of_a_convolution_are_those_of_peft(tmp_path: Path) -> None:
    fields = {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2}
    one = case(target_modules=["encoder.stages.0.layers.0.layer.1.convolution"], **fields)
    one = replace(one, auto="AutoModelForImageClassification", model=tiny.resnet, tolerance=1e-6)
    kinds.check_merge(replace(one, targets=["encoder.stages.0.layers.0.layer.1.convolution"]), tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 16])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    kinds.check_merge(replace(case(boft_block_size=size), model=tiny.tall_llama), tmp_path, dtype)


@pytest.mark.usefixtures("with_extension")
def test_butterflies_of_several_tiles_are_those_of_peft(tmp_path: Path) -> None:
    one = replace(BUTTERFLY, model=tiny.tall_llama, tolerance=1e-6)
    kinds.check_merge(one, tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    one = case(target_modules=["1.convolution"], boft_block_size=9)
    one = replace(one, auto="AutoModelForImageClassification", model=tiny.resnet, targets=["layer.1.convolution"])
    kinds.check_merge(one, tmp_path, dtype)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}boft_"
        if f"{path}R" not in own:
            return None
        result = torch.empty_like(weight)
        for block, free in enumerate(own[f"{path}R"][0]):
            skew, columns = (free - free.T) / 2, slice(8 * block, 8 * block + 8)
            identity = torch.eye(8, dtype=torch.float64)
            rotation = (identity - skew) @ torch.linalg.inv(identity + skew)
            result[:, columns] = torch.einsum("oi,ci->oc", weight[:, columns], rotation)
        return result * own[f"{path}s"]

    kinds.check_float64(SIZE, tmp_path, formula)


@pytest.mark.parametrize("one", [SIZE, COUNT], ids=["size", "count"])
def test_damage_is_refused_by_name(tmp_path: Path, one: kinds.Case) -> None:
    kinds.check_damage(one, tmp_path)


@pytest.mark.usefixtures("with_extension")
def test_damage_of_butterflies_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(BUTTERFLY, tmp_path)


@pytest.mark.usefixtures("with_extension")
@pytest.mark.parametrize("fields", [{"boft_block_num": 8}, {"boft_block_size": 0}, {"boft_n_butterfly_factor": 2}])
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(BUTTERFLY, tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(rawmerge.RefusedError, match="boft_R"):
        rawmerge.plan_merge(base, adapter)
