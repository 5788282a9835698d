"""IA3 against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def config(targets: list[str], feedforward: list[str]) -> Any:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


PLAIN = kinds.Case(lambda: config(list(kinds.LLAMA_TARGETS), ["down_proj", "q_proj"]))
#: All of GPT-2's modules have biases, which change where outputs are scaled.
CONV1D = kinds.Case(lambda: config(list(kinds.GPT2_TARGETS), ["c_proj"]), model=tiny.gpt2, targets=kinds.GPT2_TARGETS)
BIASED = kinds.Case(lambda: config(["query", "dense"], ["dense"]), "AutoModel", tiny.bert, ["query", "dense"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, CONV1D, BIASED], ids=["linear", "conv1d", "biased"])
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("feedforward", [[], ["convolution"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, feedforward: list[str], dtype: torch.dtype) -> None:
    def make() -> Any:
        return config(["convolution"], feedforward)

    auto = "AutoModelForImageClassification"
    kinds.check_merge(kinds.Case(make, auto, tiny.resnet, targets=["convolution"]), tmp_path, dtype)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        scale = own.get(f"base_model.model.{name.removesuffix('weight')}ia3_l")
        return None if scale is None else weight * scale

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)
