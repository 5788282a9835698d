"""SHiRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

Tensors = dict[str, torch.Tensor]


def config(**fields: Any) -> Any:
    return peft.ShiraConfig(r=3, target_modules=list(kinds.LLAMA_TARGETS), **fields)


PLAIN = kinds.Case(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    kinds.check_merge(PLAIN, tmp_path, dtype)


def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(replace(PLAIN, model=tiny.tall_llama), tmp_path, torch.bfloat16)


def test_places_stored_as_floats_as_on_windows_are_the_same(tmp_path: Path) -> None:
    kinds.check_merge(replace(PLAIN, edit=_edited(lambda indices: indices.float())), tmp_path, torch.bfloat16)


def test_places_in_any_order_are_the_same(tmp_path: Path) -> None:
    def backwards(tensors: Tensors) -> Tensors:
        return {name: tensor.flip(-1).contiguous() for name, tensor in tensors.items()}

    kinds.check_merge(replace(PLAIN, edit=backwards), tmp_path, torch.float32)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.shira_indices" not in own:
            return None
        places = own[f"{path}.shira_indices"].T.tolist()
        for (row, column), value in zip(places, own[f"{path}.shira_weight"].tolist(), strict=True):
            weight[row, column] += value
        return weight

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (
            lambda indices: indices.index_fill(1, torch.tensor([1]), 64),
            r"(rows|columns) from 0 to \d+, found \d+ to 64",
        ),
        (lambda indices: indices.index_fill(1, torch.tensor([1]), -1), r"rows from 0 to \d+, found -1 to"),
        (lambda indices: indices.index_copy(1, torch.tensor([1]), indices[:, :1]), "each place once"),
        (lambda indices: indices.float() + 0.5, "whole numbers"),
        (lambda indices: indices.float() * float("nan"), "whole numbers"),
        (lambda indices: indices.float() + float("inf"), "whole numbers"),
    ],
)
def test_wrong_places_are_errors(tmp_path: Path, edit: Callable[[torch.Tensor], torch.Tensor], found: str) -> None:
    base, adapter = kinds.write_case(replace(PLAIN, edit=_edited(edit)), tmp_path, torch.float32)
    with pytest.raises(rawmerge.MergeError, match=f"shira_indices.*{found}"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")


def test_places_of_a_dtype_that_cannot_hold_them_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    tensors = _edited(lambda indices: indices.to(torch.bfloat16))(load_file(adapter / kinds.WEIGHTS))
    save_file(tensors, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.RefusedError, match=r"shira_indices.*I32"):
        rawmerge.plan_merge(base, adapter)


def _edited(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: edit(tensor) if name.endswith("shira_indices") else tensor for name, tensor in tensors.items()
    }
