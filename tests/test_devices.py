"""Computing on a device, shown on the CPU: its way of copying, waiting and failing is played by a stand-in.

The stand-in's arithmetic is the CPU's own, so its bytes must be those of the CPU path. `test_cuda.py` does the same on
a GPU.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import rawmerge
from rawmerge.cli import cli
from rawmerge.computing import devices
from rawmerge.computing.blas_threads import BlasThreads
from rawmerge.computing.devices import Device, Lane, is_full, open_device
from rawmerge.computing.shared_tensors import SharedTensors
from rawmerge.computing.tile_computer import TensorComputer, TileScratch
from rawmerge.errors import DeviceError, InputChangedError, MergeError, NonFiniteTensorError
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.methods import METHODS
from rawmerge.methods.interface import TileContext
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.movable import ImmovableError, Movable, moved
from tests.device_cases import CASES, Case, computed
from tests.step_runs import Workbench

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
MANY_TILES = CASES["lora, of many tiles"]


class Queue:
    """Counts how often it was waited for."""

    def __init__(self, device: torch.device) -> None:
        self.waits = 0

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def finish(self) -> None:
        self.waits += 1


class LateLane(Lane):
    """Copies as late as a device may: what it sends back is not there before the wait, what it gets it reads late."""

    def __init__(self) -> None:
        super().__init__(CPU, Queue(CPU))
        self._sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._coming: list[tuple[torch.Tensor, torch.Tensor]] = []

    def upload(self, rows: torch.Tensor) -> torch.Tensor:
        self._sent.append((rows, rows.clone()))
        return super().upload(rows)

    def download(self, rows: torch.Tensor, here: torch.Tensor) -> None:
        self._coming.append((rows.clone(), here))
        here.fill_(float("nan"))

    @contextmanager
    def working(self) -> Iterator[None]:
        with super().working():
            yield
        self.arrive()

    def arrive(self) -> None:
        for rows, copy in self._sent:
            assert torch.equal(rows, copy), "what is sent was changed before it had arrived"
        for rows, here in self._coming:
            here.copy_(rows)
        self._sent.clear()
        self._coming.clear()


class FullScratch(TileScratch):
    """A device's memory, of a few bytes."""

    def __init__(self, byte_count: int) -> None:
        super().__init__()
        self._most = byte_count

    def _allocate(self, byte_count: int) -> torch.Tensor:
        if byte_count + sum(buffer.numel() for buffer in self._buffers.values()) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate some MiB")
        return super()._allocate(byte_count)


