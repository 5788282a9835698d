"""Computing on a GPU, held to the CPU's bytes; skipped where torch finds none.

`test_devices.py` holds the same code to the same bytes on the CPU, with a stand-in for the GPU's waiting and failing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rawmerge
from rawmerge.computing.devices import Device, open_device
from tests.device_cases import CASES, Case, computed
from tests.step_runs import Workbench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MANY_TILES = CASES["lora, of many tiles"]


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.fixture
def gpu() -> Iterator[Device]:
    with open_device("cuda") as device:
        yield device


def values(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).double()


@pytest.mark.parametrize(("base", "output"), [(BF16, BF16), (F16, BF16), (F32, F16), (BF16, F16)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_gives_the_cpu_s_bytes(
    case: Case, base: torch.dtype, output: torch.dtype, bench: Workbench, gpu: Device
) -> None:
    step = case.step(bench, base, output)
    assert computed(step, gpu) == computed(step)
    assert bool(gpu.notes) is not case.moves


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.moves], ids=lambda case: case.kind)
def test_float64_stored_in_float32_is_at_most_one_rounding_off(case: Case, bench: Workbench, gpu: Device) -> None:
    """Sums of another order may lie on the other side of a tie, of float32 about once in a hundred million."""
    step = case.step(bench, F32)
    found, expected = (values(computed(step, device), F32) for device in (gpu, None))
    assert (found != expected).sum() <= 1
    torch.testing.assert_close(found, expected, rtol=2**-23, atol=2**-149)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.moves], ids=lambda case: case.kind)
def test_float32_is_within_float32_s_rounding_of_the_cpu_s(
    case: Case, dtype: torch.dtype, bench: Workbench, gpu: Device
) -> None:
    step = case.step(bench, dtype)
    found, expected = (values(computed(step, device, "float32"), dtype) for device in (gpu, None))
    # TF32 has 10 bits, so that its products would be off by some 1e-3
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=scale * 2e-6)
    assert gpu.notes == ()


def test_tf32_that_the_process_allows_is_not_used(bench: Workbench) -> None:
    step = MANY_TILES.step(bench, F32)
    expected = values(computed(step, None, "float32"), F32)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with open_device("cuda") as gpu:
            found = values(computed(step, gpu, "float32"), F32)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=float(expected.abs().max()) * 2e-6)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tile_elements", [2**16, 2**18, 2**22])
def test_neither_tiles_nor_threads_change_a_byte(
    threads: int, tile_elements: int, bench: Workbench, gpu: Device
) -> None:
    step = MANY_TILES.step(bench, BF16)
    expected = computed(step)
    for _ in range(5):  # a race need not show at once
        assert computed(step, gpu, threads=threads, tile_elements=tile_elements) == expected


def test_buffers_are_page_locked_and_of_sizes_that_the_allocator_has(bench: Workbench, gpu: Device) -> None:
    lane = gpu.lane()
    buffer = lane.host.tensor("stored", (100, 77), BF16)
    assert buffer.is_pinned()
    assert buffer.untyped_storage().nbytes() == 2**14
    with lane.working():
        there = lane.upload(buffer.fill_(2))
        lane.download(there * 3, buffer)
    assert buffer.eq(6).all()


def test_the_device_s_memory_is_bounded(bench: Workbench, gpu: Device) -> None:
    gc.collect()
    step, threads = CASES["lora, of many tiles"].step(bench, BF16), 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    computed(step, gpu, threads=threads)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= threads * 256 * 2**20  # of 2**20 elements a tile, its rounding, and cuBLAS's own memory
    del step
    gc.collect()
    gpu.make_room()
    assert torch.cuda.memory_allocated() <= before + (threads + 1) * 40 * 2**20  # cuBLAS keeps its own for each stream


def test_beside_a_full_device_nothing_fails_and_no_byte_changes(bench: Workbench, gpu: Device) -> None:
    step = MANY_TILES.step(bench, BF16)
    expected = computed(step)
    total = torch.cuda.mem_get_info()[1]
    gpu.make_room()
    for megabytes in (0, 8, 24, 48, 96):
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_reserved() + megabytes * 2**20 + 1) / total)
        )
        try:
            assert computed(step, gpu) == expected
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("the device's memory was full" in note for note in gpu.notes)


def test_a_number_that_no_gpu_has_is_refused() -> None:
    with (
        pytest.raises(rawmerge.RefusedError, match=f"expected a number below {torch.cuda.device_count()}"),
        open_device("cuda:99"),
    ):
        pass


@pytest.mark.parametrize("threads", [1, 3])
def test_a_merge_gives_the_cpu_s_files(threads: int, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    rawmerge.merge_adapter(*tiny, tmp_path / "here", compute_dtype="float64")
    summary = rawmerge.merge_adapter(
        *tiny, tmp_path / "there", compute_dtype="float64", device="cuda:0", threads=threads
    )
    assert not [note for note in summary.notes if "computed on the CPU" in note]
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()
