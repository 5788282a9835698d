"""OSF against PEFT, and against the formula in float64."""

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


def config() -> Any:
    return peft.OSFConfig(
        target_modules=list(kinds.LLAMA_TARGETS), effective_rank=20, rank_pattern={"layers.0.self_attn.q_proj": 0.5}
    )


PLAIN = kinds.Case(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    kinds.check_merge(PLAIN, tmp_path, dtype)


def test_a_float64_base_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(PLAIN, tmp_path, torch.float64)


def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(replace(PLAIN, model=tiny.tall_llama), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        part = f"base_model.model.{name.removesuffix('weight')}osf_svd_params"
        if f"{part}.S_low" not in own:
            return None
        trained = own[f"{part}.U_low"] @ torch.diag(own[f"{part}.S_low"]) @ own[f"{part}.V_low"]
        kept = min(weight.shape) - own[f"{part}.S_low"].numel()
        # what the base has above its lowest singular values, by its eigenvectors instead of an SVD
        vectors: torch.Tensor = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -kept:]
        return weight @ vectors @ vectors.T + trained

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


def test_more_singular_values_than_the_base_has_are_refused(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = next(name for name in tensors if name.endswith("0.self_attn.k_proj.osf_svd_params.S_low"))
        part = part.removesuffix("S_low")
        shapes = {"U_low": (32, 33), "S_low": (33,), "V_low": (33, 64)}
        return {**tensors, **{f"{part}{name}": torch.ones(shape) for name, shape in shapes.items()}}

    base, adapter = kinds.write_case(replace(PLAIN, edit=edit), tmp_path, torch.float32)
    with pytest.raises(rawmerge.RefusedError, match=r"k_proj.osf_svd_params.S_low.*at most 32"):
        rawmerge.plan_merge(base, adapter)