class StandIn(Device):
    """A device that is the CPU, for any number of threads."""

    def __init__(self, byte_count: int = 2**40, lacks: torch.dtype | None = None) -> None:
        super().__init__(CPU, Queue)
        self.byte_count = byte_count
        self.lacks = lacks
        self.lanes: list[LateLane] = []

    def lane(self) -> Lane:
        if not hasattr(self._local, "lane"):
            lane = LateLane()
            lane.scratch = FullScratch(self.byte_count)
            self.lanes.append(lane)
            self._local.lane = lane
        own: LateLane = self._local.lane
        return own

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype != self.lacks


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.mark.parametrize(("base", "output"), [(BF16, BF16), (F16, BF16), (F32, F32), (BF16, F32), (F64, F16)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_device_in_float64_gives_the_cpu_s_bytes(
    case: Case, base: torch.dtype, output: torch.dtype, bench: Workbench
) -> None:
    step, device = case.step(bench, base, output), StandIn()
    assert computed(step, device) == computed(step)
    reason = f"computed on the CPU, not on cpu: 1 tensor, for {case.kind} is computed on the CPU only"
    assert device.notes == (() if case.moves else (reason,))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile_elements", [2**16, 2**18, 2**22])
def test_neither_tiles_nor_threads_change_a_byte(threads: int, tile_elements: int, bench: Workbench) -> None:
    step, device = MANY_TILES.step(bench, BF16), StandIn()
    assert computed(step, device, threads=threads, tile_elements=tile_elements) == computed(step)
    assert 1 <= len(device.lanes) <= threads
    assert device.notes == ()


def test_float32_is_computed_there_too(bench: Workbench) -> None:
    step, device = MANY_TILES.step(bench, BF16), StandIn()
    assert computed(step, device, "float32") == computed(step, None, "float32")
    assert device.lanes[0].scratch._buffers.keys() >= {"before", "tile", "result"}


def test_a_thread_s_buffers_on_the_device_are_those_of_one_block(bench: Workbench) -> None:
    device, elements = StandIn(), 2**20
    computed(CASES["lora, of many tiles"].step(bench, BF16), device, tile_elements=2**22)
    sizes = {slot: buffer.numel() for slot, buffer in device.lanes[0].scratch._buffers.items()}
    rest = 1.5  # a rest too low for a block of its own joins the block before
    assert sizes.keys() == {"before", "tile", "delta", "result"}
    assert sum(sizes.values()) <= rest * elements * (2 + 8 + 8 + 2)


def test_a_cast_is_not_sent_there(bench: Workbench) -> None:
    device = StandIn()
    step = bench.step(torch.randn(30, 40), (), BF16)
    assert computed(step, device) == computed(step)
    assert (device.lanes, device.notes) == ([], ())


def test_rows_laid_over_the_base_s_are_sent_with_it(bench: Workbench) -> None:
    overlay = torch.randn(100, 900)
    step = CASES["lora"].step(bench, BF16)
    update = bench.update("lora", CASES["lora"].tensors(), CASES["lora"].settings)
    overlaid = bench.step(torch.randn(700, 900).to(BF16), [update], overlay=bench.store(overlay))
    device = StandIn()
    assert computed(overlaid, device) == computed(overlaid) != computed(step)
    assert device.notes == ()


def test_float64_results_are_the_cpu_s_own(bench: Workbench) -> None:
    device = StandIn()
    step = CASES["lora"].step(bench, F64)
    assert computed(step, device) == computed(step)
    assert not device.lanes


def block_bytes(elements: int) -> int:
    return elements * (2 + 8 + 8 + 2)


def test_in_a_smaller_memory_float64_goes_in_smaller_blocks(bench: Workbench) -> None:
    step, device = MANY_TILES.step(bench, BF16), StandIn(block_bytes(2**19) * 3 // 2)
    assert computed(step, device) == computed(step)
    assert device.notes == ()
    assert len(device.lanes) == 2 * 2  # a lane that met its end is thrown away, with its buffers; each tile tries anew


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_what_does_not_fit_is_computed_on_the_cpu_and_told(compute_dtype: str, bench: Workbench) -> None:
    step, device = MANY_TILES.step(bench, BF16), StandIn(2**16)
    assert computed(step, device, compute_dtype) == computed(step, None, compute_dtype)
    assert device.notes == ("computed on the CPU, not on cpu: 1 tensor, for the device's memory was full",)
    assert len(device.lanes) == {"float32": 1, "float64": 2}[compute_dtype]


def test_a_dtype_that_the_device_lacks_is_told_once_for_all_tensors(bench: Workbench) -> None:
    device = StandIn(lacks=F64)
    for name in ("lora", "dora"):
        step = CASES[name].step(bench, BF16)
        assert computed(step, device) == computed(step)
        assert computed(step, device, "float32") == computed(step, None, "float32")
    assert device.notes == ("computed on the CPU, not on cpu: 2 tensors, for the device has no float64",)
    assert device.lanes  # of float32


class FailingLora(PreparedLora):
    """Fails as torch does on a device."""

    error: Exception = NotImplementedError("The operator 'aten::mm' is not implemented for MPS\nmore")

    def apply(self, *arguments: object) -> None:
        if threading.current_thread() in LENT:
            raise self.error
        super().apply(*arguments)  # type: ignore[arg-type]


LENT: set[threading.Thread] = set()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingLora]:
    """Let LoRA fail wherever a device's lane is at work, and nowhere else."""
    real = LateLane.working

    @contextmanager
    def working(lane: LateLane) -> Iterator[None]:
        with real(lane):
            LENT.add(threading.current_thread())
            try:
                yield
            finally:
                LENT.discard(threading.current_thread())

    monkeypatch.setattr(LateLane, "working", working)
    monkeypatch.setattr("rawmerge.methods.lora.PreparedLora", FailingLora)
    return FailingLora


def test_an_operation_that_the_device_lacks_is_done_on_the_cpu(bench: Workbench, failing: type[FailingLora]) -> None:
    step, device = MANY_TILES.step(bench, BF16), StandIn()
    assert computed(step, device) == computed(step)
    (note,) = device.notes
    assert "1 tensor, for torch lacks an operation here (The operator 'aten::mm' is not implemented for MPS)" in note


def test_a_device_that_fails_ends_the_merge(
    bench: Workbench, failing: type[FailingLora], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fault(torch.cuda.CudaError):
        def __init__(self) -> None:
            RuntimeError.__init__(self, "CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(failing, "error", Fault())
    with pytest.raises(
        MergeError, match=r"cpu: the device failed: CUDA error: an illegal memory access was encountered$"
    ):
        computed(CASES["lora"].step(bench, BF16), StandIn())


def test_a_fault_of_ours_is_not_hidden(
    bench: Workbench, failing: type[FailingLora], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "error", RuntimeError("Expected all tensors to be on the same device"))
    with pytest.raises(RuntimeError, match="same device"):
        computed(CASES["lora"].step(bench, BF16), StandIn())


def test_an_overflow_is_found_there(bench: Workbench) -> None:
    pair = {"lora_a": torch.full((1, 40), 300.0), "lora_b": torch.full((70, 1), 300.0)}
    step = bench.step(torch.ones(70, 40, dtype=F16), [bench.update("lora", pair, CASES["lora"].settings)])
    with pytest.raises(NonFiniteTensorError):
        computed(step, StandIn())


def test_a_base_that_ends_early_is_no_fault_of_the_device(bench: Workbench) -> None:
    step = CASES["lora"].step(bench, BF16)
    Path(step.source.path).write_bytes(b"\0" * 1000)
    with pytest.raises(InputChangedError):
        computed(step, StandIn())


def test_whether_anything_changed_is_seen_there(bench: Workbench) -> None:
    for scale in (0.0, 1.0):
        pair = {role: tensor * scale for role, tensor in CASES["lora"].tensors().items()}
        step = bench.step(torch.ones(700, 900, dtype=BF16), [bench.update("lora", pair, CASES["lora"].settings)])
        with OpenFiles() as files:
            blas = BlasThreads()
            computer = TensorComputer(step, files, SharedTensors(Counter()), blas, "float64", StandIn())
            computer.compute(0, 700, TileScratch())
        assert computer.changed is (scale == 1.0)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.moves], ids=lambda case: case.kind)
def test_a_moved_update_makes_no_tensor_elsewhere(case: Case, dtype: torch.dtype) -> None:
    """Torch's meta device refuses to compute with another device's tensors, as a GPU does."""
    rows = case.window.row_count if case.window else case.shape[0]
    shape = (rows, 45) if case.window else case.shape
    base = torch.randn(shape, dtype=dtype)
    matrix = base.reshape(-1, case.fields["columns"]) if case.fields else base.reshape(rows, -1)
    context = TileContext(shape, dtype, None, BF16, lambda: iter([(0, matrix.clone())]))
    prepared = METHODS[case.kind].prepare(case.settings, case.tensors(), context)
    there = moved(prepared, torch.device("meta"))
    for first, count in ((0, 35), (35, 5)) if len(matrix) >= 40 else ((0, len(matrix)),):
        tile = torch.empty(count, matrix.shape[1], dtype=dtype, device="meta")
        there.apply(tile, first, TileScratch(torch.device("meta")))
        assert tile.device.type == "meta"


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.moves], ids=lambda case: case.kind)
def test_what_has_tensors_out_of_sight_is_not_moved(case: Case) -> None:
    context = TileContext(case.shape, F64, None, BF16)
    prepared = METHODS[case.kind].prepare(case.settings, case.tensors(), context)
    with pytest.raises(ImmovableError):
        moved(prepared, torch.device("meta"))


