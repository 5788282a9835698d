"""What the rounding leaves of a delta, beside sums over whole tensors made here in float64 from the files."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rawmerge
from rawmerge import shard_run
from rawmerge.computing import survival
from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.devices import Device
from rawmerge.computing.row_meter import RowMeter
from rawmerge.computing.shared_tensors import SharedTensors
from rawmerge.computing.survival import SUMS, Survival, SurvivalTally
from rawmerge.computing.tile_computer import TensorComputer, TileScratch
from rawmerge.engine.engine import Engine
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.errors import NothingChangedError
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.merge_plan import ReplaceTensor, UpdateTensor, matrix_of
from rawmerge.native import kernel
from rawmerge.verifying import replay
from tests import step_runs
from tests.builders import (
    ALPHA,
    PREFIX,
    RANK,
    lora_pair,
    random_tensor,
    read_all,
    write_adapter,
    write_base,
)
from tests.device_cases import CASES, PLAIN, ROUNDED, Case, lora
from tests.step_runs import Workbench
from tests.test_devices import StandIn

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = {BF16: "bfloat16", F16: "float16", F32: "float32"}
needs_kernel = pytest.mark.skipif(kernel() is None, reason="the kernel is not compiled, or not for this processor")
#: Squares, wide and narrow ones, one that the kernel pads, and one whose rows torch looks at in parts.
SHAPES = {"q": (96, 96), "up": (301, 130), "down": (70, 515), "wide": (5, 40_000), "k": (900, 64)}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Return the engines of the merges and replays that follow."""
    made: list[Engine] = []

    class Kept(Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            made.append(self)

    for module in (shard_run, replay, step_runs):
        monkeypatch.setattr(module, "Engine", Kept)
    return made


@pytest.fixture(
    params=[(2**18, 4096), (2**11, 4096), pytest.param((2**18, 40), marks=pytest.mark.slow)],
    ids=["all", "elements", "rows"],
)
def sample(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Look at all rows, or at some."""
    monkeypatch.setattr(survival, "SAMPLE_ELEMENTS", request.param[0])
    monkeypatch.setattr(survival, "SAMPLE_ROWS", request.param[1])
    elements, rows = request.param
    return elements, rows


def stride_of(rows: int, columns: int, sample: tuple[int, int]) -> int:
    return max(1, math.ceil(rows * columns / sample[0]), math.ceil(rows / sample[1]))


def expected(base: torch.Tensor, updated: torch.Tensor, output: torch.Tensor, sample: tuple[int, int]) -> Survival:
    """Return what is left of a delta.

    Args:
        base, updated: (rows, columns) in compute dtype, before and after the updates.
        output: the same as it is stored.
        sample: elements and rows to look at.
    """
    stride = stride_of(base.shape[0], base.shape[1], sample)
    rows = torch.arange(len(base)) % stride == 0
    delta = (updated - base)[rows].double()
    now, unchanged = output[rows].double(), base[rows].to(output.dtype).double()
    applied = now - unchanged
    norms = [math.sqrt(float((each**2).sum())) for each in (delta, applied, applied - delta)]
    return Survival(int((delta != 0).sum()), int((now != unchanged).sum()), norms[0], norms[1], norms[2], stride)


def assert_alike(found: Survival, wanted: Survival) -> None:
    assert (found.touched, found.changed, found.stride) == (wanted.touched, wanted.changed, wanted.stride)
    assert astuple(found)[2:5] == pytest.approx(astuple(wanted)[2:5], rel=1e-9, abs=0)


def some_pairs(size: float = 1.0) -> dict[str, torch.Tensor]:
    pairs = [lora_pair(f"model.layers.0.{name}", *shape) for name, shape in SHAPES.items()]
    return {name: tensor * (size if "lora_B" in name else 1) for pair in pairs for name, tensor in pair.items()}


def some_merge(folder: Path, dtype: torch.dtype, size: float = 1.0) -> tuple[Path, Path]:
    """Write a base of two shards, and a LoRA on all its matrices but one, as large as told beside a usual one."""
    weights = {f"model.layers.0.{name}.weight": random_tensor(shape, dtype) for name, shape in SHAPES.items()}
    other = {"model.norm.weight": random_tensor((9,), dtype), "model.layers.1.q.weight": random_tensor((12, 8), dtype)}
    base = write_base(folder / "base", [weights, other], {"model_type": "llama", "dtype": NAMES[dtype]})
    return base, write_adapter(folder / "adapter", some_pairs(size))


def wanted_of(base: Path, output: Path, pairs: Any, compute: torch.dtype, sample: tuple[int, int]) -> Any:
    """Return what is left of plain LoRA's deltas in a merged folder."""
    before, after, wanted = read_all(base), read_all(output), {}
    for name in (f"model.layers.0.{name}" for name in SHAPES):
        lora_a, lora_b = (pairs[f"{PREFIX}{name}.lora_{letter}.weight"].to(compute) for letter in "AB")
        weight = before[f"{name}.weight"].to(compute)
        updated = weight + (lora_b @ lora_a) * (ALPHA / RANK)
        wanted[f"{name}.weight"] = expected(weight, updated, after[f"{name}.weight"], sample)
    return wanted


@pytest.mark.parametrize("without", [[], ["kernel"]], ids=["kernel", "torch"])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize(("base", "to"), [(BF16, None), (F16, None), (F32, None), (F32, BF16), (BF16, F16)])
def test_a_merge_tells_what_is_left_of_each_delta(
    base: torch.dtype,
    to: torch.dtype | None,
    compute_dtype: str,
    without: list[str],
    sample: tuple[int, int],
    engines: list[Engine],
    tmp_path: Path,
) -> None:
    paths, named = some_merge(tmp_path, base, 0.002), {"dtype": NAMES[to]} if to else {}
    for number in range(2):  # a first merge may have to ask torch how it sums
        output = tmp_path / f"out{number}"
        rawmerge.merge_adapter(*paths, output, compute_dtype=compute_dtype, without=without, **named)  # type: ignore[arg-type]
    wanted = wanted_of(paths[0], output, some_pairs(0.002), F64 if compute_dtype == "float64" else F32, sample)
    for engine in engines:
        assert engine.survivals.keys() == wanted.keys()
        for name, found in engine.survivals.items():
            assert_alike(found, wanted[name])
    assert any(found.stride > 1 for found in wanted.values()) is (sample != (2**18, 4096))


@pytest.mark.parametrize(
    ("size", "least", "most"), [(1e-5, 0.95, 1.0), (1e-3, 0.1, 0.9), (10.0, 0.0, 0.01)], ids=["tiny", "small", "large"]
)
def test_a_small_delta_is_lost_and_a_large_one_is_kept(
    size: float, least: float, most: float, engines: list[Engine], tmp_path: Path
) -> None:
    for without in ([], ["kernel"]):
        rawmerge.merge_adapter(*some_merge(tmp_path, BF16, size), tmp_path / f"out{len(without)}", without=without)
    for engine in engines:
        for found in engine.survivals.values():
            assert found.lost is not None
            assert found.norm_kept is not None
            assert least <= found.lost <= most
            assert found.norm_kept == pytest.approx(1, abs=0.01) or size < 1


@pytest.mark.parametrize("without", [[], ["kernel"]], ids=["kernel", "torch"])
def test_of_no_delta_nothing_is_told(without: list[str], engines: list[Engine], tmp_path: Path) -> None:
    with pytest.raises(NothingChangedError):
        rawmerge.merge_adapter(*some_merge(tmp_path, BF16, 0.0), tmp_path / "out", without=without)
    assert len(engines[-1].survivals) == len(SHAPES)
    for found in engines[-1].survivals.values():
        assert found == Survival(0, 0, 0.0, 0.0, 0.0, 1)
        assert (found.changed_share, found.norm_kept, found.lost) == (None, None, None)


def test_neither_threads_nor_tiles_nor_what_becomes_of_the_base_matter(
    sample: tuple[int, int], engines: list[Engine], tmp_path: Path
) -> None:
    paths = some_merge(tmp_path, BF16)
    for without in ([], ["kernel"]):
        engines.clear()
        for threads in (1, 2, 5):
            rawmerge.merge_adapter(*paths, tmp_path / f"{threads}{without}", threads=threads, without=without)
        copy, _ = some_merge(tmp_path / "consumed", BF16)
        rawmerge.merge_adapter(copy, paths[1], tmp_path / f"c{without}", consume_base=True, without=without)
        merges = [engine.survivals for engine in engines[:3]]
        merges.append({name: found for engine in engines[3:] for name, found in engine.survivals.items()})
        assert len(merges[0]) == len(SHAPES)
        assert all(merge == merges[0] for merge in merges)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_the_size_of_tiles_does_not_matter(
    compute_dtype: str, sample: tuple[int, int], engines: list[Engine], tmp_path: Path
) -> None:
    bench = Workbench(tmp_path)
    shapes = [(2100, 130), (300, 2000), (4100, 70)]
    steps = []
    for rows, columns in shapes:
        pair = {role: random_tensor(shape, F32) for role, shape in lora(rows, columns).items()}
        steps.append(bench.step(random_tensor((rows, columns)), [bench.update("lora", pair, ROUNDED)]))
    for tile_elements in (TILE_ELEMENTS, 2**18, 2**16, 2**13):
        for threads in (1, 3):
            bench.run(steps, compute_dtype, threads, tile_elements)
    assert len(engines[0].survivals) == len(shapes)
    kernels = [engine.survivals for engine in engines]
    for other in kernels[1:]:
        # the first run may have asked torch, which sums in another order
        for name, found in other.items():
            assert_alike(found, kernels[0][name])
        assert other == kernels[1]


MORE_CASES = {
    "lora, high": Case((2100, 40), "lora", lora(2100, 40), PLAIN),
    "lora, of one row": Case((1, 5000), "lora", lora(1, 5000), PLAIN),
}


@pytest.mark.parametrize("case", [*CASES.values(), *MORE_CASES.values()], ids=[*CASES, *MORE_CASES])
def test_every_kind_of_arithmetic_is_measured(
    case: Case, sample: tuple[int, int], engines: list[Engine], tmp_path: Path
) -> None:
    """What is stored in float64 is S itself: so D is known from another run's file."""
    bench = Workbench(tmp_path)
    step = case.step(bench, BF16)
    exact = bench.run_one(replace(step, entry=replace(step.entry, dtype="F64")), compute_dtype="float64")
    output = bench.run_one(step, compute_dtype="float64", threads=2)
    matrix = matrix_of(step)
    shape = (matrix.rows, matrix.columns)
    base = random_tensor(case.shape, BF16).double().view(shape)
    assert_alike(engines[-1].survivals["0"], expected(base, exact.view(shape), output.view(shape), sample))
    # nothing is rounded in float64
    found = engines[0].survivals["0"]
    assert (found.changed_share, found.norm_kept, found.lost) == (1.0, 1.0, 0.0)


def test_two_updates_are_one_delta_and_rows_laid_over_the_base_s_are_the_base(
    sample: tuple[int, int], engines: list[Engine], tmp_path: Path
) -> None:
    bench, overlay, scale = Workbench(tmp_path), random_tensor((100, 90), F32), random_tensor((700, 1), F32) * 20
    pair = {role: random_tensor(shape, F32) * 9 for role, shape in lora(700, 90).items()}
    updates = [bench.update("lora", pair, PLAIN), bench.update("scale_rows", {"scale": scale}, {})]
    base = random_tensor((700, 90))
    step = bench.step(base, updates, overlay=bench.store(overlay))
    output = bench.run_one(step)
    before = torch.cat([overlay.to(BF16), base[100:]]).float()
    summed = before + (pair["lora_b"] @ pair["lora_a"]) * 1.5
    updated = summed * scale
    assert_alike(engines[-1].survivals["0"], expected(before, updated, output, sample))


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.moves], ids=lambda case: case.kind)
def test_a_device_measures_the_same(case: Case, sample: tuple[int, int], tmp_path: Path) -> None:
    step = case.step(Workbench(tmp_path), BF16)
    device = StandIn()
    assert tallied(step, device) == tallied(step, None)
    assert device.notes == ()


