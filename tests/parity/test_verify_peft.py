"""What PEFT merged and saved is verified: equal where PEFT merged rightly, told where it was merged otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (tiny.llama, {"target_modules": [*ATTENTION, "down_proj", "embed_tokens"]}),
    "dora": (tiny.llama, {"target_modules": ATTENTION, "use_dora": True}),
    "saved": (tiny.llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
}
PAIRS: dict[str, Any] = {"r": 4, "lora_alpha": 6}


def make(tmp_path: Path, case: str, dtype: torch.dtype) -> tuple[Path, Path, oracle.Loader]:
    config, fields = CASES[case]
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, config(), dtype)
    load = oracle.pretrained(base, tiny.CAUSAL)
    return base, oracle.save_adapter(load, tmp_path / "adapter", **PAIRS, **fields), load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_pefts_merge_is_equal_bit_for_bit(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    base, adapter, load = make(tmp_path, case, dtype)
    oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    made = rawmerge.verify_merge(tmp_path / "peft", base, adapter)
    assert (made.findings, made.differences) == ((), ())
    assert made.tensor_count == len(oracle.read_tensors(base))


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_pefts_scaled_merge_is_told(tmp_path: Path, weight: float) -> None:
    base, adapter, load = make(tmp_path, "lora", torch.bfloat16)
    model = peft.PeftModel.from_pretrained(load(), adapter)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", weight)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    (finding,) = rawmerge.verify_merge(tmp_path / "peft", base, adapter).findings
    assert f"and {weight:.2g}" in finding.found[:16] or f"{weight:.1f}" in finding.hint


def test_an_adapter_that_peft_rounded_to_bfloat16_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    base, adapter, load = make(tmp_path, "lora", torch.bfloat16)
    model = peft.PeftModel.from_pretrained(load(), adapter, autocast_adapter_dtype=False).bfloat16()
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    findings = rawmerge.verify_merge(tmp_path / "peft", base, adapter).findings
    assert findings
    assert all("less precise" in finding.hint for finding in findings), findings
