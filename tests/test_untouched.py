"""A note tells which modules `target_modules` names and the adapter leaves out; never one that PEFT would not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rawmerge
from tests.builders import lora_pair, random_tensor, write_adapter, write_base

LAYER = "model.layers.{}.self_attn.{}_proj"
NOTE = "target_modules also fits"


def notes(tmp_path: Path, **fields: Any) -> str:
    weights = {
        f"{LAYER.format(layer, part)}.weight": random_tensor((12, 8), seed=layer) for layer in range(4) for part in "qk"
    }
    base = write_base(tmp_path / "base", [weights])
    pairs = {**lora_pair(LAYER.format(1, "q"), 12, 8), **lora_pair(LAYER.format(2, "q"), 12, 8)}
    adapter = write_adapter(tmp_path / "adapter", pairs, **fields)
    return "\n".join(note for note in rawmerge.plan_merge(base, adapter).notes if NOTE in note)


def test_targets_without_tensors_are_told(tmp_path: Path) -> None:
    told = notes(tmp_path, target_modules=["q_proj", "k_proj"])
    assert "'model.layers.*.self_attn.k_proj' (x 4)" in told
    assert "'model.layers.*.self_attn.q_proj' (x 2)" in told


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.0.self_attn.q_proj", "layers.3.self_attn.q_proj"]},
        {"exclude_modules": r".*\.[03]\..*"},
    ],
)
def test_what_peft_would_not_train_is_not_missed(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert not notes(tmp_path, target_modules=["q_proj"], **fields)


def test_a_layer_that_should_have_been_trained_is_told(tmp_path: Path) -> None:
    told = notes(tmp_path, target_modules=["q_proj"], layers_to_transform=[1, 2, 3])
    assert told.endswith(": 'model.layers.*.self_attn.q_proj'")
