"""HiRA against PEFT, and against the formula in float64."""

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


def config(targets: list[str], **fields: Any) -> Any:
    return peft.HiraConfig(r=3, target_modules=targets, **fields)


#: PEFT 0.21.2 accepts rank_pattern, and gives every module rank r all the same.
PLAIN = kinds.Case(lambda: config(list(kinds.LLAMA_TARGETS), rank_pattern={"q_proj": 5}))
CONV1D = kinds.Case(lambda: config(list(kinds.GPT2_TARGETS)), model=tiny.gpt2, targets=kinds.GPT2_TARGETS)
EMBEDDING = kinds.Case(lambda: config(["embed_tokens", "k_proj"]), targets=["embed_tokens", "k_proj"])
CONVOLUTION = kinds.Case(
    lambda: config(["convolution"]), "AutoModelForImageClassification", tiny.resnet, targets=["convolution"]
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [PLAIN, CONV1D, EMBEDDING, CONVOLUTION], ids=["linear", "conv1d", "embedding", "convolution"]
)
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("case", [PLAIN, CONV1D], ids=["linear", "conv1d"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, case: kinds.Case) -> None:
    tall = tiny.tall_llama if case is PLAIN else tiny.tall_gpt2
    kinds.check_merge(replace(case, model=tall), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.hira_A" not in own:
            return None
        scales = torch.einsum("ri,or->oi", own[f"{path}.hira_A"], own[f"{path}.hira_B"])
        return weight * (1 + scales)

    kinds.check_float64(PLAIN, tmp_path, formula)


@pytest.mark.parametrize("case", [PLAIN, EMBEDDING], ids=["linear", "embedding"])
def test_damage_is_refused_by_name(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_damage(case, tmp_path, ["base_layer"])  # a copy of the base, which PEFT saves with embeddings


def test_ranks_of_the_pattern_are_followed_where_the_tensors_have_them(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(kinds.Case(lambda: config(["q_proj"])), tmp_path, torch.float32)
    kinds.edit_config(adapter, r=2, rank_pattern={"q_proj": 3})
    assert rawmerge.plan_merge(base, adapter)
    kinds.edit_config(adapter, rank_pattern={"q_proj": 4})
    with pytest.raises(rawmerge.RefusedError, match="hira_A"):
        rawmerge.plan_merge(base, adapter)
