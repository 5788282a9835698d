"""Memory that the system gives in whole pages, and takes back when it is let go."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Final

#: Bytes of a page of memory; a multiple of what disks ask for.
PAGE_BYTES: Final = 4096
#: Bytes of a large page, on x86-64 and on Arm with small pages of 4 KiB.
_LARGE_BYTES: Final = 2 * 2**20


def anonymous_memory(byte_count: int) -> memoryview:
    """Return uninitialised memory that begins with a page."""
    return memoryview(mmap.mmap(-1, max(1, byte_count)))[:byte_count]


def large_memory(byte_count: int) -> memoryview:
    """Return memory in large pages where the system has some to spare.

    A disk is given a list of the pages that it reads or writes: of one entry then, rather than of hundreds.
    """
    memory = mmap.mmap(-1, -(-byte_count // _LARGE_BYTES) * _LARGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:byte_count]