def scaled(factor: torch.Tensor, value: Any) -> torch.Tensor:
    return factor.mul(value)


@pytest.mark.parametrize(
    "hidden",
    [
        lambda tensor: lambda: tensor,
        lambda tensor: partial(lambda: tensor),
        lambda tensor: tensor.add,
        lambda tensor: [tensor],
        lambda tensor: {"a": (1, {2: [tensor]})},
        lambda tensor: partial(scaled, value=[tensor]),
        object,
    ],
)
def test_a_closure_is_not_moved(hidden: object) -> None:
    assert callable(hidden)
    with pytest.raises(ImmovableError):
        moved(hidden(torch.ones(1)) if hidden is not object else object(), CPU)


def test_all_that_is_in_sight_is_moved() -> None:
    ones = torch.ones(2)
    value = (ones, 1, 2.5, "name", None, True, BF16, {"key": ones}, partial(scaled, ones, value=2.0), scaled)
    there = moved(value, torch.device("meta"))
    assert there[0].device.type == there[3 + 4]["key"].device.type == there[8].args[0].device.type == "meta"
    assert there[1:7] == value[1:7]
    assert (there[8].func, there[8].keywords, there[9]) == (scaled, {"value": 2.0}, scaled)
    assert ones.device == CPU


def test_a_class_must_say_that_it_can_be_moved() -> None:
    lora = PreparedLora(torch.ones(1, 2), torch.ones(2, 1), 1.0, False, None)
    assert isinstance(lora, Movable)
    assert moved(lora, torch.device("meta")).lora_a.device.type == "meta"
    unsaid = METHODS["shira"].prepare({}, CASES["shira"].tensors(), TileContext((70, 40), F32, None))
    assert not isinstance(unsaid, Movable)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("Expected all tensors to be on the same device"), False),
    ],
)
def test_a_full_memory_is_known_by_its_errors(error: Exception, expected: bool) -> None:
    assert is_full(error) is expected


