"""A verification without base and adapter raises no alarm over what transformers saves, nor over its merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity.family_models import FAMILIES, linear_modules

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
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


def edited(config: Any, key: str, change: Callable[[int], int]) -> Any:
    """Return a config, in which each whole number under a key is changed, in text models' own configs too."""
    if not isinstance(config, dict):
        return config
    made = {name: edited(value, key, change) for name, value in config.items() if name != "vision_config"}
    return made | ({key: change(config[key])} if type(config.get(key)) is int else {})


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("num_hidden_layers", lambda size: size + 3),
        ("num_hidden_layers", lambda size: size - 1),
        ("hidden_size", lambda size: size * 2),
    ],
    ids=["deeper", "flatter", "wider"],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "bert", "mamba", "llava", "gemma3", "qwen2.5-vl"])
def test_another_depth_or_width_is_found_where_transformers_would_miss_it(
    tmp_path: Path, name: str, key: str, change: Callable[[int], int]
) -> None:
    family = FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.float32, "40KB")
    config = json.loads((base / "config.json").read_text())
    for side in (config, config.get("text_config", {})):
        side.pop("layer_types", None)  # transformers makes them anew
    (base / "config.json").write_text(json.dumps({**config, **edited(config, key, change)}))
    load = getattr(transformers, family.auto).from_pretrained
    _, loaded = load(base, output_loading_info=True, ignore_mismatched_sizes=True)
    assert loaded["missing_keys"] or loaded["mismatched_keys"] or loaded["unexpected_keys"]
    (finding,) = rawmerge.verify_merge(base).findings
    assert f"by {key} in config.json" in finding.expected
