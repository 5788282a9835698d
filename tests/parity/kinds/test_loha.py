"""LoHa against PEFT, and against the formula in float64."""

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

RANK, ALPHA = 3, 5


def config(**fields: Any) -> Any:
    targets = fields.pop("target_modules", list(kinds.LLAMA_TARGETS))
    return peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=targets, **fields)


PLAIN = kinds.Case(config)
PATTERNS = kinds.Case(lambda: config(rank_pattern={"q_proj": 5}, alpha_pattern={"layers.0.self_attn.q_proj": 7}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    kinds.check_merge(PLAIN, tmp_path, dtype)


def test_patterns_are_followed(tmp_path: Path) -> None:
    kinds.check_merge(PATTERNS, tmp_path, torch.bfloat16)


def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(replace(PLAIN, model=tiny.tall_llama), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.hada_w1_a" not in own:
            return None
        first, second = (own[f"{path}.hada_w{k}_a"] @ own[f"{path}.hada_w{k}_b"] for k in (1, 2))
        return weight + first * second * ALPHA / RANK

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, effective: bool, dtype: torch.dtype) -> None:
    def make() -> Any:
        return config(target_modules=["convolution"], use_effective_conv2d=effective)

    auto = "AutoModelForImageClassification"
    kinds.check_merge(kinds.Case(make, auto, tiny.resnet, targets=["convolution"]), tmp_path, dtype)
