"""Accelerators: whether one can be used, and how a thread gives it work and gets results back.

Work of one thread is done in the order in which it was given, copies included, and that of several threads side by
side. So one thread's copies overlap another's arithmetic, and a thread's buffers can be used again at once, as long as
the thread waits for the device before it touches what lies in the processor's memory.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Protocol

import torch

from rawmerge.computing.tile_scratch import TileScratch
from rawmerge.errors import DeviceError, Problem

_ON_CPU: Final = "leave --device out, or say cpu: that works everywhere, bit-equal to PEFT"


class Queue(Protocol):
    """The work that one thread gives to a device."""

    def active(self) -> AbstractContextManager[object]:
        """Return a block in which the calling thread's work goes to this queue."""

    def finish(self) -> None:
        """Wait until all of it is done."""


class _CudaQueue:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # sleeps while it waits, for other threads need the processor
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def finish(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


#: Metal's command buffer is the whole process's: threads take turns.
_METAL_LOCK: Final = threading.Lock()


class _MetalQueue:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def active(self) -> AbstractContextManager[object]:
        return _METAL_LOCK

    def finish(self) -> None:
        torch.mps.synchronize()


_QUEUES: Final[dict[str, Callable[[torch.device], Queue]]] = {"cuda": _CudaQueue, "mps": _MetalQueue}


class Lane:
    """One thread's way to a device, for one tile at a time.

    Attributes:
        host: buffers in the processor's memory, that the device copies from and to.
        scratch: buffers in the device's.
    """

    def __init__(self, device: torch.device, queue: Queue) -> None:
        self.host = TileScratch(is_pinned=device.type == "cuda")
        self.scratch = TileScratch(device)
        self._queue = queue
        self._is_async = device.type == "cuda"

    @contextmanager
    def working(self) -> Iterator[None]:
        """Give the device work in the block; all of it is done when the block ends, however it ends."""
        with self._queue.active():
            try:
                yield
            finally:
                self._queue.finish()

    def upload(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of some rows (rows, columns) on the device, valid until the next; leave `rows` as they are."""
        there = self.scratch.tensor("before", (rows.shape[0], rows.shape[1]), rows.dtype)
        return there.copy_(rows, non_blocking=self._is_async)

    def download(self, rows: torch.Tensor, here: torch.Tensor) -> None:
        """Copy rows on the device to `here`, which holds them when the work is done."""
        here.copy_(rows, non_blocking=self._is_async)


class Device:
    """Where updates are computed instead of on the CPU. Any number of threads may use it.

    Attributes:
        place: the device, as torch names it.
    """

    def __init__(self, place: torch.device, make_queue: Callable[[torch.device], Queue] | None = None) -> None:
        self.place = place
        self._make_queue = make_queue or _QUEUES[place.type]
        self._local = threading.local()
        self._lock = threading.Lock()
        self._held: dict[torch.dtype, bool] = {}
        self._left: Counter[str] = Counter()

    def lane(self) -> Lane:
        """Return the calling thread's way to the device."""
        if not hasattr(self._local, "lane"):
            self._local.lane = Lane(self.place, self._make_queue(self.place))
        lane: Lane = self._local.lane
        return lane

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether the device has a dtype: Metal lacks float64, and in older systems bfloat16."""
        with self._lock:
            if dtype not in self._held:
                self._held[dtype] = self._can_hold(dtype)
            return self._held[dtype]

    def _can_hold(self, dtype: torch.dtype) -> bool:
        try:
            with self.lane().working():
                torch.ones(2, device=self.place).to(dtype).to(torch.float32)
        except (TypeError, RuntimeError) as error:
            return is_full(error)  # what is only full may hold it later
        return True

    def make_room(self) -> None:
        """Let go of the calling thread's buffers, and of memory that torch keeps for later use on the device."""
        self._local.__dict__.pop("lane", None)
        if self.place.type != "cpu":
            getattr(torch, self.place.type).empty_cache()

    def leave_to_cpu(self, reason: str) -> None:
        """Remember that one more tensor is computed on the CPU."""
        with self._lock:
            self._left[reason] += 1

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the merge was computed on the CPU after all, and why."""
        with self._lock:
            return tuple(
                f"computed on the CPU, not on {self.place}: {count} tensor{'s' * (count > 1)}, for {reason}"
                for reason, count in sorted(self._left.items())
            )


def is_full(error: Exception) -> bool:
    """Whether an error of torch says that memory, of the device or page-locked, is used up."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "alloc_failed" in text


@contextmanager
def open_device(name: str) -> Iterator[Device]:
    """Give a device to compute on, and set torch's switches for it in the block.

    Args:
        name: `cuda`, `cuda:1`, `mps`.

    Raises:
        DeviceError: there is none of this name that works.
    """
    device = _tried(name)
    with _full_precision():
        try:
            yield device
        finally:
            with suppress(RuntimeError):  # of a device that failed, which has been told
                device.make_room()


def _found(name: str) -> torch.device:
    kind, _, number = name.partition(":")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise _refusal(name, "macOS with Metal, and a torch made for it", "none")
        return torch.device(kind)
    if not torch.cuda.is_available():
        is_built = torch.version.cuda or torch.version.hip
        found = "none that its driver lets torch use" if is_built else f"torch {torch.__version__}, made without CUDA"
        raise _refusal(name, "a GPU, and a torch made for it", found)
    count = torch.cuda.device_count()
    index = int(number) if number else torch.cuda.current_device()
    if index >= count:
        raise _refusal(name, f"a number below {count}, for so many GPUs are there", str(index))
    return torch.device(kind, index)


def _tried(name: str) -> Device:
    """Return a device that has multiplied once: one that cannot is refused before anything is written."""
    try:
        device = Device(_found(name))
        with device.lane().working():
            square = torch.ones(8, 8, device=device.place)
            (square @ square).cpu()
    except RuntimeError as error:
        raise _refusal(name, "a device that computes", str(error).partition("\n")[0]) from error
    return device


def _refusal(name: str, expected: str, found: str) -> DeviceError:
    return DeviceError(Problem(f"device {name}", expected, found, _ON_CPU))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Have float32 products computed in float32, the same way each time; torch has one set of switches per process."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, str, object]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which minds when both ways are mixed
        convolution = getattr(cudnn, "conv")  # noqa: B009  # torch's stubs lack it
        switches += [(matmul, "fp32_precision", "ieee"), (convolution, "fp32_precision", "ieee")]
    else:
        switches += [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)
