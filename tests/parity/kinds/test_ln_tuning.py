"""LN tuning against PEFT: the trained norms, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity


def case(targets: list[str], **fields: Any) -> kinds.Case:
    return kinds.Case(lambda: peft.LNTuningConfig(target_modules=targets), targets=targets, **fields)


LLAMA = case(["input_layernorm", "post_attention_layernorm", "model.norm"])
CASES = {
    "llama": LLAMA,
    "gpt2": case(["ln_1", "ln_f"], model=tiny.gpt2),
    "bert": case(["LayerNorm"], auto="AutoModel", model=tiny.bert),
    # norms with running means, and a counter that is an integer
    "resnet": case(["normalization"], auto="AutoModelForImageClassification", model=tiny.resnet),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_merge_has_the_trained_bytes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    kinds.check_merge(CASES[name], tmp_path, dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_decides_the_dtype(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    def recast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: (tensor.float() * 1.001).to(stored) for name, tensor in tensors.items()}

    kinds.check_merge(kinds.Case(LLAMA.make_config, targets=LLAMA.targets, edit=recast), tmp_path, dtype)


def test_trained_norms_are_the_files_numbers(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(LLAMA, tmp_path, torch.float32)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    trained = load_file(adapter / kinds.WEIGHTS)
    assert len(trained) == 5
    for name, tensor in trained.items():
        target = name.removeprefix("base_model.model.").replace("ln_tuning_layers.", "")
        assert torch.equal(kinds.as_tensor(ours[target]), tensor.double()), name


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    base, adapter = kinds.write_case(LLAMA, tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    name = "base_model.model.model.layers.1.input_layernorm.ln_tuning_layers.weight"
    longer = torch.cat([tensors[name], tensors[name][:1]])
    for damaged in (
        {**tensors, name: longer},
        {**tensors, name: tensors[name][:0].clone()},
        {**tensors, name.replace("weight", "bias"): tensors[name].clone()},
        {**tensors, name.replace("weight", "not_a_part"): tensors[name].clone()},
        {**tensors, name.replace("layers.1", "layers.7"): tensors[name].clone()},
        {**tensors, name.replace("ln_tuning_layers.weight", "ln_tuning_layers.inner.weight"): tensors[name].clone()},
    ):
        save_file(damaged, adapter / kinds.WEIGHTS)
        with pytest.raises(rawmerge.RefusedError, match="input_layernorm"):
            rawmerge.plan_merge(base, adapter)
