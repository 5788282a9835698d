"""OSF against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import kind_oracle as kinds

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
