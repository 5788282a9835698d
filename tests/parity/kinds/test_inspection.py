"""What `inspect` says of adapters, against what PEFT was told to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import kind_oracle as kinds

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

TARGETS = ["q_proj", "down_proj"]


def facts(tmp_path: Path, config: Any) -> dict[str, Any]:
    _, adapter = kinds.write_case(kinds.Case(lambda: config), tmp_path, torch.float32)
    found = rawmerge.inspect_path(adapter)
    assert (found.kind, found.problems) == ("adapter", ())
    return dict(found.facts)


def test_rank_scaling_and_targets_of_a_kind_that_has_them(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS, alpha_pattern={"q_proj": 6})
    found = facts(tmp_path, config)
    assert found["type"] == "LOHA"
    assert found["merges as"].startswith("LoHa: W + s")
    assert found["ranks"] == "3 (4)"
    assert found["scaling"] == f"{5 / 3:g} to 2"
    assert (found["modules"], found["module names"]) == (4, sorted(TARGETS))


def test_a_kind_without_rank_has_none_to_show(tmp_path: Path) -> None:
    found = facts(tmp_path, peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]))
    assert found["type"] == "IA3"
    assert not {"ranks", "scaling"} & found.keys()


def test_shared_tensors_and_extras_are_told(tmp_path: Path) -> None:
    found = facts(tmp_path, peft.VeraConfig(r=7, target_modules=TARGETS, modules_to_save=["lm_head"]))
    assert sorted(found["shared tensors"]) == ["base_model.vera_A", "base_model.vera_B"]
    assert found["stored tensors"] == ["lm_head.weight"]
    assert found["ranks"] == "7 (4)"


def test_the_variant_of_a_lora_is_named(tmp_path: Path) -> None:
    found = facts(tmp_path, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True, use_rslora=True))
    assert found["type"] == "LORA with DoRA, rsLoRA scaling"
    assert (found["ranks"], found["scaling"]) == ("4 (4)", "3")
