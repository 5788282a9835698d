"""Bases of `torch.save` beside PEFT's merge of what transformers loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

CASES: list[tuple[Any, dict[str, Any]]] = [
    (tiny.llama(), {"target_modules": ["q_proj", "down_proj"]}),
    (tiny.llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "k_proj"]}),
    (tiny.gpt2(), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


def pickled(source: Path, folder: Path, shard_count: int) -> Path:
    """Write a checkpoint as `save_pretrained(safe_serialization=False)` did: tied tensors under both names."""
    model = oracle.load_pretrained(source, tiny.CAUSAL)
    items = list(model.state_dict().items())
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    if shard_count == 1:
        torch.save(dict(items), folder / "pytorch_model.bin")
        return folder
    places: dict[str, str] = {}
    for at in range(shard_count):
        name = f"pytorch_model-{at + 1:05d}-of-{shard_count:05d}.bin"
        part = {key: value.clone() for key, value in items[at::shard_count]}
        torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shard_count", [1, 3])
@pytest.mark.parametrize(("config", "lora"), CASES, ids=["llama", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_merge_is_pefts(
    tmp_path: Path, config: Any, lora: dict[str, Any], shard_count: int, dtype: torch.dtype
) -> None:
    source = oracle.save_base(tmp_path / "source", tiny.CAUSAL, config, dtype, max_shard_size="1GB")
    base = pickled(source, tmp_path / "base", shard_count)
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    merged = oracle.merged_model(load, adapter).state_dict()
    loaded = oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL).state_dict()
    assert loaded.keys() == merged.keys()
    assert [name for name in merged if not torch.equal(loaded[name], merged[name])] == []
    kept = [path.name for path in (tmp_path / "ours").iterdir() if path.suffix == ".bin"]
    assert kept == []
