"""`layer_replication`: every copy of a layer with its own delta. PEFT's merge piles them up; its forward does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from tests import builders
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

pytest.importorskip("peft")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

REPLICATION = [[0, 2], [1, 3], [0, 1]]
ORDER = [0, 1, 1, 2, 0]
TOKENS = torch.tensor([[1, 5, 9, 30, 2, 77]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS).logits
    assert isinstance(found, torch.Tensor)
    return found


def train(base: Path, folder: Path, **lora: Any) -> Path:
    # PEFT changes the config that it is given, so the file is written before the model is thrown away
    load = oracle.pretrained(base, tiny.CAUSAL)
    return oracle.save_adapter(load, folder, r=3, lora_alpha=7, layer_replication=REPLICATION, **lora)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.llama(num_hidden_layers=3)
    return oracle.save_base(tmp_path_factory.mktemp("replication") / "base", tiny.CAUSAL, config, torch.float32)


def test_the_output_computes_what_was_trained(base: Path, tmp_path: Path) -> None:
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    truth = logits(oracle.unmerged_model(oracle.pretrained(base, tiny.CAUSAL), adapter))
    ours = oracle.load_pretrained(tmp_path / "ours", tiny.CAUSAL)
    torch.testing.assert_close(logits(ours), truth, atol=1e-5, rtol=1e-5)
    wrong = oracle.merged_model(oracle.pretrained(base, tiny.CAUSAL), adapter)
    assert not torch.allclose(logits(wrong), truth, atol=1e-3), "PEFT merges this right now: compare with it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_copy_has_its_own_delta_and_the_rest_of_the_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    base = oracle.save_base(tmp_path / "base", tiny.CAUSAL, tiny.llama(num_hidden_layers=3), dtype)
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    before, factors, ours = (builders.read_all(path) for path in (base, adapter, tmp_path / "ours"))
    layers = {name for name in before if ".layers." in name}
    assert len(ours) == len(before) - len(layers) + len(layers) // 3 * len(ORDER)
    for new, old in enumerate(ORDER):
        for name in (name for name in layers if f".layers.{old}." in name):
            copy = name.replace(f".layers.{old}.", f".layers.{new}.")
            stem = f"{builders.PREFIX}{copy.removesuffix('.weight')}"
            expected = before[name]
            if f"{stem}.lora_A.weight" in factors:
                pair = (factors[f"{stem}.lora_A.weight"], factors[f"{stem}.lora_B.weight"])
                expected = builders.merged(expected, *pair, 7 / 3)
            assert builders.raw(ours[copy]) == builders.raw(expected), copy


def test_index_and_config_follow(base: Path, tmp_path: Path) -> None:
    rawmerge.merge_adapter(base, train(base, tmp_path / "adapter", target_modules=["q_proj"]), tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["num_hidden_layers"] == len(ORDER)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    ours = builders.read_all(tmp_path / "ours")
    assert index["weight_map"].keys() == ours.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())


@pytest.mark.parametrize(
    ("replication", "says"),
    [
        ([[0, 4]], "at least 4 layers"),
        ([[0, 9]], "at least 9 layers"),
    ],
)
def test_layers_that_the_base_lacks_are_refused(base: Path, tmp_path: Path, replication: Any, says: str) -> None:
    adapter = train(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": replication}))
    with pytest.raises(rawmerge.RefusedError, match=says):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_two_stacks_of_layers_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{part}.layers.{layer}.q.weight": torch.ones(4, 4) for part in ("encoder", "decoder") for layer in (0, 1)
    }
    base = builders.write_base(tmp_path / "base", [tensors])
    adapter = builders.write_adapter(
        tmp_path / "adapter", builders.lora_pair("decoder.layers.2.q", 4, 4), layer_replication=[[0, 2], [0, 1]]
    )
    with pytest.raises(rawmerge.RefusedError, match=r"one complete stack of layers.*decoder\.layers, encoder\.layers"):
        rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
