"""Peak memory of a whole merge, as the operating system counts it: it does not follow the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rawmerge
from rawmerge.memory import forecast_memory
from tests.builders import PREFIX, write_adapter, write_base

pytestmark = pytest.mark.slow
MEBIBYTE = 2**20


def peak_bytes(*arguments: str) -> int:
    """Run Python and return its peak resident memory.

    A small process starts it, because Linux counts a child's peak from its parent's memory on.
    """
    measure = "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL); "
    measure += "_, status, usage = os.wait4(p.pid, 0); print(status, usage.ru_maxrss)"
    command = [sys.executable, "-c", measure, sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    status, kibibytes = done.stdout.split()[-2:]
    assert status == "0", done.stderr
    return int(kibibytes) * 1024


def merge_peak(folder: Path, layers: int, shard_count: int, rows: int = 2048, columns: int = 3072) -> int:
    weight = (torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) % 997 / 997).bfloat16()
    names = [f"layers.{layer}.q.weight" for layer in range(layers)]
    shards = [{name: weight.clone() for name in names[number::shard_count]} for number in range(shard_count)]
    base = write_base(folder / "base", shards)
    pairs = {}
    for name in names:
        path = PREFIX + name.removesuffix(".weight")
        pairs[f"{path}.lora_A.weight"] = torch.full((4, columns), 0.25)
        pairs[f"{path}.lora_B.weight"] = torch.full((rows, 4), 0.5)
    adapter = write_adapter(folder / "adapter", pairs)
    arguments = ["merge", str(base), str(adapter), "--output", str(folder / "out"), "--threads", "2"]
    return peak_bytes("-m", "rawmerge", *arguments)


def test_the_peak_is_torch_and_a_few_tiles(tmp_path: Path) -> None:
    imported = peak_bytes("-c", "import torch")
    assert merge_peak(tmp_path, layers=30, shard_count=2) < imported + 64 * MEBIBYTE


@pytest.mark.parametrize(("layers", "shard_count"), [(60, 2), (30, 1), (30, 15)])
def test_the_peak_follows_neither_size_nor_shards(tmp_path: Path, layers: int, shard_count: int) -> None:
    small = merge_peak(tmp_path / "small", layers=30, shard_count=2)
    other = merge_peak(tmp_path / "other", layers=layers, shard_count=shard_count)
    assert abs(other - small) < 0.05 * small


def test_one_tensor_larger_than_the_tile_budget_is_tiled(tmp_path: Path) -> None:
    imported = peak_bytes("-c", "import torch")
    assert merge_peak(tmp_path, layers=1, shard_count=1, rows=2**15, columns=2**13) < imported + 64 * MEBIBYTE


def expert_peak(folder: Path, is_fused: bool, *options: str) -> int:
    """Merge fused pairs of 24 experts (2816 x 2048 and 2048 x 1408) of one layer: some 415 MB of bfloat16."""
    experts, hidden, inner, rank = 24, 2048, 1408, 4
    gate_up = torch.full((experts, 2 * inner, hidden), 0.5, dtype=torch.bfloat16)
    down = torch.full((experts, hidden, inner), 0.5, dtype=torch.bfloat16)
    stem = "model.layers.0.mlp.experts"
    tensors = {f"{stem}.gate_up_proj": gate_up, f"{stem}.down_proj": down}
    if not is_fused:
        parts = {"gate_proj": gate_up[:, :inner], "up_proj": gate_up[:, inner:], "down_proj": down}
        numbers = range(experts)
        tensors = {f"{stem}.{e}.{part}.weight": at[e].clone() for part, at in parts.items() for e in numbers}
    base = write_base(folder / "base", [tensors], {"model_type": "qwen3_moe"})
    pairs = {
        f"{PREFIX}{stem}.base_layer.lora_A.weight": torch.full((experts * rank, hidden), 0.25),
        f"{PREFIX}{stem}.base_layer.lora_B.weight": torch.full((2 * inner, experts * rank), 0.5),
        f"{PREFIX}{stem}.lora_A.weight": torch.full((experts * rank, inner), 0.25),
        f"{PREFIX}{stem}.lora_B.weight": torch.full((hidden, experts * rank), 0.5),
    }
    fields = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "peft_version": "0.21.2"}
    adapter = write_adapter(folder / "adapter", pairs, **fields)
    arguments = ["merge", str(base), str(adapter), "--output", str(folder / "out"), "--threads", "2", *options]
    return peak_bytes("-m", "rawmerge", *arguments)


@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
@pytest.mark.parametrize("is_fused", [True, False])
def test_experts_are_computed_one_by_one(tmp_path: Path, is_fused: bool, options: tuple[str, ...]) -> None:
    imported = peak_bytes("-c", "import torch")
    assert expert_peak(tmp_path, is_fused, *options) < imported + 64 * MEBIBYTE


def whole_tensor_case(folder: Path, kind: str) -> tuple[Path, Path]:
    """Write three weights of 1536 x 2048, and an adapter of a kind that needs each of them whole."""
    rows, columns, low = 1536, 2048, 300
    names = [f"layers.{layer}.q" for layer in range(3)]
    generator = torch.Generator().manual_seed(1)
    weights = {f"{name}.weight": torch.randn(rows, columns, generator=generator).bfloat16() for name in names}
    base = write_base(folder / "base", [weights])
    parts: dict[str, tuple[int, ...]] = {"fourierft_spectrum": (1000,)}
    fields: dict[str, object] = {"peft_type": "FOURIERFT", "n_frequency": 1000}
    if kind == "OSF":
        shapes = {"U_low": (rows, low), "S_low": (low,), "V_low": (low, columns)}
        parts = {f"osf_svd_params.{part}": shape for part, shape in shapes.items()}
        fields = {"peft_type": "OSF"}
    tensors = {f"{PREFIX}{name}.{part}": torch.randn(shape) for name in names for part, shape in parts.items()}
    adapter = write_adapter(folder / "adapter", tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    return base, adapter


@pytest.mark.parametrize("kind", ["FOURIERFT", "OSF"])
def test_the_peak_of_kinds_that_need_the_whole_tensor_is_the_predicted_one(tmp_path: Path, kind: str) -> None:
    base, adapter = whole_tensor_case(tmp_path, kind)
    forecast = forecast_memory(rawmerge.plan_merge(base, adapter), 2)
    assert len(forecast.whole) == 3
    arguments = ["merge", str(base), str(adapter), "--output", str(tmp_path / "out"), "--threads", "2"]
    peak = peak_bytes("-m", "rawmerge", *arguments)
    assert peak < 1.05 * forecast.peak
    assert peak > 0.5 * forecast.peak, "the prediction is of no use"


def test_the_peak_of_a_plain_lora_is_the_predicted_one(tmp_path: Path) -> None:
    peak = merge_peak(tmp_path, layers=10, shard_count=2)
    forecast = forecast_memory(rawmerge.plan_merge(tmp_path / "base", tmp_path / "adapter"), 2)
    assert forecast.whole == ()
    assert 0.8 * forecast.peak < peak < 1.1 * forecast.peak
