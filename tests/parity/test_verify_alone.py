"""A verification without base and adapter raises no alarm over what transformers saves, nor over its merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity.family_models import FAMILIES, linear_modules

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

NOTE = "base and adapter were not given: values were not looked at"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_raises_an_alarm(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.float32, "40KB")
    made = rawmerge.verify_merge(base)
    assert (made.findings, made.notes) == ((), (NOTE,))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "bloom", "t5", "llava", "gemma3", "whisper", "mamba"])
def test_no_merge_raises_an_alarm(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.float32, "40KB")
    model = oracle.load_pretrained(base, family.auto)
    targets = linear_modules(model, family.unfit)
    adapter = oracle.save_adapter(lambda: model, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=targets)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", dtype="bfloat16", checksum=True)
    made = rawmerge.verify_merge(tmp_path / "out")
    assert (made.findings, len(made.notes)) == ((), 1)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gemma3"])
def test_a_tie_that_a_merge_undoes_leaves_a_config_that_agrees(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.float32, "40KB")
    load = oracle.pretrained(base, family.auto)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["lm_head"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    made = rawmerge.verify_merge(tmp_path / "out")
    assert (made.findings, made.notes) == ((), (NOTE,))
    assert rawmerge.inspect_path(tmp_path / "out").facts["tensors"] == made.tensor_count