def fail() -> None:
    raise ValueError("broken")


def test_work_is_waited_for_when_it_fails_too() -> None:
    queue = Queue(CPU)
    lane = Lane(CPU, queue)
    with pytest.raises(ValueError, match="broken"), lane.working():
        fail()
    assert queue.waits == 1


without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
without_metal = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has Metal")
ABSENT = [
    pytest.param("cuda", marks=without_cuda),
    pytest.param("cuda:7", marks=without_cuda),
    pytest.param("mps", marks=without_metal),
]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device {name}.*expected .*, found .*") as caught, open_device(name):
        pass
    assert caught.value.exit_code == 3
    assert "--device" in caught.value.problems[0].hint


@pytest.mark.parametrize("name", ABSENT)
def test_a_merge_on_a_missing_device_writes_nothing(name: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(rawmerge.RefusedError, match=f"device {name}"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", device=name)
    result = CliRunner().invoke(cli, ["merge", *map(str, tiny), "-o", str(tmp_path / "out"), "--device", name])
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"device {name}" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "mps:0", "cuda:1:2", ""])
def test_what_is_no_device_is_a_usage_error(name: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", device=name)
    result = CliRunner().invoke(cli, ["merge", *map(str, tiny), "-o", str(tmp_path / "out"), "--device", name])
    assert result.exit_code == 2


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let `cuda` be the stand-in."""
    device = StandIn()
    monkeypatch.setattr(devices, "Device", lambda place: device)
    monkeypatch.setattr(devices, "_found", lambda name: CPU)
    return device


def switches() -> list[object]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_products_have_full_precision_and_the_switches_are_put_back(is_allowed: bool, pretended: StandIn) -> None:
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    try:
        before = switches()
        assert before[0] is is_allowed
        during: list[object] = []
        with pytest.raises(ValueError, match="broken"), open_device("cuda"):  # noqa: PT012  # what is seen inside
            during += [*precisions(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic]
            fail()
        assert during == ["ieee", "ieee", False, True]
        assert switches() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def precisions() -> list[object]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        return [matmul.fp32_precision, cudnn.conv.fp32_precision]  # type: ignore[attr-defined]
    return ["tf32" if owner.allow_tf32 else "ieee" for owner in (matmul, cudnn)]


def test_a_device_that_cannot_compute_is_refused(pretended: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def working(self) -> AbstractContextManager[None]:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(pretended, "lane", Broken)
    with pytest.raises(DeviceError, match="found CUDA error: no kernel image"), open_device("cuda"):
        pass


def test_a_device_that_failed_is_left_without_another_error(
    pretended: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_room(device: Device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StandIn, "make_room", make_room)
    with pytest.raises(ValueError, match="broken"), open_device("cuda"):
        fail()


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_a_merge_on_a_device_gives_the_cpu_s_files(
    compute_dtype: str, tiny: tuple[Path, Path], tmp_path: Path, pretended: StandIn
) -> None:
    here = rawmerge.merge_adapter(*tiny, tmp_path / "here", compute_dtype=compute_dtype)
    there = rawmerge.merge_adapter(*tiny, tmp_path / "there", compute_dtype=compute_dtype, device="cuda")
    assert pretended.lanes
    assert there.notes == here.notes
    for path in (tmp_path / "here").iterdir():
        text, other = path.read_bytes(), (tmp_path / "there" / path.name).read_bytes()
        if path.name == "rawmerge.json" and compute_dtype == "float32":
            assert b'"device": "cuda"' in other
            assert other.replace(b'    "device": "cuda",\n', b"") == text
        else:
            assert other == text


def test_what_the_cpu_did_is_noted(tiny: tuple[Path, Path], tmp_path: Path, pretended: StandIn) -> None:
    pretended.byte_count = 0
    summary = rawmerge.merge_adapter(*tiny, tmp_path / "out", device="cuda")
    assert summary.notes[-1] == "computed on the CPU, not on cpu: 2 tensors, for the device's memory was full"
