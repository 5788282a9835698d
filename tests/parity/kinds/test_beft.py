"""BEFT against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
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
    return peft.BeftConfig(target_modules=["query", "intermediate.dense"])


PLAIN = kinds.Case(config, "AutoModel", tiny.bert, targets=())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_biases_are_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    kinds.check_merge(PLAIN, tmp_path, dtype)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    changed = set()

    def formula(name: str, bias: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        vector = own.get(f"base_model.model.{name.removesuffix('.bias')}.beft_bias")
        if vector is None:
            return None
        changed.add(name)
        return torch.tensor(
            [old + added for old, added in zip(bias.tolist(), vector[0].tolist(), strict=True)]
        ).double()

    kinds.check_float64(PLAIN, tmp_path, formula)
    assert len(changed) == 4


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


def test_a_module_without_bias_is_refused_as_peft_refuses_it(tmp_path: Path) -> None:
    case = kinds.Case(lambda: peft.BeftConfig(target_modules=["q_proj"]))
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    with pytest.raises(ValueError, match="Base layer has no bias"):
        kinds.peft_merge(case, base, adapter, tmp_path / "peft")
    with pytest.raises(rawmerge.RefusedError, match=r"q_proj.beft_bias.*a module with a bias"):
        rawmerge.plan_merge(base, adapter)
