"""GLoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def biased(weight: str, column: str, bias: str) -> kinds.Case:
    ways = {"config_A_B": weight, "config_C": column, "config_D_E": bias}
    targets = [] if weight == "none" else kinds.LLAMA_TARGETS
    make = lambda: peft.GloraConfig(r=3, target_modules=list(kinds.LLAMA_TARGETS), **ways)  # noqa: E731
    return kinds.Case(make, model=lambda: tiny.llama(attention_bias=True, mlp_bias=True), targets=targets)


def plain(weight: str) -> kinds.Case:
    return kinds.Case(lambda: peft.GloraConfig(r=3, target_modules=list(kinds.LLAMA_TARGETS), config_A_B=weight))


CASES = {
    "lora": plain("lora"),
    "vector": plain("vector"),
    "constant": plain("constant"),
    "lora, lora, constant": biased("lora", "lora", "constant"),
    "vector, vector, vector": biased("vector", "vector", "vector"),
    "constant, none, vector": biased("constant", "none", "vector"),
    "none, lora, none": biased("none", "lora", "none"),
    "lora, none, none": biased("lora", "none", "none"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_merge_is_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    # MKL's W @ C has other bits where W lies at no multiple of 16 bytes, as PEFT's mapped weights may
    tolerance = 2**-21 if dtype == torch.float32 and name.split(", ")[1:2] in (["lora"], ["vector"]) else 0
    kinds.check_merge(replace(CASES[name], tolerance=tolerance), tmp_path, dtype)


def test_a_weight_of_several_tiles_is_bit_equal(tmp_path: Path) -> None:
    kinds.check_merge(replace(plain("lora"), model=tiny.tall_llama), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("name", ["lora, lora, constant", "vector, vector, vector"])
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    base, _ = kinds.write_case(CASES[name], tmp_path / "first", torch.float32)
    weights = {key: kinds.as_tensor(raw) for key, raw in oracle.read_tensors(base).items()}

    def formula(tensor: str, before: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        module, _, parameter = tensor.rpartition(".")
        path = f"base_model.model.{module}.glora_"

        def value(which: str) -> torch.Tensor:
            if f"{path}{which}.X" in own:
                return own[f"{path}{which}.X"]
            return own[f"{path}{which}.Xd"] @ own[f"{path}{which}.Xu"]

        if not any(key.startswith(path) for key in own):
            return None
        if parameter == "weight":
            return before * (1 + value("A")) + value("B")
        column = (weights[f"{module}.weight"] * value("C").T).sum(1)
        return before * (1 + value("D")) + value("E") + column

    kinds.check_float64(CASES[name], tmp_path, formula)


@pytest.mark.parametrize("name", ["lora", "lora, lora, constant", "vector, vector, vector", "none, lora, none"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)


def test_a_path_that_is_switched_off_must_be_zero(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(CASES["constant, none, vector"], tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    name = next(name for name in tensors if name.endswith("glora_C.zeros"))
    tensors[name][1] = 1
    save_file(tensors, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.MergeError, match=r"glora_C.zeros.*expected zeros"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