def test_a_device_whose_memory_is_full_leaves_the_sums_to_the_cpu(sample: tuple[int, int], tmp_path: Path) -> None:
    step = CASES["lora, of many tiles"].step(Workbench(tmp_path), BF16)
    device = StandIn(2**16)
    assert tallied(step, device) == tallied(step, None)
    assert device.notes


def tallied(step: UpdateTensor, device: Device | None) -> Survival | None:
    """Return what the torch path makes of a step's tiles."""
    matrix, blas = matrix_of(step), BlasThreads()
    tally, found = SurvivalTally(matrix.rows, matrix.columns), None
    blas.adopt()
    try:
        with OpenFiles() as files:
            shared = SharedTensors[torch.Tensor](Counter())
            computer = TensorComputer(step, files, shared, blas, "float64", device, meter=RowMeter(tally))
            for first, count in matrix.tiles(2**18):
                assert found is None
                computer.compute(first, count, TileScratch())
                found = tally.finish(count)
    finally:
        blas.restore()
    assert found is not None
    return found


@needs_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_kernel_leaves_to_torch_is_counted_once(
    bad: float, sample: tuple[int, int], engines: list[Engine], tmp_path: Path
) -> None:
    base, adapter = some_merge(tmp_path, BF16)
    weights = read_all(base)
    weights["model.layers.0.up.weight"][0, 3] = bad  # the first row is looked at always
    base = write_base(tmp_path / "bad", [weights])
    outputs = [tmp_path / "0", tmp_path / "1", tmp_path / "2"]
    for output, without in zip(outputs, ([], [], ["kernel"]), strict=True):
        rawmerge.merge_adapter(base, adapter, output, without=without)
    found = [engine.survivals["model.layers.0.up.weight"] for engine in engines]
    wanted = wanted_of(base, outputs[1], some_pairs(), F32, sample)["model.layers.0.up.weight"]
    for each in found:
        assert (each.touched, each.changed, each.stride) == (wanted.touched, wanted.changed, wanted.stride)
        assert each.changed_share is not None
        assert math.isnan(each.delta_norm)
        assert (each.norm_kept, each.lost) == (None, None)


