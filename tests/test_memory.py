"""Peak memory of a whole merge, as the operating system counts it: it does not follow the model's size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import rawmerge
from rawmerge.memory.forecast import forecast_memory
from rawmerge.native import kernel
from tests.builders import PREFIX, read_all, write_adapter, write_base

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


@pytest.fixture(scope="module")
def imported() -> int:
    """Return the peak of a process that imports torch, and does nothing else."""
    return peak_bytes("-c", "import torch")


TORCH, KERNEL = ("--without", "kernel"), ()
needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")
both_paths = pytest.mark.parametrize("path", [TORCH, pytest.param(KERNEL, marks=needs_kernel)], ids=["torch", "kernel"])


def peak_of(folder: Path, path: tuple[str, ...], *options: str) -> int:
    """Merge and return the peak; the kernel's trials, for which torch is imported, were made in a run before."""
    arguments = ["-m", "rawmerge", "merge", str(folder / "base"), str(folder / "adapter"), "--threads", "2"]
    if path == KERNEL:
        peak_bytes(*arguments, "--output", str(folder / "first"))
    return peak_bytes(*arguments, "--output", str(folder / "out"), *path, *options)


def write_layers(
    folder: Path, layers: int, shard_count: int, shape: tuple[int, int] = (2048, 3072), rank: int = 4
) -> None:
    """Write layers of one weight each, and a pair on all of them."""
    rows, columns = shape
    weight = (torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) % 997 / 997).bfloat16()
    names = [f"layers.{layer}.q.weight" for layer in range(layers)]
    write_base(
        folder / "base",
        [{name: weight.clone() for name in names[number::shard_count]} for number in range(shard_count)],
    )
    pairs = {}
    for name in names:
        stem = PREFIX + name.removesuffix(".weight")
        pairs[f"{stem}.lora_A.weight"] = torch.full((rank, columns), 0.25)
        pairs[f"{stem}.lora_B.weight"] = torch.full((rows, rank), 0.5)
    write_adapter(folder / "adapter", pairs, r=rank)


def allowed(imported: int, path: tuple[str, ...]) -> int:
    """Return the most that a merge may take: torch and 64 MiB, or without torch 64 MB in all."""
    return imported + 64 * MEBIBYTE if path == TORCH else 64 * 10**6


@both_paths
def test_the_peak_is_torch_and_a_few_tiles(tmp_path: Path, imported: int, path: tuple[str, ...]) -> None:
    write_layers(tmp_path, layers=30, shard_count=2)
    assert peak_of(tmp_path, path) < allowed(imported, path)


@both_paths
@pytest.mark.parametrize(("layers", "shard_count"), [(60, 2), (40, 1), (40, 4), (40, 40)])
def test_the_peak_follows_neither_size_nor_shards(
    tmp_path: Path, layers: int, shard_count: int, path: tuple[str, ...]
) -> None:
    write_layers(tmp_path / "small", layers=20, shard_count=2)
    write_layers(tmp_path / "other", layers=layers, shard_count=shard_count)
    small, other = peak_of(tmp_path / "small", path), peak_of(tmp_path / "other", path)
    assert abs(other - small) < 0.05 * small


@both_paths
def test_one_tensor_larger_than_the_tile_budget_is_tiled(tmp_path: Path, imported: int, path: tuple[str, ...]) -> None:
    write_layers(tmp_path, layers=1, shard_count=1, shape=(2**15, 2**13))
    assert peak_of(tmp_path, path) < allowed(imported, path)


@both_paths
def test_an_adapter_larger_than_the_budget_is_read_as_it_is_used(
    tmp_path: Path, imported: int, path: tuple[str, ...]
) -> None:
    write_layers(tmp_path, layers=30, shard_count=2, rank=256)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 128 * MEBIBYTE
    assert peak_of(tmp_path, path) < allowed(imported, path)


