"""`--format bin` beside what transformers loads, and beside the files that PEFT's merged model is saved in by torch."""

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

INDEX = "pytorch_model.bin.index.json"
CASES: list[tuple[Any, dict[str, Any]]] = [
    (tiny.llama(), {"target_modules": ["q_proj", "down_proj"]}),
    (tiny.llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "k_proj"]}),
    (tiny.gpt2(), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
]


def saved(model: Any, folder: Path, size: str) -> dict[str, torch.Tensor]:
    """Save a model as transformers 4 did without safetensors, and return its tensors."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors: dict[str, torch.Tensor] = model.state_dict()
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=size
    )
    folder.mkdir()
    for name, keys in split.filename_to_tensors.items():
        torch.save({key: tensors[key] for key in keys}, folder / name)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return tensors


def read_bins(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.bin"))}


@pytest.mark.parametrize("size", ["10KB", "1GB"])
@pytest.mark.parametrize(("config", "lora"), CASES, ids=["llama", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tensors_are_pefts_and_transformers_loads_them_as_those_of_safetensors(
    tmp_path: Path, config: Any, lora: dict[str, Any], size: str, dtype: torch.dtype
) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, config, dtype, max_shard_size="1GB")
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, **lora)
    for name in ("bin", "safetensors"):
        rawmerge.merge_adapter(base, adapter, tmp_path / name, format=name, max_shard_size=size)
    expected = saved(oracle.merged_model(load, adapter), tmp_path / "peft", size)
    ours = {key: value for table in read_bins(tmp_path / "bin").values() for key, value in table.items()}
    dropped = expected.keys() - ours.keys()  # of tied tensors the base holds one
    assert ours.keys() <= expected.keys()
    assert dropped == ({"lm_head.weight"} if "lm_head.weight" not in oracle.read_tensors(base) else set())
    assert [name for name, value in ours.items() if not torch.equal(value, expected[name])] == []
    assert all(value.dtype == dtype for value in ours.values())
    inputs = torch.arange(12)[None]
    logits = [oracle.load_pretrained(tmp_path / name, tiny.CAUSAL)(inputs).logits for name in ("bin", "safetensors")]
    assert torch.equal(*logits)
    assert (tmp_path / "bin" / INDEX).exists() == (size == "10KB")


def test_files_and_index_are_those_of_transformers_4(tmp_path: Path) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.bfloat16, max_shard_size="1GB")
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["q_proj"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", format="bin", max_shard_size="10KB")
    model = oracle.merged_model(load, adapter)
    order = [step.entry.name for step in rawmerge.plan_merge(base, adapter).steps()]
    tensors = model.state_dict()
    model.state_dict = lambda: {name: tensors[name] for name in order}
    saved(model, tmp_path / "theirs", "10KB")
    ours, theirs = read_bins(tmp_path / "ours"), read_bins(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 1
    for name, table in theirs.items():
        assert ours[name].keys() == table.keys()
        assert all(torch.equal(ours[name][key], value) for key, value in table.items())
    assert (tmp_path / "ours" / INDEX).read_text() == (tmp_path / "theirs" / INDEX).read_text()
