"""OFT against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from rawmerge.errors import UnsupportedAdapterError
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def config(**fields: Any) -> Any:
    return peft.OFTConfig(**{"target_modules": list(kinds.LLAMA_TARGETS), "oft_block_size": 16, **fields})


def case(**fields: Any) -> kinds.Case:
    return kinds.Case(lambda: config(**fields))


#: Blocks of 16; 7 blocks or the nearest divisor, 8 of 64 inputs; one block for all; exact rotations.
SERIES = case()
COUNT = case(r=7, oft_block_size=0)
SHARED = case(block_share=True, use_cayley_neumann=False)
EXACT = case(use_cayley_neumann=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("one", [SERIES, COUNT, EXACT, SHARED], ids=["series", "count", "exact", "shared"])
def test_linear_is_bit_equal(tmp_path: Path, one: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(one, tmp_path, dtype)


@pytest.mark.parametrize("terms", [2, 3, 4, 7])
def test_the_number_of_terms_is_followed(tmp_path: Path, terms: int) -> None:
    kinds.check_merge(case(num_cayley_neumann_terms=terms), tmp_path, torch.float32)


@pytest.mark.parametrize("eps", [6e-5, 0.9, 300.0], ids=["all projected", "some", "none"])
@pytest.mark.parametrize("is_series", [True, False])
def test_constrained_blocks_are_projected(tmp_path: Path, eps: float, is_series: bool) -> None:
    kinds.check_merge(case(coft=True, eps=eps, use_cayley_neumann=is_series), tmp_path, torch.float32)


@pytest.mark.parametrize("size", [32, 8, 320])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, size: int) -> None:
    kinds.check_merge(replace(case(oft_block_size=size), model=tiny.tall_llama, spread=0.05), tmp_path, torch.bfloat16)


def test_blocks_across_the_cuts_of_long_sums_are_bit_equal(tmp_path: Path) -> None:
    """BLAS cuts sums over 1024 inputs inside a block of 256, so a product block by block has other bits."""
    one = replace(case(oft_block_size=256, target_modules=["down_proj"]), model=tiny.tall_llama, targets=["down_proj"])
    kinds.check_merge(replace(one, spread=0.05), tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_shared", [True, False])
def test_convolutions_are_bit_equal(tmp_path: Path, is_shared: bool, dtype: torch.dtype) -> None:
    one = kinds.Case(
        lambda: config(target_modules=["convolution"], oft_block_size=9, block_share=is_shared),
        "AutoModelForImageClassification",
        tiny.resnet,
        targets=["convolution"],
    )
    kinds.check_merge(one, tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_shared", [True, False])
def test_embeddings_are_bit_equal(tmp_path: Path, is_shared: bool, dtype: torch.dtype) -> None:
    one = replace(case(target_modules=["embed_tokens"], block_share=is_shared), targets=["embed_tokens"])
    kinds.check_merge(one, tmp_path, dtype)


@pytest.mark.parametrize("terms", [0, 2, 6])
def test_float64_is_the_formula(tmp_path: Path, terms: int) -> None:
    one = case(use_cayley_neumann=terms > 0, num_cayley_neumann_terms=max(1, terms))

    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        upper = own.get(f"base_model.model.{name.removesuffix('weight')}oft_R.weight")
        if upper is None:
            return None
        result = torch.empty_like(weight)
        for block, values in enumerate(upper):
            columns = slice(16 * block, 16 * block + 16)
            result[:, columns] = weight[:, columns] @ rotation(values.tolist(), 16, terms).T
        return result

    kinds.check_float64(one, tmp_path, formula)


def rotation(upper: list[float], size: int, terms: int) -> torch.Tensor:
    """Return a block, element by element; without terms the exact one, (I - Q) (I + Q)^-1."""
    skew, values = torch.zeros(size, size, dtype=torch.float64), iter(upper)
    for row in range(size):
        for column in range(row + 1, size):
            value = next(values)
            skew[row, column], skew[column, row] = value, -value
    result = identity = torch.eye(size, dtype=torch.float64)
    if not terms:
        return torch.matmul(identity - skew, torch.linalg.inv(identity + skew))
    for power in range(1, terms):
        is_last = power == terms - 1 and terms > 2
        result = result + (1 if is_last else 2) * torch.linalg.matrix_power(skew, power)
    return result


def test_float64_of_an_embedding_is_the_formula(tmp_path: Path) -> None:
    one = replace(case(target_modules=["embed_tokens"], block_share=True), targets=["embed_tokens"])

    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if "embed_tokens" not in name:
            return None
        (upper,) = (tensor for key, tensor in own.items() if "oft_embedding_R" in key)
        block = rotation(upper[0].tolist(), 16, 5)
        return torch.cat([weight[:, first : first + 16] @ block for first in range(0, 64, 16)], 1)

    kinds.check_float64(one, tmp_path, formula)


@pytest.mark.parametrize("one", [SERIES, COUNT, SHARED], ids=["series", "count", "shared"])
def test_damage_is_refused_by_name(tmp_path: Path, one: kinds.Case) -> None:
    kinds.check_damage(one, tmp_path)


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.0.dev0@main", "new"])
def test_series_of_an_older_peft_are_refused_unless_forced(tmp_path: Path, version: str | None) -> None:
    base, adapter = kinds.write_case(SERIES, tmp_path, torch.float32)
    expected = kinds.peft_merge(SERIES, base, adapter, tmp_path / "peft")
    kinds.edit_config(adapter, peft_version=version)
    with pytest.raises(UnsupportedAdapterError, match=r"0\.18"):
        rawmerge.plan_merge(base, adapter)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", force=True)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


def test_exact_rotations_of_an_older_peft_are_merged(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(EXACT, tmp_path, torch.float32)
    kinds.edit_config(adapter, peft_version="0.16.0")
    assert rawmerge.plan_merge(base, adapter)


def test_names_and_configs_of_peft_before_0_14_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(SERIES, tmp_path, torch.float32)
    path = adapter / kinds.WEIGHTS
    save_file({name.replace("oft_R.weight", "oft_r"): one for name, one in load_file(path).items()}, path)
    with pytest.raises(rawmerge.RefusedError, match="oft_r"):
        rawmerge.plan_merge(base, adapter)
    kinds.edit_config(adapter, oft_block_size=None)
    with pytest.raises(rawmerge.RefusedError, match="oft_block_size"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("fields", [{"r": 4}, {"oft_block_size": 0}, {"oft_block_size": 8}, {"block_share": True}])
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(SERIES, tmp_path, torch.float32)
    kinds.edit_config(adapter, **fields)
    with pytest.raises(rawmerge.RefusedError, match="oft_R"):
        rawmerge.plan_merge(base, adapter)
