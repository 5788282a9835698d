"""LoRA's variants on single experts that lie in fused tensors, and on bare parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge.errors import RefusedError
from tests.builders import ALPHA, PREFIX, RANK, lora_pair, random_tensor, read_all, write_adapter, write_base

EXPERTS, INNER, OUTER = 3, 6, 8
MODULE = "model.layers.0.mlp.experts"
FUSED = f"{MODULE}.gate_up_proj"
QWEN = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
LLAMA4 = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
PATH = f"{MODULE}.1.up_proj"
SETUP = tuple[Path, Path]


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], **fields: Any) -> SETUP:
    shape = (2 * INNER, OUTER) if config is QWEN else (OUTER, 2 * INNER)
    fused = {FUSED: random_tensor((EXPERTS, *shape), torch.float32)}
    return write_base(folder / "base", [fused], config), write_adapter(folder / "adapter", tensors, **fields)


def with_magnitude() -> dict[str, torch.Tensor]:
    magnitude = random_tensor((INNER,), torch.float32, 7).abs() + 1
    return {**lora_pair(PATH, INNER, OUTER), f"{PREFIX}{PATH}.lora_magnitude_vector": magnitude}


def test_dora_scales_the_rows_of_one_expert_s_half(tmp_path: Path) -> None:
    tensors = with_magnitude()
    base, adapter = write(tmp_path, QWEN, tensors, use_dora=True)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    before, after = (read_all(folder)[FUSED].double() for folder in (base, tmp_path / "out"))
    own = {name.removeprefix(f"{PREFIX}{PATH}."): tensor.double() for name, tensor in tensors.items()}
    sums = before[1, INNER:] + ALPHA / RANK * own["lora_B.weight"] @ own["lora_A.weight"]
    norms = torch.stack([row.square().sum().sqrt() for row in sums])
    expected = before.clone()
    expected[1, INNER:] = (own["lora_magnitude_vector"] / norms)[:, None] * sums
    # values below 4 in float32: a few units in the last place
    torch.testing.assert_close(after, expected, atol=4e-6, rtol=0)
    assert not torch.equal(before[1, INNER:], after[1, INNER:])


def test_dora_over_columns_of_a_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="one whole base tensor"):
        rawmerge.plan_merge(*write(tmp_path, LLAMA4, with_magnitude(), use_dora=True))


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"kasa_config": {}}], ids=str)
def test_decompositions_of_a_part_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    diagonal = {f"{PREFIX}{PATH}.lora_diag": torch.ones(RANK)} if "kasa_config" in fields else {}
    tensors = {**lora_pair(PATH, INNER, OUTER), **diagonal}
    with pytest.raises(RefusedError, match="one whole base tensor"):
        rawmerge.plan_merge(*write(tmp_path, QWEN, tensors, **fields))


def stacked_pair() -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{MODULE}.lora_A.weight": random_tensor((EXPERTS * RANK, OUTER), torch.float32),
        f"{PREFIX}{MODULE}.lora_B.weight": random_tensor((2 * INNER, RANK * EXPERTS), torch.float32, 1),
    }


@pytest.mark.parametrize(
    ("extra", "fields", "says"),
    [
        ({}, {"use_dora": True}, "a variant by use_dora"),
        ({}, {"init_lora_weights": "olora"}, "a variant by init_lora_weights"),
        ({f"{PREFIX}{MODULE}.lora_magnitude_vector": torch.ones(2 * INNER)}, {}, "lora_magnitude_vector.*beside"),
    ],
)
def test_variants_on_bare_parameters_are_refused(
    tmp_path: Path, extra: dict[str, torch.Tensor], fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(RefusedError, match=says):
        rawmerge.plan_merge(*write(tmp_path, QWEN, {**stacked_pair(), **extra}, **fields))
