"""Buffers that a thread reuses from tile to tile: in the processor's memory, page-locked there, or a device's."""

from __future__ import annotations

from typing import Final

import torch

_CPU: Final = torch.device("cpu")


class TileScratch:
    """Buffers that one thread reuses for all its tiles, grown to the largest tile it meets."""

    def __init__(self, device: torch.device = _CPU, *, is_pinned: bool = False) -> None:
        """Make an empty store; nothing is allocated before it is asked for.

        Args:
            device: where the buffers lie.
            is_pinned: whether they are page-locked, so that an accelerator copies them beside the processor's work.
        """
        self._buffers: dict[str, torch.Tensor] = {}
        self._device = device
        self._is_pinned = is_pinned

    def tensor(self, slot: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor of (rows, columns), the same memory at every call with this slot."""
        byte_count = shape[0] * shape[1] * dtype.itemsize
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < byte_count:
            del buffer
            self._buffers.pop(slot, None)  # before memory is asked for again
            # torch allocates at multiples of 64 bytes, so every dtype's view is aligned
            buffer = self._buffers[slot] = self._allocate(byte_count)
        return buffer[:byte_count].view(dtype).view(shape)

    def _allocate(self, byte_count: int) -> torch.Tensor:
        if self._is_pinned:
            # torch's allocator of page-locked memory takes powers of two, so that all of one is better used
            byte_count = 1 << max(byte_count - 1, 0).bit_length()
        return torch.empty(byte_count, dtype=torch.uint8, device=self._device, pin_memory=self._is_pinned)
