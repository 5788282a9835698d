"""LLaMA-Factory's example file, unchanged, ends in what PEFT's `merge_and_unload` makes, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

EXAMPLE = """\
### Note: DO NOT use quantized model or quantization_bit when merging lora adapters

### model
model_name_or_path: base
adapter_name_or_path: saves/lora
template: llama3
finetuning_type: lora

### export
export_dir: merged
export_size: 2
export_device: cpu
export_legacy_format: false
"""
LORA: dict[str, Any] = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "merge.yaml").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_example_file_equals_pefts_merge(folder: Path, dtype: torch.dtype) -> None:
    base = oracle.save_base(folder / "base", tiny.CAUSAL, tiny.llama(), dtype)
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, folder / "saves/lora", **LORA)
    expected = oracle.merge_with_peft(load, adapter, folder / "peft")
    rawmerge.run_export(rawmerge.read_export("merge.yaml"))
    oracle.assert_same_checkpoint(oracle.read_tensors(folder / "merged"), expected)
    assert [path.name for path in (folder / "merged").glob("*.safetensors")] == ["model.safetensors"]


def test_several_adapters_equal_pefts_merges_one_after_the_other(folder: Path) -> None:
    base = oracle.save_base(folder / "base", tiny.CAUSAL, tiny.llama(), torch.bfloat16)
    load = oracle.pretrained(base, tiny.CAUSAL)
    one = oracle.save_adapter(load, folder / "one", **LORA)
    two = oracle.save_adapter(load, folder / "two", r=4, lora_alpha=7, target_modules=["q_proj", "k_proj"])
    model: Any = load()
    for adapter in (one, two):  # as LLaMA-Factory's model/adapter.py
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder / "peft")
    rawmerge.run_export(rawmerge.read_export("merge.yaml", ["adapter_name_or_path=one,two"]))
    oracle.assert_same_checkpoint(oracle.read_tensors(folder / "merged"), oracle.read_tensors(folder / "peft"))
