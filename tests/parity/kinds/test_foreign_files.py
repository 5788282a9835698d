"""Adapters that PEFT saves as pickles, against PEFT's merge of the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rawmerge
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

TARGETS = list(kinds.LLAMA_TARGETS)
CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def save_as_pickle(base: Path, adapter: Path, auto: str) -> None:
    """Let PEFT load the adapter and save it again as a pickle."""
    model = peft.PeftModel.from_pretrained(oracle.load_pretrained(base, auto), adapter)
    (adapter / kinds.WEIGHTS).unlink()
    model.save_pretrained(adapter, safe_serialization=False)
    assert {path.name for path in adapter.iterdir()} >= {"adapter_model.bin", "adapter_config.json"}
    assert not (adapter / kinds.WEIGHTS).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pickle_of_peft_s_is_merged_to_the_bytes_of_peft_s_merge(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    case = kinds.Case(CONFIGS[kind])
    base, adapter = kinds.write_case(case, tmp_path, dtype)
    before = load_file(adapter / kinds.WEIGHTS)
    save_as_pickle(base, adapter, case.auto)
    assert torch.load(adapter / "adapter_model.bin", weights_only=True).keys() == before.keys()
    expected = kinds.peft_merge(case, base, adapter, tmp_path / "peft")
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    ours = oracle.read_tensors(tmp_path / "ours")
    assert oracle.changed_names(oracle.read_tensors(base), expected)
    oracle.assert_same_checkpoint(ours, expected)
