"""PiSSA and OLoRA as they are trained, and as PEFT converts them, against PEFT and the formula in float64."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rawmerge
from rawmerge.errors import UnsupportedAdapterError
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

RANK, ALPHA = 3, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(*targets: str, **fields: Any) -> Any:
    names = list(targets or kinds.LLAMA_TARGETS)
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, **fields)


def kasa() -> Any:
    return pytest.importorskip("peft.tuners.lora.config").KasaConfig()


def on_linear(**fields: Any) -> kinds.Case:
    return kinds.Case(lambda: config(**fields))


def on_conv1d(*targets: str, **fields: Any) -> kinds.Case:
    return kinds.Case(lambda: config(*targets, **fields), model=tiny.gpt2, targets=targets)


CASES = {
    "pissa": on_linear(init_lora_weights="pissa"),
    "olora": on_linear(init_lora_weights="olora"),
    "OLoRA": on_linear(init_lora_weights="OLoRA"),
    "pissa, other ranks": on_linear(init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 7}),
    "pissa and dora": on_linear(init_lora_weights="pissa", use_dora=True),
    "pissa and kasa": on_linear(init_lora_weights="pissa", kasa_config=kasa()),
    "pissa on Conv1D": on_conv1d(*kinds.GPT2_TARGETS, init_lora_weights="pissa"),
    "olora on Conv1D": on_conv1d("attn.c_proj", init_lora_weights="olora"),
    "pissa and an embedding": kinds.Case(
        lambda: config("embed_tokens", "k_proj", init_lora_weights="pissa"), targets=("embed_tokens", "k_proj")
    ),
    "a stored residual": kinds.Case(
        lambda: config("lm_head", "k_proj", init_lora_weights="pissa"), targets=("lm_head", "k_proj")
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merge_is_bit_equal(tmp_path: Path, case: kinds.Case, dtype: torch.dtype) -> None:
    kinds.check_merge(case, tmp_path, dtype)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_weights_of_several_tiles_are_bit_equal(tmp_path: Path, name: str) -> None:
    kinds.check_merge(replace(CASES[name], model=tiny.tall_llama), tmp_path, torch.bfloat16)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_is_plain(tmp_path: Path, init: str) -> None:
    """PEFT's conversion gives the residual's difference as a pair of twice the rank, on the base as it was."""
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(oracle.load_pretrained(base, tiny.CAUSAL), config(init_lora_weights=init))
        wrapped.peft_config["default"].init_lora_weights = True
        wrapped.save_pretrained(tmp_path / "initial")
        wrapped.peft_config["default"].init_lora_weights = init
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    load = oracle.pretrained(base, tiny.CAUSAL)
    expected = oracle.merge_with_peft(load, tmp_path / "adapter", tmp_path / "peft")
    rawmerge.merge_adapter(base, tmp_path / "adapter", tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


def removed_part(weight: Any, init: str) -> Any:
    """Return what an initialisation takes out of a weight: by eigenvectors, or by Gram and Schmidt."""
    if init == "pissa":
        vectors = np.linalg.eigh(weight.T @ weight)[1][:, -RANK:]
        return weight @ vectors @ vectors.T
    basis: list[Any] = []
    for column in weight.T[:RANK]:
        rest = column - sum((vector @ column) * vector for vector in basis)
        basis.append(rest / np.sqrt(rest @ rest))
    return ALPHA / RANK * np.stack(basis, 1) @ (np.stack(basis) @ weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_float64_is_the_formula_on_the_residual_of_training(tmp_path: Path, init: str) -> None:
    def formula(name: str, weight: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in own:
            return None
        residual = weight - torch.from_numpy(removed_part(weight.numpy(), init))
        return residual + ALPHA / RANK * own[f"{path}.lora_B.weight"] @ own[f"{path}.lora_A.weight"]

    # the residual is training's, made in float32
    kinds.check_float64(CASES[init], tmp_path, formula, tolerance=2**-18)


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa on Conv1D"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str) -> None:
    kinds.check_damage(CASES[name], tmp_path)


def test_wide_output_keeps_the_residual_of_training(tmp_path: Path) -> None:
    """The base's dtype is what the residual was rounded to in training, whatever the output has."""
    base, adapter = kinds.write_case(CASES["pissa"], tmp_path, torch.bfloat16)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", dtype="float32")
    load = oracle.pretrained(base, tiny.CAUSAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load(), adapter)
    ours = oracle.read_tensors(tmp_path / "ours")
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default").double()
            expected = module.base_layer.weight.double() + delta
            kinds.assert_close(kinds.as_tensor(ours[f"{name}.weight"]), expected.detach(), 2**-22, name)


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("pissa_niter_4", "draws random numbers"),
        ("PiSSA", "may have changed the base"),
        ("corda", "what it saw of some data"),
        ("loftq", "residual of its quantisation"),
        ("lora_ga", "by a gradient"),
    ],
)
def test_a_base_that_cannot_be_had_again_is_refused_with_the_reason(tmp_path: Path, init: str, reason: str) -> None:
    base, adapter = kinds.write_case(on_linear(), tmp_path, torch.float32)
    kinds.edit_config(adapter, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights.*{init}(.|\n)*{reason}"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_convolutions_are_refused(tmp_path: Path, init: str) -> None:
    case = kinds.Case(lambda: config("convolution"), "AutoModelForImageClassification", tiny.resnet)
    base, adapter = kinds.write_case(case, tmp_path, torch.float32)
    kinds.edit_config(adapter, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError, match=f"convolution.*a linear weight, for {init}"):
        rawmerge.plan_merge(base, adapter)


def test_olora_on_a_wide_conv1d_is_refused(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(on_conv1d("c_attn"), tmp_path, torch.float32)
    kinds.edit_config(adapter, init_lora_weights="olora")
    with pytest.raises(UnsupportedAdapterError, match=r"c_attn.*stored"):
        rawmerge.plan_merge(base, adapter)
