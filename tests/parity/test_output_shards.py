"""`--max-shard-size` beside `save_pretrained(max_shard_size=…)` of the model that PEFT merged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

INDEX = "model.safetensors.index.json"
#: The embedding is larger than the first two; the fourth holds everything.
SIZES = ["5KB", "10KB", "20KB", "1GB"]


def write_in_order(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with the tensors in the order of a dict; the library's own writer sorts them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort as transformers 5.24 sorts what it saves of a model that it loaded: by names, with numbers as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


@pytest.mark.parametrize("size", SIZES)
def test_files_and_index_are_those_of_save_pretrained(tmp_path: Path, size: str) -> None:
    source = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.bfloat16, max_shard_size="1GB")
    load = oracle.pretrained(source, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"])
    oracle.merged_model(load, adapter).save_pretrained(tmp_path / "peft", max_shard_size=size)
    tensors = load().state_dict()
    write_in_order(source / "model.safetensors", {name: tensors[name] for name in sorted(tensors, key=natural)})
    rawmerge.merge_adapter(source, adapter, tmp_path / "ours", max_shard_size=size)
    names = {
        folder: sorted(path.name for path in (tmp_path / folder).iterdir() if "safetensors" in path.name)
        for folder in ("ours", "peft")
    }
    assert names["ours"] == names["peft"]
    assert len(names["ours"]) == (1 if size == "1GB" else len(names["peft"])) > 0
    for name in names["peft"]:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "peft" / name
        if name == INDEX:
            assert ours.read_text() == theirs.read_text()
        else:
            oracle.assert_same_checkpoint(oracle.read_tensors(ours), oracle.read_tensors(theirs))


@pytest.mark.parametrize("size", ["8KB", "40KB"])
def test_a_base_of_transformers_own_order_keeps_to_the_size_and_loads(tmp_path: Path, size: str) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(), torch.bfloat16, max_shard_size="60KB")
    load = oracle.pretrained(base, tiny.CAUSAL)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=["v_proj", "lm_head"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", max_shard_size=size)
    limit = int(size.removesuffix("KB")) * 1000
    for path in (tmp_path / "ours").glob("*.safetensors"):
        sizes = [len(tensor.data) for tensor in oracle.read_tensors(path).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    loaded = oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL).state_dict()
    merged = oracle.merged_model(load, adapter).state_dict()
    assert loaded.keys() == merged.keys()
    assert [name for name in merged if not torch.equal(loaded[name], merged[name])] == []
