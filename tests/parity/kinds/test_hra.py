"""HRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import NonFiniteTensorError
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK = 5


def config(**fields: Any) -> Any:
    return peft.HRAConfig(**{"target_modules": list(kinds.LLAMA_TARGETS), "r": RANK, **fields})


PLAIN = kinds.Case(config)
ORTHOGONAL = kinds.Case(lambda: config(apply_GS=True))
BOTH = pytest.mark.parametrize("case", [PLAIN, ORTHOGONAL], ids=["chain", "orthogonalised"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(replace(case, model=tiny.tall_llama), tmp_path, dtype)


@pytest.mark.parametrize("is_orthogonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, is_orthogonal: bool, dtype: torch.dtype) -> None:
    case = kinds.Case(
        lambda: config(target_modules=["convolution"], apply_GS=is_orthogonal),
        "AutoModelForImageClassification",
        tiny.resnet,
        targets=["convolution"],
    )
    kinds.check_merge(case, tmp_path, dtype)


@BOTH
def test_float64_is_the_formula(tmp_path: Path, case: kinds.Case) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        vectors = own.get(f"base_model.model.{name.removesuffix('weight')}hra_u")
        if vectors is None:
            return None
        if case is ORTHOGONAL:  # Gram and Schmidt's basis is that of a QR decomposition, up to signs
            vectors = torch.linalg.qr(vectors).Q
        result = weight.clone()
        for vector in vectors.T:  # each row is reflected by itself
            unit = vector / (vector @ vector).sqrt()
            result = result - 2 * torch.outer((result * unit).sum(1), unit)
        return result

    kinds.check_float64(case, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


def test_another_rank_than_the_config_says_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    kinds.edit_config(adapter, r=RANK + 1)
    with pytest.raises(rawmerge.RefusedError, match="hra_u"):
        rawmerge.plan_merge(base, adapter)


def test_a_vector_of_zeros_has_no_reflection(tmp_path: Path) -> None:
    case = replace(PLAIN, edit=lambda tensors: {name: 0 * tensor for name, tensor in tensors.items()})
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(NonFiniteTensorError):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
