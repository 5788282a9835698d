"""MiSS in its three forms, and Bone, against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

#: Of hidden size 64 and intermediate size 112: 6 leaves a remainder, 16 divides both, and lies across no tile.
RANK, MINI_RANK, BAT_RANK = 6, 8, 16


def config(form: bool | str, rank: int) -> Callable[[], Any]:
    fields = {"mini_r": MINI_RANK} if form == "mini" else {}
    return lambda: peft.MissConfig(r=rank, init_weights=form, target_modules=list(kinds.LLAMA_TARGETS), **fields)


CASES = {
    "remainder": kinds.Case(config(True, RANK)),
    "random": kinds.Case(config(False, BAT_RANK)),
    "mini": kinds.Case(config("mini", RANK)),
    "bat": kinds.Case(config("bat", BAT_RANK)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


def tall() -> Any:
    """Sizes that tiles of 64 rows cut blocks of 60 in."""
    return tiny.llama(hidden_size=480, intermediate_size=960, num_hidden_layers=1)  # 240 outputs of k_proj


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "rank"), [(True, 7), ("mini", 7), ("bat", 60), ("bat", 48)])
def test_weights_of_several_tiles_are_bit_equal(
    tmp_path: Path, form: bool | str, rank: int, dtype: torch.dtype
) -> None:
    kinds.check_merge(kinds.Case(config(form, rank), model=tall), tmp_path, dtype)


def _repeated(block: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rank, width = block.shape
    delta = [[block[column % rank, row % width] for column in range(weight.shape[1])] for row in range(weight.shape[0])]
    return weight + torch.tensor(delta)


def _bat(block: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # row by row: an output's part of each shard of inputs passes through its block
    rank, result = block.shape[-1], weight.clone()
    for row in range(weight.shape[0]):
        own = block[row // rank]
        for start in range(0, weight.shape[1], rank):
            shard = slice(start, start + rank)
            result[row, shard] += own.T @ weight[row, shard] + own[row % rank]
    return result


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    def formula(tensor: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        block = own.get(f"base_model.model.{tensor.removesuffix('.weight')}.miss_block")
        if block is None:
            return None
        return _bat(block, weight) if name == "bat" else _repeated(block, weight)

    kinds.check_float64(CASES[name], tmp_path, formula)


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)


@pytest.mark.parametrize("name", ["remainder", "bat"])
def test_bone_is_miss_by_its_old_name(tmp_path: Path, name: str) -> None:
    base, adapter = kinds.write_case(CASES[name], tmp_path, torch.bfloat16)
    expected = kinds.peft_merge(CASES[name], base, adapter, tmp_path / "peft")
    path = adapter / kinds.WEIGHTS
    renamed = {key.replace("miss_block", "bone_block"): tensor for key, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    kinds.edit_config(adapter, peft_type="BONE", mini_r=None, miss_dropout=None)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize("kind", ["MISS", "BONE"])
def test_a_block_of_another_form_is_refused(tmp_path: Path, kind: str) -> None:
    base, adapter = kinds.write_case(replace(CASES["bat"], targets=()), tmp_path, torch.float32)
    kinds.edit_config(adapter, peft_type=kind, init_weights=True, mini_r=None, miss_dropout=None)
    if kind == "BONE":
        path = adapter / kinds.WEIGHTS
        renamed = {key.replace("miss_block", "bone_block"): tensor for key, tensor in load_file(path).items()}
        save_file(renamed, path)
    with pytest.raises(rawmerge.RefusedError, match="block"):
        rawmerge.plan_merge(base, adapter)
