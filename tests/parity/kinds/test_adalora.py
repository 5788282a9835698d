"""AdaLoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

RANK, ALPHA = 6, 5


def config(**fields: Any) -> Any:
    fields = {"target_modules": list(kinds.LLAMA_TARGETS), "init_r": RANK, "lora_alpha": ALPHA, **fields}
    return peft.AdaLoraConfig(total_step=100, **fields)


def kept(*ranks: int) -> list[bool]:
    return [rank in ranks for rank in range(RANK)]


#: As training leaves it: each module with the ranks that it kept, one with none, one not named.
PRUNED = {
    **{f"model.layers.{layer}.self_attn.q_proj.lora_E": kept(0, 2, 5) for layer in range(2)},
    **{f"model.layers.{layer}.mlp.gate_proj.lora_E": kept(3) for layer in range(2)},
    **{f"model.layers.{layer}.mlp.down_proj.lora_E": kept() for layer in range(2)},
}
PLAIN = kinds.Case(config)
CONV1D = kinds.Case(
    lambda: config(target_modules=list(kinds.GPT2_TARGETS)), model=tiny.gpt2, targets=kinds.GPT2_TARGETS
)
PATTERN = kinds.Case(lambda: config(rank_pattern=dict(PRUNED)), targets=("q_proj", "k_proj", "gate_proj"))
NEGATIVE = kinds.Case(lambda: config(lora_alpha=-3, rank_pattern=dict(PRUNED)), targets=("q_proj", "k_proj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN, CONV1D, PATTERN], ids=["linear", "conv1d", "pruned"])
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


def test_an_alpha_that_is_not_positive_gives_way_to_the_rank(tmp_path: Path) -> None:
    kinds.check_merge(NEGATIVE, tmp_path, torch.float32)


def test_a_first_rank_that_bfloat16_cannot_hold_is_rounded_as_peft_does(tmp_path: Path) -> None:
    case = kinds.Case(lambda: config(init_r=259, target_modules=["k_proj"]), targets=["k_proj"], spread=0.05)
    kinds.check_merge(case, tmp_path, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    case = kinds.Case(
        lambda: config(target_modules=["convolution"]),
        "AutoModelForImageClassification",
        tiny.resnet,
        targets=["convolution"],
    )
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("case", [replace(PLAIN, model=tiny.tall_llama), replace(CONV1D, model=tiny.tall_gpt2)])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, case: kinds.Case) -> None:
    kinds.check_merge(case, tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}lora_"
        if f"{path}E" not in own:
            return None
        delta = torch.zeros_like(weight)
        for rank, value in enumerate(own[f"{path}E"].flatten()):
            delta += value * torch.outer(own[f"{path}B"][:, rank], own[f"{path}A"][rank])
        return weight + delta * ALPHA / (RANK + 1e-5)

    kinds.check_float64(PLAIN, tmp_path, formula)


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    kinds.check_damage(PLAIN, tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [{"model.layers.0.self_attn.q_proj.lora_E": kept(1)}, {"model.layers.0.self_attn.q_proj.lora_E": [True]}, {"x": 3}],
    ids=["other rank", "too few", "no masks"],
)
def test_a_rank_pattern_that_contradicts_the_tensors_is_refused(tmp_path: Path, pattern: dict[str, Any]) -> None:
    base, adapter = kinds.write_case(PLAIN, tmp_path, torch.float32)
    kinds.edit_config(adapter, rank_pattern=pattern)
    with pytest.raises(rawmerge.RefusedError, match=r"lora_E|rank_pattern"):
        rawmerge.plan_merge(base, adapter)


def test_a_module_without_ranks_keeps_its_bytes(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(PATTERN, tmp_path, torch.bfloat16)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    before, ours = oracle.read_tensors(base), oracle.read_tensors(tmp_path / "ours")
    kept_whole = [name for name in before if "down_proj" in name]
    assert kept_whole
    assert all(ours[name] == before[name] for name in kept_whole)
