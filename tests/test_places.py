"""Places that are not one whole tensor: chunks of a fused tensor, tensors that are split on disk; replicated layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from rawmerge.matching.places import Piece, Place, whole
from tests.builders import ALPHA, PREFIX, RANK, lora_pair, random_tensor, raw, read_all, write_adapter, write_base

SCALING = ALPHA / RANK
Tensors = dict[str, torch.Tensor]


def write(folder: Path, base: Tensors, config: Any, tensors: Tensors, **fields: Any) -> tuple[Path, Path]:
    return write_base(folder / "base", [base], config), write_adapter(folder / "adapter", tensors, **fields)


def merge(folder: Path, base: Tensors, config: Any, tensors: Tensors, **fields: Any) -> Tensors:
    rawmerge.merge_adapter(*write(folder, base, config, tensors, **fields), folder / "out")
    return read_all(folder / "out")


def refuse(folder: Path, says: str, paths: tuple[Path, Path]) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.merge_adapter(*paths, folder / "out")
    assert not (folder / "out").exists()


def delta(pair: Tensors) -> torch.Tensor:
    lora_a, lora_b = (tensor.double() for _, tensor in sorted(pair.items()))
    return SCALING * lora_b @ lora_a


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # values below 1 in float32: a few units in the last place
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_a_place_is_called_by_its_first_tensor() -> None:
    place = Place((5, 2), (Piece("a", 0, 3), Piece("b", 0, 2, at=3)))
    assert (place.name, place.tensors, place.is_whole) == ("a", ("a", "b"), False)


def test_a_number_is_a_place_of_one_row() -> None:
    assert whole("scale", ()).pieces == (Piece("scale", 0, 1),)


HRM = {"model_type": "hrm_text"}
FUSED, GATE, UP = (f"model.layers.0.mlp.{leaf}" for leaf in ("gate_up_proj", "gate_proj", "up_proj"))


@pytest.mark.parametrize("modules", [[GATE], [UP], [GATE, UP]])
def test_pairs_on_the_chunks_of_a_fused_tensor(tmp_path: Path, modules: list[str]) -> None:
    base = random_tensor((24, 8), torch.float32)
    pairs = {module: lora_pair(module, 12, 8, seed=place) for place, module in enumerate(modules)}
    tensors = {name: tensor for pair in pairs.values() for name, tensor in pair.items()}
    found = merge(tmp_path, {f"{FUSED}.weight": base}, HRM, tensors)[f"{FUSED}.weight"]
    for module, rows in ((GATE, slice(0, 12)), (UP, slice(12, 24))):
        added = delta(pairs[module]) if module in pairs else torch.zeros(12, 8).double()
        close(found[rows], base[rows].double() + added)
        if module not in pairs:
            assert raw(found[rows]) == raw(base[rows])


def test_a_fused_tensor_that_is_no_multiple_of_its_parts_has_no_chunks(tmp_path: Path) -> None:
    base = {f"{FUSED}.weight": random_tensor((25, 8), torch.float32)}
    says = rf"a base tensor '{GATE}\.weight' for this pair, found none"
    refuse(tmp_path, says, write(tmp_path, base, HRM, lora_pair(GATE, 12, 8)))


MINIMAX = {"model_type": "minimax_m3_vl"}
DENSE = "model.layers.0.mlp"


def test_a_pair_on_a_tensor_that_is_split_on_disk(tmp_path: Path) -> None:
    base = {f"{DENSE}.{leaf}.weight": random_tensor((12, 8), torch.float32, seed) for seed, leaf in enumerate(LEAVES)}
    pair = lora_pair(f"{DENSE}.gate_up_proj", 24, 8)
    found = merge(tmp_path, base, MINIMAX, pair)
    for leaf, added in zip(LEAVES, delta(pair).chunk(2), strict=True):
        name = f"{DENSE}.{leaf}.weight"
        close(found[name], base[name].double() + added)


LEAVES = ("gate_proj", "up_proj")


@pytest.mark.parametrize("shapes", [{"gate_proj": (12, 8)}, {"gate_proj": (12, 8), "up_proj": (12, 9)}])
def test_a_tensor_of_which_the_disk_lacks_a_part_is_refused(tmp_path: Path, shapes: dict[str, Any]) -> None:
    base = {f"{DENSE}.{leaf}.weight": random_tensor(shape, torch.float32) for leaf, shape in shapes.items()}
    pair = lora_pair(f"{DENSE}.gate_up_proj", 24, 8)
    refuse(
        tmp_path,
        r"gate_(up_)?proj(.|\n)*is this the base|gate_up_proj.*found none",
        write(tmp_path, base, MINIMAX, pair),
    )


def test_the_bias_of_a_chunk_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qianfan_ocr"}
    layer = "vision_model.encoder.layers.0"
    base = {
        f"{layer}.attn.qkv.weight": random_tensor((24, 8), torch.float32),
        f"{layer}.attn.qkv.bias": random_tensor((24,), torch.float32),
    }
    module = f"{layer}.attention.q_proj"
    tensors = lora_pair(module, 8, 8) | {f"{PREFIX}{module}.lora_B.bias": torch.ones(8)}
    refuse(
        tmp_path,
        r"q_proj\.bias' that this bias is added to, found none",
        write(tmp_path, base, config, tensors, lora_bias=True),
    )


def layers(count: int = 2, stack: str = "model.layers") -> Tensors:
    return {f"{stack}.{layer}.q_proj.weight": random_tensor((12, 8), torch.float32, layer) for layer in range(count)}


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def test_each_copy_of_a_layer_gets_its_own_delta(tmp_path: Path) -> None:
    pair = lora_pair("model.layers.2.q_proj", 12, 8)
    base = layers() | {"model.norm.weight": torch.ones(8)}
    found = merge(tmp_path, base, LLAMA, pair, layer_replication=[[0, 2], [0, 2]])
    old = [base[f"model.layers.{layer}.q_proj.weight"] for layer in (0, 1, 0, 1)]
    new = [found[f"model.layers.{layer}.q_proj.weight"] for layer in range(4)]
    assert [raw(new[layer]) == raw(old[layer]) for layer in range(4)] == [True, True, False, True]
    close(new[2], old[2].double() + delta(pair))
    assert raw(found["model.norm.weight"]) == raw(torch.ones(8))
    assert len(found) == 5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_more_copies_than_any_model_has_are_refused(tmp_path: Path) -> None:
    pair = lora_pair("model.layers.0.q_proj", 12, 8)
    many = write(tmp_path / "many", layers(), LLAMA, pair, layer_replication=[[0, 2]] * 101)
    refuse(tmp_path, "expected at most 200 layers, 100 times the base's 2, found 202", many)
    most = write(tmp_path / "most", layers(), LLAMA, pair, layer_replication=[[0, 2]] * 100)
    assert len(rawmerge.plan_merge(*most).shards[0].steps) == 200


BAD_STACKS: dict[str, tuple[Tensors, str]] = {
    "too few layers": (layers(1), r"a base of at least 2 layers, found 1 layers under 'model\.layers'"),
    "two stacks": (layers() | layers(stack="vision.layers"), r"found model\.layers, vision\.layers(.|\n)*one stack"),
    "a hole": ({"model.layers.1.q_proj.weight": torch.ones(12, 8)}, "one complete stack of layers in the base"),
    "none": ({"q_proj.weight": torch.ones(12, 8)}, "one complete stack of layers in the base, found none"),
}


@pytest.mark.parametrize("name", BAD_STACKS)
def test_layers_that_cannot_be_replicated_are_refused(tmp_path: Path, name: str) -> None:
    base, says = BAD_STACKS[name]
    pair = lora_pair("model.layers.0.q_proj", 12, 8)
    refuse(tmp_path, says, write(tmp_path, base, LLAMA, pair, layer_replication=[[0, 2], [0, 2]]))
