"""The merged checkpoint equals PEFT's, byte for byte, over the model families; adapters on all their linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rawmerge
from tests.parity import peft_oracle as oracle
from tests.parity.family_models import FAMILIES, VLM, Family, linear_modules

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, *oracle.QUIET]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Disk holds one tensor where memory has several, so many fewer; such a merge may be refused, but must not be wrong.
SPLIT_ON_LOADING = {"dinov2-swiglu": 1, "lara-mini": 3, "sarvam-moe": 2}
SHARD_SIZE = "40KB"


class Trained(NamedTuple):
    """A family's base in float32, and an adapter on all of its linear layers."""

    name: str
    family: Family
    base: Path
    adapter: Path
    module_count: int


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    name: str = request.param
    family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
    base = oracle.save_base(folder / "float32", family.auto, family.config(), torch.float32, SHARD_SIZE)
    model = oracle.load_pretrained(base, family.auto)
    targets = linear_modules(model, family.unfit)
    adapter = oracle.save_adapter(lambda: model, folder / "adapter", r=6, lora_alpha=9, target_modules=targets)
    return Trained(name, family, base, adapter, len(targets))


def base_in(trained: Trained, dtype: str) -> Path:
    """Return the base in another dtype; the adapter stays in float32."""
    folder = trained.base.with_name(dtype)
    if not folder.exists():
        model = oracle.load_pretrained(trained.base, trained.family.auto, DTYPES[dtype])
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)  # type: ignore[operator]  # a transformers model
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_layer_of_every_tower(trained: Trained, tmp_path: Path, dtype: str) -> None:
    base = base_in(trained, dtype)
    load = oracle.pretrained(base, trained.family.auto)
    expected = oracle.merge_with_peft(load, trained.adapter, tmp_path / "peft")
    before = oracle.read_tensors(base)
    changed = oracle.changed_names(before, expected)
    fewer = SPLIT_ON_LOADING.get(trained.name, 0)
    assert before.keys() == expected.keys()
    assert len(changed) == trained.module_count - fewer
    try:
        rawmerge.merge_adapter(base, trained.adapter, tmp_path / "ours")
    except rawmerge.RefusedError:
        if not fewer:
            raise
        assert not (tmp_path / "ours").exists()
        return
    ours = oracle.read_tensors(tmp_path / "ours")
    oracle.assert_same_checkpoint(ours, expected)
    oracle.assert_kept_bytes(before, ours, before.keys() - changed)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", "all-linear"),
        ("llava", "all-linear"),
        ("llava", r".*language_model.*\.(q|v)_proj"),
        ("qwen2-vl", r".*visual.*\.(qkv|proj)"),
        ("lara-mini", r".*(linear_attn\.out|self_attn\.\w+)_proj"),
        ("sarvam-moe", r".*\.(o|down)_proj"),
    ],
)
def test_modules_chosen_by_one_pattern(tmp_path: Path, name: str, targets: str) -> None:
    family = FAMILIES[name]
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.bfloat16, SHARD_SIZE)
    load = oracle.pretrained(base, family.auto)
    adapter = oracle.save_adapter(load, tmp_path / "adapter", r=6, lora_alpha=9, target_modules=targets)
    expected = oracle.merge_with_peft(load, adapter, tmp_path / "peft")
    assert oracle.changed_names(oracle.read_tensors(base), expected)
    rawmerge.merge_adapter(base, adapter, tmp_path / "ours")
    oracle.assert_same_checkpoint(oracle.read_tensors(tmp_path / "ours"), expected)


def test_most_bases_have_several_shards(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    assert family.auto == VLM
    base = oracle.save_base(tmp_path / "base", family.auto, family.config(), torch.bfloat16, SHARD_SIZE)
    assert len(list(base.glob("*.safetensors"))) >= 3
