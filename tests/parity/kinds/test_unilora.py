"""Uni-LoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.parity


def config(**fields: Any) -> Any:
    targets = fields.pop("target_modules", list(kinds.LLAMA_TARGETS))
    return peft.UniLoraConfig(
        **{"r": 3, "theta_d_length": 50, "target_modules": targets, "save_indices": True, **fields}
    )


CASES = {
    "stored": kinds.Case(config),
    "conv1d": kinds.Case(
        lambda: config(target_modules=list(kinds.GPT2_TARGETS)), model=tiny.gpt2, targets=kinds.GPT2_TARGETS
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, name: str) -> None:
    tall = tiny.tall_llama if name == "stored" else tiny.tall_gpt2
    kinds.check_merge(replace(CASES[name], model=tall), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}unilora_"
        if f"{path}indices_A" not in own:
            return None
        vector, pair = own["base_model.unilora_theta_d"].tolist(), {}
        for half in "AB":
            places, scales = own[f"{path}indices_{half}"].tolist(), own[f"{path}scales_{half}"].tolist()
            pair[half] = torch.tensor(
                [[vector[p] * s for p, s in zip(*row, strict=True)] for row in zip(places, scales, strict=True)],
                dtype=torch.float64,
            )
        return weight + pair["B"] @ pair["A"]

    kinds.check_float64(CASES["stored"], tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(CASES["stored"], tmp_path)


@pytest.mark.parametrize("place", [-1, 50])
def test_places_that_are_none_of_the_vector_s_are_refused(tmp_path: Path, place: int) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(tensor for name, tensor in tensors.items() if name.endswith("indices_B"))[1, 1] = place
        return tensors

    base, adapter = kinds.write_case(replace(CASES["stored"], edit=edit), tmp_path, torch.float32)
    with pytest.raises(rawmerge.MergeError, match=f"unilora_indices_B.*{place}"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")


def test_the_stream_of_places_stays_the_same() -> None:
    """Fourteen elements of five: two of each, four of those once more, shuffled."""
    generator = np.random.default_rng(42)
    places = np.concatenate([np.repeat(np.arange(5), 2), generator.choice(5, size=4, replace=False)])
    generator.shuffle(places)
    assert places.tolist() == [2, 4, 1, 4, 3, 2, 3, 3, 4, 1, 0, 0, 2, 0]


def test_a_rank_that_would_fill_the_memory_with_places_is_refused(tmp_path: Path) -> None:
    case = kinds.Case(lambda: config(save_indices=False))
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    kinds.edit_config(adapter, r=2**30)
    with pytest.raises(rawmerge.RefusedError, match="r of at most 64"):
        rawmerge.plan_merge(base, adapter)
