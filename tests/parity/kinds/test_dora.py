"""DoRA against PEFT, and against the formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

RANK, ALPHA = 3, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = "AutoModelForImageClassification"


def config(*targets: str, **fields: Any) -> Any:
    names = list(targets or kinds.LLAMA_TARGETS)
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=True, **fields)


def scaled(*targets: str) -> Any:
    patterns = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}
    return config(*targets, use_rslora=True, **patterns)


LINEAR = kinds.Case(config)
CONV1D = kinds.Case(lambda: config(*kinds.GPT2_TARGETS), model=tiny.gpt2, targets=kinds.GPT2_TARGETS)
SCALED = kinds.Case(scaled)
EMBEDDING = kinds.Case(lambda: config("embed_tokens", "k_proj"), targets=("embed_tokens", "k_proj"))
CONVOLUTION = kinds.Case(lambda: config("convolution"), IMAGES, tiny.resnet, ("convolution",))
CASES = {"linear": LINEAR, "conv1d": CONV1D, "scaled": SCALED, "embedding": EMBEDDING, "convolution": CONVOLUTION}
TALL = {
    "linear": replace(LINEAR, model=tiny.tall_llama),
    "conv1d": replace(CONV1D, model=tiny.tall_gpt2),
    "embedding": replace(EMBEDDING, model=lambda: tiny.llama(vocab_size=9000, num_hidden_layers=1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TALL.values(), ids=TALL)
def test_weights_of_several_tiles_are_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 1, 3)], ids=str)
def test_convolutions_of_every_dimension_are_bit_equal(tmp_path: Path, shape: tuple[int, ...]) -> None:
    kinds_of: dict[int, Any] = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}

    def build() -> torch.nn.Module:
        return tiny.plain(conv=kinds_of[len(shape)](6, 10, shape), head=torch.nn.Linear(4, 4))

    base = tiny.save_plain(build, tmp_path / "base.safetensors", torch.bfloat16)
    load = tiny.load_plain(build, base)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=2, target_modules=["conv", "head"], use_dora=True)
    merged = oracle.merged_model(load, adapter).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, tmp_path / "peft.safetensors")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(
        oracle.read_tensors(tmp_path / "ours"), oracle.read_tensors(tmp_path / "peft.safetensors")
    )


def _columns_are_outputs(name: str) -> bool:
    return ".h." in name or "embed_tokens" in name


def _pair(own: Mapping[str, torch.Tensor], path: str) -> tuple[np.ndarray, np.ndarray] | None:
    for suffixes in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A")):
        if f"{path}.{suffixes[0]}" in own:
            left, right = (own[f"{path}.{suffix}"].numpy() for suffix in suffixes)
            return left, right
    return None


def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    path = f"base_model.model.{name.removesuffix('.weight')}"
    if (pair := _pair(own, path)) is None:
        return None
    left, right = pair
    magnitude = own[f"{path}.lora_magnitude_vector"].numpy().ravel()
    outputs = weight.numpy().T if _columns_are_outputs(name) else weight.numpy()
    result = np.empty_like(outputs)
    for index in range(len(outputs)):
        direction = outputs[index] + ALPHA / RANK * sum(left[index, k] * right[k] for k in range(RANK))
        result[index] = magnitude[index] * direction / np.sqrt((direction**2).sum())
    return torch.from_numpy(np.ascontiguousarray(result.T if _columns_are_outputs(name) else result))


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding"])
def test_float64_is_the_formula(tmp_path: Path, name: str) -> None:
    kinds.check_float64(CASES[name], tmp_path, formula)


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "convolution"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path, unneeded=["base_layer"])


def test_wide_output_of_a_narrow_base_is_rounded_once(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(LINEAR, tmp_path, torch.bfloat16)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", dtype="float32")
    own = {name: tensor.double() for name, tensor in load_file(adapter / kinds.WEIGHTS).items()}
    before, ours = oracle.read_tensors(base), oracle.read_tensors(tmp_path / "ours")
    for name, raw in before.items():
        expected = formula(name, kinds.as_tensor(raw), own)
        if expected is not None:
            kinds.assert_close(kinds.as_tensor(ours[name]), expected, 2**-21, name)


@pytest.mark.parametrize("ending", [".weight", ".default", ".default.weight"])
def test_other_names_of_magnitudes_mean_the_same(tmp_path: Path, ending: str) -> None:
    base, adapter = kinds.write_case(LINEAR, tmp_path, torch.bfloat16)
    rawmerge.merge_adapter(base, adapter, tmp_path / "expected")
    tensors = load_file(adapter / kinds.WEIGHTS)
    renamed = {f"{name}{ending}" if "magnitude" in name else name: tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / kinds.WEIGHTS)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    expected = oracle.read_tensors(tmp_path / "expected")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


def test_magnitudes_without_the_switch_are_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(LINEAR, tmp_path, torch.float32)
    kinds.edit_config(adapter, use_dora=False)
    with pytest.raises(rawmerge.RefusedError, match="lora_magnitude_vector"):
        rawmerge.plan_merge(base, adapter)


def test_the_switch_without_magnitudes_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(replace(LINEAR, make_config=lambda: plain()), tmp_path, torch.float32)
    kinds.edit_config(adapter, use_dora=True)
    with pytest.raises(rawmerge.RefusedError, match="lora_magnitude_vector"):
        rawmerge.plan_merge(base, adapter)


def plain() -> Any:
    return peft.LoraConfig(r=RANK, target_modules=list(kinds.LLAMA_TARGETS))
