"""DeLoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK = 3


def config(**fields: Any) -> Any:
    return peft.DeloraConfig(r=RANK, delora_lambda=5, target_modules=list(kinds.LLAMA_TARGETS), **fields)


PLAIN = kinds.Case(config)
PATTERNS = kinds.Case(lambda: config(rank_pattern={"q_proj": 5}, lambda_pattern={"k_proj": 9}))


def _with_a_dead_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors so small that their norms are below the least that PEFT divides by."""
    return {
        name: tensor * torch.tensor([1e-6, 1, 1])[:, None] if name.endswith("delora_A") else tensor
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    kinds.check_merge(PLAIN, tmp_path, dtype)


@pytest.mark.parametrize("case", [PATTERNS, replace(PLAIN, edit=_with_a_dead_rank)], ids=["patterns", "dead_rank"])
def test_options_are_followed(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_merge(case, tmp_path, torch.bfloat16)


def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(replace(PLAIN, model=tiny.tall_llama), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("edit", [PLAIN.edit, _with_a_dead_rank])
def test_float64_is_the_formula(tmp_path: Path, edit: Any) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}.delora_"
        if f"{path}A" not in own:
            return None
        right, left, bound = own[f"{path}A"], own[f"{path}B"], float(own[f"{path}lambda"])
        for row, column in zip(right, left.T, strict=True):
            lengths = [max(float((vector * vector).sum()) ** 0.5, 1e-4) for vector in (row, column)]
            weight += torch.outer(column, row * own[f"{path}w_norm"]) * bound / (RANK * lengths[0] * lengths[1])
        return weight

    kinds.check_float64(replace(PLAIN, edit=edit), tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)
