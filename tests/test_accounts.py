"""Every adapter tensor is told of: in the plan, in its table, in the merge record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rawmerge
from rawmerge.report import account_lines, plan_text
from tests.builders import PREFIX, lora_pair, random_tensor, read_all, write_adapter, write_base

Q = "model.layers.{}.q_proj"


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter with one tensor of each fate."""
    layers = {f"{Q.format(layer)}.weight": random_tensor((12, 8), seed=layer) for layer in range(2)}
    rest = {"model.embed_tokens.weight": random_tensor((20, 8)), "lm_head.weight": random_tensor((20, 8), seed=1)}
    base = write_base(tmp_path / "base", [{**layers, **rest}, {"model.norm.weight": random_tensor((8,))}])
    pairs = {key: value for layer in range(2) for key, value in lora_pair(Q.format(layer), 12, 8, seed=layer).items()}
    stored = {
        f"{PREFIX}model.norm.weight": torch.ones(8),
        f"{PREFIX}score.weight": torch.ones(3, 8),
        f"{PREFIX}lm_head.weight": random_tensor((20, 8), seed=1),
        f"{PREFIX}lm_head.original_module.weight": random_tensor((20, 8), seed=1),
    }
    return base, write_adapter(tmp_path / "adapter", {**pairs, **stored}, modules_to_save=["norm", "score", "lm_head"])


def test_a_plan_accounts_for_every_tensor(paths: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*paths)
    assert sorted(use.name for use in plan.adapter_uses) == sorted(read_all(paths[1]))
    fates = {use.name.removeprefix(PREFIX): (use.use, use.tensor_name) for use in plan.adapter_uses}
    assert fates["score.weight"] == ("adds", "score.weight")
    assert fates["model.norm.weight"] == ("replaces", "model.norm.weight")
    assert fates["lm_head.original_module.weight"][0] == "ignored"
    assert fates["model.layers.1.q_proj.lora_A.weight"] == ("updates", "model.layers.1.q_proj.weight")


def test_the_table_folds_layers_and_names_reasons(paths: tuple[Path, Path]) -> None:
    plan = rawmerge.plan_merge(*paths)
    lines = account_lines(plan.adapter_uses)
    assert f"updates   {PREFIX}model.layers.*.q_proj.lora_A.weight (x 2) -> model.layers.*.q_proj.weight" in lines
    assert any(line.startswith("ignored") and line.endswith("the untrained copy of a saved module") for line in lines)
    assert "8 tensors: " in plan_text(plan)
    assert all(line in plan_text(plan) for line in lines)


def test_the_record_repeats_the_account(paths: tuple[Path, Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    record = json.loads((tmp_path / "out/rawmerge.json").read_text())
    assert sorted(row["name"] for row in record["adapter_tensors"]) == sorted(read_all(paths[1]))
    assert {row["use"] for row in record["adapter_tensors"]} == {"updates", "replaces", "adds", "ignored"}
    assert record["tensors"] == {"kept": 1, "updated": 2, "cast": 0, "replaced": 2, "added": 1}


def test_what_is_added_and_replaced_is_the_adapter_s_in_the_base_s_dtype(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    rawmerge.merge_adapter(*paths, tmp_path / "out")
    before, after = read_all(paths[0]), read_all(tmp_path / "out")
    assert after.keys() - before.keys() == {"score.weight"}
    assert after["score.weight"].dtype == torch.bfloat16
    assert torch.equal(after["score.weight"], torch.ones(3, 8, dtype=torch.bfloat16))
    assert torch.equal(after["model.norm.weight"], torch.ones(8, dtype=torch.bfloat16))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