@both_paths
@pytest.mark.parametrize("is_embedding", [False, True])
def test_a_factor_larger_than_the_budget_is_read_as_it_is_used(
    tmp_path: Path, imported: int, is_embedding: bool, path: tuple[str, ...]
) -> None:
    """A vocabulary of 128,256 rows and a rank of 256; the first run of the kernel makes its trials in as little."""
    rows, columns, rank = 128_256, 512, 256
    name = "model.embed_tokens" if is_embedding else "lm_head"
    write_base(tmp_path / "base", [{f"{name}.weight": torch.full((rows, columns), 0.5, dtype=torch.bfloat16)}])
    left, right = torch.full((rows, rank), 0.25).bfloat16(), torch.full((rank, columns), 0.25).bfloat16()
    pair = {f"{PREFIX}{name}.lora_A.weight": right, f"{PREFIX}{name}.lora_B.weight": left}
    if is_embedding:
        factors = {"lora_embedding_A": left.T.contiguous(), "lora_embedding_B": right.T.contiguous()}
        pair = {f"{PREFIX}{name}.{role}": factor for role, factor in factors.items()}
    write_adapter(tmp_path / "adapter", pair, r=rank)
    assert left.nbytes > 60 * MEBIBYTE
    if path == KERNEL:
        arguments = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "--output", str(tmp_path / "trials")]
        assert peak_bytes("-m", "rawmerge", *arguments) < allowed(imported, TORCH)
    assert peak_of(tmp_path, path) < allowed(imported, path)


@dataclass(frozen=True)
class Peaks:
    """What a merge told of its memory, in bytes."""

    predicted: int
    measured: int


def told_peaks(folder: Path, *options: str) -> Peaks:
    """Merge and return what the summary tells."""
    arguments = ["merge", str(folder / "base"), str(folder / "adapter"), "--output", str(folder / "out"), "--json"]
    command = [sys.executable, "-m", "rawmerge", *arguments, "--threads", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(folder / "out")
    summary = json.loads(done.stdout)
    return Peaks(summary["predicted_peak_bytes"], summary["measured_peak_bytes"])


@both_paths
def test_a_limit_is_kept_and_the_peak_is_the_predicted_one(tmp_path: Path, path: tuple[str, ...]) -> None:
    """The prediction is at most 3 % too low and 20 % too high, with no limit, an easy one and a low one."""
    write_layers(tmp_path, layers=30, shard_count=2, rank=16)
    told_peaks(tmp_path, *path)  # the trials
    free = told_peaks(tmp_path, *path)
    for limit in (2 * free.predicted, free.predicted - 2 * MEBIBYTE, free.predicted - 4 * 10**6):
        limited = told_peaks(tmp_path, "--max-memory", f"{limit}B", *path)
        assert limited.measured < limit
        assert limited.predicted <= limit
        for peaks in (free, limited):
            assert 0.8 * peaks.predicted < peaks.measured < 1.03 * peaks.predicted


@both_paths
@pytest.mark.parametrize("threads", ["1", "8", "64"])
def test_the_peak_of_many_threads_that_copy_too_is_below_the_predicted_one(
    tmp_path: Path, path: tuple[str, ...], threads: str
) -> None:
    """A thread that copies has a buffer, and as much of the source mapped, beside what its tiles take."""
    write_layers(tmp_path, layers=12, shard_count=1, rank=16)
    kept = {f"kept.{number}": torch.ones(2**25, dtype=torch.bfloat16) for number in range(4)}
    write_base(tmp_path / "base", [read_all(tmp_path / "base") | kept])
    told_peaks(tmp_path, *path)  # the trials
    peaks = told_peaks(tmp_path, "--threads", threads, *path)
    assert 0.45 * peaks.predicted < peaks.measured < peaks.predicted


@pytest.mark.parametrize("options", [(), ("--consume-base",), ("--combine", "average")], ids=" ".join)
def test_the_peak_of_several_adapters_on_many_tensors_is_the_predicted_one(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Each adapter has a plan of its own before there is one for all: some 6 kB for a tensor and adapter."""
    write_layers(tmp_path, layers=1500, shard_count=2, shape=(48, 64))
    others = [tmp_path / f"adapter{number}" for number in range(3)]
    for number, other in enumerate(others):
        shutil.copytree(tmp_path / "adapter", other)
        scaled = {name: tensor * (number + 2) for name, tensor in read_all(other).items()}
        write_adapter(other, scaled, r=4)
    peaks = told_peaks(tmp_path, *map(str, others), *options)
    assert 0.8 * peaks.predicted < peaks.measured < 1.03 * peaks.predicted


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
def test_experts_are_computed_one_by_one(
    tmp_path: Path, imported: int, is_fused: bool, options: tuple[str, ...]
) -> None:
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
