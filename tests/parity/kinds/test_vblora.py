"""VB-LoRA against PEFT, and against the formula in float64."""

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

RANK, LENGTH = 3, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(**fields: Any) -> kinds.Case:
    sizes = {"r": RANK, "vector_length": LENGTH, "num_vectors": 20, "target_modules": list(kinds.LLAMA_TARGETS)}
    return kinds.Case(lambda: peft.VBLoRAConfig(**{**sizes, **fields}))


def conv1d(**fields: Any) -> kinds.Case:
    case = linear(target_modules=list(kinds.GPT2_TARGETS), **fields)
    return replace(case, model=tiny.gpt2, targets=kinds.GPT2_TARGETS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only_largest", [False, True], ids=["logits", "largest"])
@pytest.mark.parametrize("layout", [linear, conv1d])
def test_merge_is_bit_equal(
    tmp_path: Path, layout: Callable[..., kinds.Case], only_largest: bool, dtype: torch.dtype
) -> None:
    kinds.check_merge(layout(save_only_topk_weights=only_largest), tmp_path, dtype)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("only_largest", [False, True], ids=["logits", "largest"])
def test_other_counts_are_bit_equal(tmp_path: Path, only_largest: bool, count: int) -> None:
    # 300 vectors: indices in int16
    case = linear(topk=count, num_vectors=300, save_only_topk_weights=only_largest)
    kinds.check_merge(replace(case, spread=1.0), tmp_path, torch.float32)


@pytest.mark.parametrize("model", [tiny.tall_llama, tiny.tall_gpt2])
def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path, model: Callable[[], Any]) -> None:
    case = linear() if model is tiny.tall_llama else conv1d(save_only_topk_weights=True)
    kinds.check_merge(replace(case, model=model), tmp_path, torch.bfloat16)


def test_float64_is_the_formula(tmp_path: Path) -> None:
    def mixed(logits: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Return the sum of the two likeliest vectors, by a softmax over all whose other entries are struck out."""
        weights = torch.zeros_like(logits)
        best = logits.argsort(-1)[..., -2:]
        weights.scatter_(-1, best, logits.gather(-1, best).exp())
        return torch.einsum("abn,nv->abv", weights / weights.sum(-1, keepdim=True), bank)

    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('weight')}vblora_logits"
        if f"{path}_A" not in own:
            return None
        right, left = (mixed(own[f"{path}_{half}"], own["base_model.vblora_vector_bank"]) for half in "AB")
        delta = torch.einsum("orv,riw->oviw", left, right)
        return weight + delta.reshape(weight.shape)

    kinds.check_float64(linear(), tmp_path, formula)


@pytest.mark.parametrize("only_largest", [False, True], ids=["logits", "largest"])
def test_damage_is_refused_by_name(tmp_path: Path, only_largest: bool) -> None:
    kinds.check_damage(linear(save_only_topk_weights=only_largest), tmp_path)


@pytest.mark.parametrize("index", [20, 255])
def test_an_index_outside_of_the_bank_is_an_error(tmp_path: Path, index: int) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if name.endswith("q_proj.vblora_logits_B_topk_indices"))
        tensors[name][1, 2, 0] = index
        return tensors

    check_index_error(tmp_path, edit, "0 to 19")


def test_a_vector_twice_in_a_sum_is_an_error(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if name.endswith("q_proj.vblora_logits_A_topk_indices"))
        tensors[name][1, 2] = 7
        return tensors

    check_index_error(tmp_path, edit, "different vectors")


def check_index_error(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    base, adapter = kinds.write_case(linear(save_only_topk_weights=True), folder, torch.float32)
    path = adapter / kinds.WEIGHTS
    save_file(edit(load_file(path)), path)
    with pytest.raises(rawmerge.MergeError, match=message):
        rawmerge.merge_adapter(base, adapter, folder / "ours")
    assert not (folder / "ours").exists()
