"""A base that is not the one: another name, unlike embeddings, the adapter in it already. Refused, unless forced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.errors import RefusedError
from tests.builders import PREFIX, lora_pair, merged, random_tensor, read_all, write_adapter, write_base

Paths = tuple[Path, Path]


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_another_hub_name_is_refused_unless_forced(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    edit(base / "config.json", _name_or_path="org/llama-7b-base")
    edit(adapter / "adapter_config.json", base_model_name_or_path="org/llama-7b-chat")
    code, told = run("merge", base, adapter, "-o", tmp_path / "out")
    assert code == 3
    assert "'org/llama-7b-chat'" in told
    assert "'org/llama-7b-base'" in told
    assert "--force" in told
    assert not (tmp_path / "out").exists()
    code, told = run("merge", base, adapter, "-o", tmp_path / "out", "--force")
    assert code == 0
    assert "merged by force" in told


def test_a_folder_of_another_name_is_noted_only(tiny: Paths, tmp_path: Path) -> None:
    edit(tiny[1] / "adapter_config.json", base_model_name_or_path="org/llama-7b")
    code, told = run("merge", *tiny, "-o", tmp_path / "out")
    assert code == 0
    assert "trained on 'org/llama-7b'" in told


def test_an_adapter_is_merged_once(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    rawmerge.merge_adapter(base, adapter, tmp_path / "once")
    with pytest.raises(RefusedError, match="a base without this adapter"):
        rawmerge.merge_adapter(tmp_path / "once", adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    rawmerge.merge_adapter(tmp_path / "once", adapter, tmp_path / "twice", force=True)
    before, factors, after = read_all(base), read_all(adapter), read_all(tmp_path / "twice")
    for name in ("model.layers.0.q_proj", "model.layers.1.q_proj"):
        pair = [factors[f"{PREFIX}{name}.{part}.weight"] for part in ("lora_A", "lora_B")]
        once = merged(before[f"{name}.weight"], pair[0], pair[1], 6 / 4)
        assert torch.equal(after[f"{name}.weight"], merged(once, pair[0], pair[1], 6 / 4))


def test_an_adapter_merged_two_steps_ago_is_known(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    other = write_adapter(tmp_path / "other", lora_pair("model.layers.0.q_proj", 12, 8, seed=7))
    rawmerge.merge_adapter(base, adapter, tmp_path / "first")
    rawmerge.merge_adapter(tmp_path / "first", other, tmp_path / "second")
    with pytest.raises(RefusedError, match="a base without this adapter"):
        rawmerge.plan_merge(tmp_path / "second", adapter)
    with pytest.raises(RefusedError, match="a base without this adapter"):
        rawmerge.plan_merge(tmp_path / "second", other)


def stored_embedding(folder: Path, weight: torch.Tensor) -> Path:
    tensors = {
        f"{PREFIX}model.embed_tokens.base_layer.weight": weight,
        f"{PREFIX}model.embed_tokens.lora_embedding_A": random_tensor((4, 20), torch.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": random_tensor((8, 4), torch.float32),
    }
    return write_adapter(folder / "embedding", tensors)


def test_stored_embedding_rows_unlike_the_base_s_are_refused_unless_forced(tiny: Paths, tmp_path: Path) -> None:
    base = write_base(tmp_path / "untied", [{**read_all(tiny[0]), "lm_head.weight": random_tensor((20, 8), seed=3)}])
    adapter = stored_embedding(tmp_path, random_tensor((20, 8), seed=99))
    with pytest.raises(RefusedError, match="0% of 64 sampled rows equal"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rawmerge.merge_adapter(base, adapter, tmp_path / "out", force=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_embedding_rows_like_the_base_s_are_taken(tiny: Paths, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = stored_embedding(tmp_path, read_all(tiny[0])["model.embed_tokens.weight"].to(dtype))
    uses = rawmerge.plan_merge(tiny[0], adapter).adapter_uses
    assert sorted(use.use for use in uses) == ["replaces", "updates", "updates"]
