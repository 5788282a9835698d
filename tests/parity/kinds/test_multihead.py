"""LoRA on nn.MultiheadAttention against PEFT, and against the formula in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rawmerge
from rawmerge.errors import UnsupportedAdapterError
from tests.parity import kind_oracle as kinds
from tests.parity import peft_oracle as oracle
from tests.parity import tiny_models as tiny

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, *oracle.QUIET]

RANK, ALPHA = 3, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN, INNER = "attn", "attn.base_layer.out_proj"


class Tower(nn.Module):
    """An attention with its weights in one, as torch's own and CLIP's poolers have it, and a linear layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Linear(width, width)


def wide_tower() -> nn.Module:
    return Tower(320)


def written(folder: Path, dtype: torch.dtype, build: Any = Tower, **fields: Any) -> tuple[Path, Path, Any]:
    base = tiny.save_plain(build, folder / "base.safetensors", dtype)
    load = tiny.load_plain(build, base)
    targets = {"target_modules": ["attn", "mlp"], "r": RANK, "lora_alpha": ALPHA, **fields}
    return base, oracle.save_adapter(load, folder / "adapter", **targets), load


def peft_merge(load: Any, adapter: Path, folder: Path) -> dict[str, oracle.RawTensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = oracle.merged_model(load, adapter).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in merged.items()}, folder / "peft.safetensors")
    return oracle.read_tensors(folder / "peft.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"attn": 5}, "alpha_pattern": {"attn": 2, "out_proj": 9}},
        {"bias": "all"},
    ],
    ids=["plain", "patterns", "biases"],
)
def test_merge_is_bit_equal(tmp_path: Path, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    base, adapter, load = written(tmp_path, dtype, **fields)
    expected = peft_merge(load, adapter, tmp_path)
    changed = oracle.changed_names(oracle.read_tensors(base), expected)
    assert changed >= {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.weight"}
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_several_tiles_are_bit_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter, load = written(tmp_path, dtype, wide_tower)
    expected = peft_merge(load, adapter, tmp_path)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


def test_float64_adds_the_output_projection_s_delta_twice(tmp_path: Path) -> None:
    base, adapter, _ = written(tmp_path, torch.float32)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours", compute_dtype="float64")
    own = {name: tensor.double() for name, tensor in load_file(adapter / kinds.WEIGHTS).items()}
    before, ours = oracle.read_tensors(base), oracle.read_tensors(tmp_path / "ours")
    for name, part, times in [
        ("attn.in_proj_weight", OWN, 1),
        ("attn.out_proj.weight", INNER, 2),
        ("mlp.weight", "mlp", 1),
    ]:
        left, right = (own[f"base_model.model.{part}.lora_{half}.weight"] for half in "BA")
        delta = torch.stack([(left[:, k, None] * right[k]) for k in range(RANK)]).sum(0) * ALPHA / RANK
        expected = kinds.as_tensor(before[name]) + times * delta
        kinds.assert_close(kinds.as_tensor(ours[name]), expected.float().double(), 2**-23, name)


def test_an_output_projection_targeted_alone_counts_once(tmp_path: Path) -> None:
    base, adapter, load = written(tmp_path, torch.float32, target_modules=["out_proj"])
    assert all(".base_layer." not in name for name in load_file(adapter / kinds.WEIGHTS))
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    expected = peft_merge(load, adapter, tmp_path)
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


@pytest.mark.parametrize(
    ("dropped", "says"),
    [
        (f"{OWN}.lora_", r"base_layer\.out_proj\.lora_A.*lora_A of the attention module around it"),
        (f"{INNER}.lora_", r"attn\.lora_A"),
        (f"{OWN}.lora_A", r"attn\.lora_B\.weight.*its partner lora_a"),
        (f"{INNER}.lora_B", r"out_proj\.lora_A\.weight.*its partner lora_b"),
    ],
)
def test_half_an_attention_is_refused(tmp_path: Path, dropped: str, says: str) -> None:
    base, adapter, _ = written(tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if f"model.{dropped}" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.RefusedError, match=says):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize("part", [OWN, INNER])
def test_factors_of_another_shape_are_refused(tmp_path: Path, part: str) -> None:
    base, adapter, _ = written(tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    name = f"base_model.model.{part}.lora_B.weight"
    save_file({**tensors, name: torch.cat([tensors[name], tensors[name][:1]])}, adapter / kinds.WEIGHTS)
    with pytest.raises(rawmerge.RefusedError, match="a delta of"):
        rawmerge.plan_merge(base, adapter)


@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"kasa_config": {}}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "mica"}],
    ids=str,
)
def test_variants_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base, adapter, _ = written(tmp_path, torch.float32, target_modules=["attn"])
    kinds.edit_config(adapter, **fields)
    with pytest.raises(UnsupportedAdapterError, match=r"plain LoRA, for PEFT trains nn\.Multi"):
        rawmerge.plan_merge(base, adapter)


def test_a_bias_beside_the_pair_of_an_in_projection_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = written(tmp_path, torch.float32)
    tensors = load_file(adapter / kinds.WEIGHTS)
    save_file({**tensors, f"base_model.model.{OWN}.lora_B.bias": torch.ones(72)}, adapter / kinds.WEIGHTS)
    kinds.edit_config(adapter, lora_bias=True)
    with pytest.raises(UnsupportedAdapterError, match="no bias beside the pair of an in_proj_weight"):
        rawmerge.plan_merge(base, adapter)
