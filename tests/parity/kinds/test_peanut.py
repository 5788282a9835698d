"""PEANuT against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.methods.peanut import PeanutKind
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

activations = pytest.importorskip("transformers.activations")
#: With parameters of their own, clipped, or slow forms of others.
UNUSED = {"gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "laplace", "prelu"}


def config(**fields: Any) -> Any:
    return peft.PeanutConfig(**{"r": 3, "scaling": 1.7, "target_modules": list(kinds.LLAMA_TARGETS), **fields})


PLAIN = kinds.Case(config)
DEEP = kinds.Case(lambda: config(depth=2, act_fn="silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [PLAIN, DEEP], ids=["plain", "deep"])
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("name", sorted(set(activations.ACT2FN) - UNUSED - {"xielu", "sqrtsoftplus"}))
def test_activations_are_transformers_s(tmp_path: Path, name: str) -> None:
    case = kinds.Case(lambda: config(act_fn=name, depth=1, target_modules=["k_proj"]), targets=["k_proj"])
    kinds.check_merge(case, tmp_path, torch.float32)


@pytest.mark.parametrize("case", [PLAIN, DEEP], ids=["plain", "deep"])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_merge(replace(case, model=tiny.tall_llama), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}peanut_"
        if f"{path}A.weight" not in own:
            return None

        def layer(which: str, inputs: torch.Tensor) -> torch.Tensor:
            outputs = own[f"{path}{which}.weight"] @ inputs
            return outputs / (1 + torch.exp(-outputs))

        first = layer("A", weight)
        second = layer("encoders.0", first)
        third = layer("decoders.0", layer("encoders.1", second)) + second
        last = layer("decoders.1", third) + first
        return weight + 1.7 * own[f"{path}B.weight"] @ last

    kinds.check_float64(DEEP, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(DEEP, tmp_path)


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_other_activations_are_refused(tmp_path: Path, name: str) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    kinds.edit_config(adapter, act_fn=name)
    with pytest.raises(rawmerge.RefusedError, match="act_fn"):
        rawmerge.plan_merge(base, adapter)
    assert not PeanutKind.fields.followed["act_fn"].check(name)
