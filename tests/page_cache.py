"""Which pages of a file the system holds in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_PROT_READ, _MAP_SHARED = 1, 1


def resident_bytes(path: Path) -> int:
    """Return how much of a file is in memory: mmap(2) without touching it, and mincore(2)."""
    size = path.stat().st_size
    if size == 0:
        return 0
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = library.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
    finally:
        os.close(descriptor)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    try:
        if library.mincore(address, size, pages) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        library.munmap(address, size)
    return sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE


def can_give_up_pages(folder: Path) -> bool:
    """Whether the system forgets a clean file's pages when it is told to; what lives in memory alone cannot."""
    probe = folder / "probe"
    with probe.open("wb") as file:
        file.write(b"\1" * 2**20)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return resident_bytes(probe) == 0
    except (OSError, AttributeError):
        return False
    finally:
        probe.unlink()
