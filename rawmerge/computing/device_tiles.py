"""One step's updates on an accelerator: moved there once, used tile by tile, left to the CPU where that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Final, TypeAlias

import torch

from rawmerge.computing.devices import Device, Lane, is_full
from rawmerge.engine.tiles import TILE_ELEMENTS
from rawmerge.errors import MergeError
from rawmerge.methods.interface import PreparedUpdate
from rawmerge.methods.movable import ImmovableError, moved

#: Elements that a device computes at a time, first and where its memory was too small for that. Only float64 is cut
#: anew: its rounded results do not depend on it.
_BLOCKS: Final = {torch.float64: (TILE_ELEMENTS, TILE_ELEMENTS // 2), torch.float32: (TILE_ELEMENTS,)}
_FAULTS: Final = (torch.cuda.CudaError, getattr(torch, "AcceleratorError", torch.cuda.CudaError))

#: Given a thread's lane, the updates on the device and how many elements to compute at a time: a tile's result.
TileOnDevice: TypeAlias = Callable[[Lane, Sequence[PreparedUpdate], int], torch.Tensor]


class DeviceUpdates:
    """The updates of one step, for any number of threads."""

    def __init__(self, device: Device, kinds: Sequence[str], tile_dtype: torch.dtype) -> None:
        """Make the step's part on a device; nothing is moved yet.

        Args:
            device: where it is computed.
            kinds: what the updates are, for notes.
            tile_dtype: dtype of the arithmetic.
        """
        self._device = device
        self._kinds = kinds
        self._blocks = _BLOCKS[tile_dtype]
        self._lock = threading.Lock()
        self._moved: tuple[PreparedUpdate, ...] | None = None
        self._is_left = False

    def attempt(self, updates: Sequence[PreparedUpdate], compute: TileOnDevice) -> torch.Tensor | None:
        """Return what `compute` makes of a tile; None where the CPU must do it, and all later ones.

        Args:
            updates: the step's, on the CPU.
            compute: called with those on the device; once more, with smaller blocks, where memory runs out.

        Raises:
            MergeError: the device failed.
        """
        if self._is_left:
            return None
        try:
            for elements in self._blocks:
                result = self._try(updates, compute, elements)
                if result is not None:
                    return result
                # not before now: the error's frames keep tensors
                self._device.make_room()
            self._leave("the device's memory was full")
        except ImmovableError as error:
            self._leave(f"{error} is computed on the CPU only")
        except NotImplementedError as error:
            self._leave(f"torch lacks an operation here ({_first_line(error)})")
        return None

    def _try(self, updates: Sequence[PreparedUpdate], compute: TileOnDevice, elements: int) -> torch.Tensor | None:
        """Return what `compute` makes of a tile; None where memory is full."""
        try:
            lane = self._device.lane()
            return compute(lane, self._on_device(updates, lane), elements)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            if isinstance(error, _FAULTS) and not is_full(error):
                raise MergeError(f"{self._device.place}: the device failed: {_first_line(error)}") from error
            if not is_full(error):
                raise
        return None

    def _on_device(self, updates: Sequence[PreparedUpdate], lane: Lane) -> tuple[PreparedUpdate, ...]:
        """Return the updates on the device, moved there now or before.

        Raises:
            ImmovableError: one of them cannot be; it names the kind.
        """
        with self._lock:
            if self._moved is None:
                with lane.working():
                    self._moved = tuple(map(self._move, self._kinds, updates))
            return self._moved

    def _move(self, kind: str, update: PreparedUpdate) -> PreparedUpdate:
        try:
            there: PreparedUpdate = moved(update, self._device.place)
        except ImmovableError as error:
            raise ImmovableError(kind) from error
        return there

    def _leave(self, reason: str) -> None:
        """Have the CPU compute the step from now on; what other threads have in hand they finish."""
        with self._lock:
            is_first, self._is_left, self._moved = not self._is_left, True, None
        if is_first:
            self._device.leave_to_cpu(reason)


def updates_on(
    device: Device | None, kinds: Sequence[str], tile_dtype: torch.dtype, stored: Collection[torch.dtype]
) -> DeviceUpdates | None:
    """Return a step's part on a device; None where there is none.

    Args:
        device: the run's, None for the CPU.
        kinds: what the step's updates are.
        tile_dtype: dtype of the arithmetic.
        stored: dtypes that its tiles have before and after.
    """
    if device is None or not kinds:  # a cast is not worth the way there and back
        return None
    if lacking := [dtype for dtype in (tile_dtype, *stored) if not device.holds(dtype)]:
        device.leave_to_cpu(f"the device has no {str(lacking[0]).removeprefix('torch.')}")
        return None
    return DeviceUpdates(device, kinds, tile_dtype)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