def test_what_is_not_updated_is_not_measured(engines: list[Engine], tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    cast = bench.step(random_tensor((30, 8)), dtype=F32)
    update = bench.update("lora", {role: torch.ones(shape) for role, shape in lora(30, 8).items()}, PLAIN)
    replaced = ReplaceTensor(cast.entry, bench.store(torch.ones(30, 8)), None)
    bench.run([cast, replaced, bench.step(random_tensor((30, 8)), [update])])
    assert engines[-1].survivals.keys() == {"2"}


def test_a_replay_does_not_measure(tiny: tuple[Path, Path], engines: list[Engine], tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "out", verify=True)
    assert rawmerge.verify_merge(tmp_path / "out", *tiny).findings == ()
    assert [len(engine.survivals) for engine in engines] == [2, 0, 0]


def test_the_sums_are_dropped_with_the_last_row() -> None:
    tally = SurvivalTally(10, 4)
    tally.put(3, memoryview(array("d", [4, 3, 2.0, 8.0, 18.0] * 2)))
    assert len(tally.sums()) == 10 * SUMS
    assert tally.finish(7) is None
    found = tally.finish(3)
    assert found == Survival(8, 6, 2.0, 4.0, 6.0, 1)
    assert tally._sums is None
    assert (found.changed_share, found.norm_kept, found.lost) == (0.75, 2.0, 1.0)


def test_a_row_that_is_put_twice_counts_once() -> None:
    tally = SurvivalTally(3, 1)
    for _ in range(2):
        tally.put(1, memoryview(array("d", [1, 1, 9.0, 4.0, 1.0])))
    found = tally.finish(3)
    assert found == Survival(1, 1, 3.0, 2.0, 1.0, 1)
    assert found.lost == 1 / 3


@pytest.mark.parametrize(
    ("shape", "stride", "rows"),
    [
        ((7, 3), 1, 7),
        ((4096, 64), 1, 4096),
        ((4097, 2), 2, 2049),
        ((4096, 65), 2, 2048),
        ((14336, 4096), 224, 64),
        ((128256, 2048), 1002, 128),
        ((1, 16777216), 64, 1),
        ((1000000, 1), 245, 4082),
    ],
)
def test_a_large_tensor_s_rows_are_sampled(shape: tuple[int, int], stride: int, rows: int) -> None:
    tally = SurvivalTally(*shape)
    assert (tally.stride, len(tally.sampled(0, shape[0])), len(tally.sums())) == (stride, rows, rows * SUMS)
    assert list(tally.sampled(stride + 1, 2 * stride)) == [2 * stride, 3 * stride]


def numbers() -> Iterator[tuple[Survival, tuple[float | None, ...]]]:
    huge, nan = 1e300, float("nan")
    yield Survival(4, 1, 2.0, 1.0, 3.0, 1), (0.25, 0.5, 1.0)
    yield Survival(4, 0, 2.0, 0.0, 2.0, 1), (0.0, 0.0, 1.0)
    yield Survival(4, 4, nan, nan, nan, 1), (1.0, None, None)
    yield Survival(4, 4, math.inf, math.inf, 1.0, 1), (1.0, None, None)
    yield Survival(4, 4, 1.0, math.inf, nan, 1), (1.0, None, None)
    yield Survival(4, 4, 1e-300, huge, huge, 1), (1.0, None, None)
    yield Survival(0, 0, 0.0, 0.0, 0.0, 9), (None, None, None)


@pytest.mark.parametrize(("found", "wanted"), list(numbers()))
def test_a_ratio_that_is_no_number_is_none(found: Survival, wanted: tuple[float | None, ...]) -> None:
    assert (found.changed_share, found.norm_kept, found.lost) == wanted


def test_sums_that_are_too_large_are_infinite() -> None:
    tally = SurvivalTally(2, 1)
    tally.put(0, memoryview(array("d", [1, 1, 1.7e308, 1.0, float("nan")] * 2)))
    found = tally.finish(2)
    assert found is not None
    assert (found.delta_norm, found.applied_norm, found.lost) == (math.inf, math.sqrt(2), None)
