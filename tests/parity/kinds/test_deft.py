"""DEFT and PaRa against PEFT, and against the formula in float64."""

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

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def case(**fields: Any) -> kinds.Case:
    return kinds.Case(lambda: peft.DeftConfig(r=3, target_modules=list(kinds.LLAMA_TARGETS), **fields))


def conv1d(**fields: Any) -> kinds.Case:
    make = lambda: peft.DeftConfig(r=3, target_modules=list(kinds.GPT2_TARGETS), **fields)  # noqa: E731
    return kinds.Case(make, model=tiny.gpt2, targets=kinds.GPT2_TARGETS)


CASES = {
    "relu": case(),
    "qr": case(decomposition_method="qr", alpha=5),
    "para": case(para=True, decomposition_method="qr"),
    "para relu": case(para=True),
    "conv1d": conv1d(alpha=5),
    "conv1d qr": conv1d(decomposition_method="qr"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


def test_a_rank_above_the_outputs_is_lowered(tmp_path: Path) -> None:
    make = lambda: peft.DeftConfig(r=40, alpha=5, target_modules=["k_proj", "q_proj"])  # noqa: E731
    kinds.check_merge(kinds.Case(make, targets=["k_proj", "q_proj"]), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", ["qr", "conv1d"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, name: str) -> None:
    tall = tiny.tall_llama if name == "qr" else tiny.tall_gpt2
    kinds.check_merge(replace(CASES[name], model=tall), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", ["relu", "qr", "para"])
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    def formula(tensor: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{tensor.removesuffix('.weight')}"
        direction = own.get(f"{path}.deft_P")
        if direction is None:
            return None
        left, right = direction, direction.clamp(min=0)
        if name != "relu":  # R is defined by Q, whose columns have signs of their own
            left = right = torch.linalg.qr(direction).Q
        projector = left @ right.T
        injected = left @ own[f"{path}.deft_R"] * (5 / 3 if name == "qr" else 1) if name != "para" else 0
        return weight - projector @ weight + injected

    kinds.check_float64(CASES[name], tmp_path, formula)


@pytest.mark.parametrize("name", ["relu", "para"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)
