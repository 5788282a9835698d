"""Super-Tuning and Supra against PEFT, and against the formula in float64."""

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
pytestmark = pytest.mark.parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**fields: Any) -> Any:
    return peft.SupertuningConfig(**{"sparsity": 0.9, "target_modules": list(kinds.LLAMA_TARGETS), **fields})


CASES = {
    "super": kinds.Case(config),
    "smallest": kinds.Case(lambda: config(select_top=False, sparsity=0.75)),
    "supra": kinds.Case(lambda: config(r=3, lora_alpha=5)),
    "supra, alpha unsaid": kinds.Case(lambda: config(r=3)),
    "no places": kinds.Case(lambda: config(save_precomputed_indices=False, sparsity=0.37)),
    "no places, smallest": kinds.Case(lambda: config(save_precomputed_indices=False, select_top=False, r=2)),
}
QUIET = pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")


@QUIET
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@QUIET
@pytest.mark.parametrize("name", ["supra", "no places"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, name: str) -> None:
    kinds.check_merge(replace(CASES[name], model=tiny.tall_llama), tmp_path, torch.bfloat16)


@QUIET
@pytest.mark.parametrize("name", ["supra", "no places"])
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    def formula(tensor: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{tensor.removesuffix('weight')}supertuning_"
        values = own.get(f"{path}values")
        if values is None:
            return None
        places = own.get(f"{path}indices")
        if places is None:  # random weights: no two are equal
            places = weight.abs().flatten().argsort(descending=True)[: len(values)]
        changed = weight.clone()
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            changed[place // weight.shape[1], place % weight.shape[1]] += value
        pair = own[f"{path}lora_B.weight"] @ own[f"{path}lora_A.weight"] * 5 / 3 if name == "supra" else 0
        return changed + pair

    kinds.check_float64(CASES[name], tmp_path, formula)


@pytest.mark.parametrize("name", ["super", "supra"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)


@pytest.mark.parametrize(("place", "said"), [(-1, "-1 to"), (64 * 64, "to 4096"), (None, "found one twice")])
def test_places_that_are_none_of_the_base_s_are_refused(tmp_path: Path, place: int | None, said: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            if name.endswith("0.self_attn.q_proj.supertuning_indices"):
                tensor[3] = tensor[4] if place is None else place
        return tensors

    base, adapter = kinds.write_case(replace(CASES["super"], edit=edit), tmp_path, torch.float32)
    with pytest.raises(rawmerge.MergeError, match=f"supertuning_indices.*{said}"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
