"""RandLoRA against PEFT, and against the formula in float64."""

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

RANK, ALPHA = 5, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAWN = {"save_projection": False, "projection_prng_key": 9}


def linear(**fields: Any) -> kinds.Case:
    targets = fields.pop("target_modules", list(kinds.LLAMA_TARGETS))
    return kinds.Case(lambda: peft.RandLoraConfig(r=RANK, randlora_alpha=ALPHA, target_modules=targets, **fields))


def conv1d(**fields: Any) -> kinds.Case:
    case = linear(target_modules=list(kinds.GPT2_TARGETS), **fields)
    return replace(case, model=tiny.gpt2, targets=kinds.GPT2_TARGETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, DRAWN], ids=["stored", "drawn"])
@pytest.mark.parametrize("layout", [linear, conv1d])
def test_merge_is_bit_equal(
    tmp_path: Path, layout: Callable[..., kinds.Case], fields: dict[str, Any], dtype: torch.dtype
) -> None:
    kinds.check_merge(layout(**fields), tmp_path, dtype)


@pytest.mark.parametrize("switch", ["sparse", "very_sparse"])
@pytest.mark.parametrize("fields", [{}, DRAWN], ids=["stored", "drawn"])
def test_sparse_bases_are_bit_equal(tmp_path: Path, fields: dict[str, Any], switch: str) -> None:
    kinds.check_merge(linear(**{switch: True}, **fields), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, model: Callable[[], Any]) -> None:
    case = linear() if model is tiny.tall_llama else conv1d(**DRAWN)
    kinds.check_merge(replace(case, model=model), tmp_path, torch.bfloat16)


def test_copies_that_differ_count_for_nothing(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = [name for name in tensors if name.endswith(("proj.randlora_A", "proj.randlora_B"))]
        assert copies
        return {name: tensor * 3 if name in copies else tensor for name, tensor in tensors.items()}

    kinds.check_merge(replace(linear(), edit=edit), tmp_path, torch.float32)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}randlora"
        if f"{path}_gamma" not in own:
            return None
        factors, scales = own[f"{path}_lambda"], own[f"{path}_gamma"]
        basis_a, basis_b = own["base_model.randlora_A"], own["base_model.randlora_B"]
        bases, low = scales.shape
        delta = torch.zeros(max(weight.shape), low, dtype=torch.float64)
        # PEFT's A runs over (rank, basis), its B over (basis, rank)
        for place in range(RANK * bases):
            rank_a, base_a = divmod(place, bases)
            base_b, rank_b = divmod(place, RANK)
            right = factors[rank_a, base_a] * basis_a[rank_a, 0, :low] * scales[base_a]
            delta += torch.outer(basis_b[: max(weight.shape), base_b, rank_b], right)
        return weight + (delta if weight.shape[0] >= weight.shape[1] else delta.T) * ALPHA / RANK

    kinds.check_float64(linear(), tmp_path, formula)


@pytest.mark.parametrize("fields", [{}, DRAWN], ids=["stored", "drawn"])
def test_damage_is_refused_by_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    # copies may be missing: older versions of PEFT, and other trainers, write none
    kinds.check_damage(linear(**fields), tmp_path, unneeded=("proj.randlora_A", "proj.randlora_B"))


def test_bases_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(linear(), tmp_path, torch.float32)
    kinds.edit_config(adapter, save_projection=False)
    with pytest.raises(rawmerge.RefusedError, match=r"q_proj\.randlora_A"):
        rawmerge.plan_merge(base, adapter)
    kinds.edit_config(adapter, save_projection=True, r=2**31)
    with pytest.raises(rawmerge.RefusedError, match="randlora_lambda"):
        rawmerge.plan_merge(base, adapter)
