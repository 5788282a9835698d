"""Memory that the system gives in whole pages, and takes back when it is let go."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Final

#: Bytes of a page of memory; a multiple of what disks ask for.
PAGE_BYTES: Final = 4096
#: Buffers from this size on are worth large pages.
LARGE_FROM: Final = 2**20
#: Bytes of a large page, on x86-64 and on Arm with small pages of 4 KiB.
_LARGE_BYTES: Final = 2 * 2**20


def anonymous_memory(byte_count: int) -> memoryview:
    """Return uninitialised memory that begins with a page."""
    return memoryview(_mapped(byte_count))[:byte_count]


def large_memory(byte_count: int) -> memoryview:
    """Return memory in large pages where the system has some to spare.

    A disk is given a list of the pages that it reads or writes: of one entry then, rather than of hundreds.
    """
    memory = _mapped(large_pages(byte_count))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:byte_count]


def large_pages(byte_count: int) -> int:
    """Return what so many bytes take in large pages, all of which the system gives at the first use."""
    return -(-byte_count // _LARGE_BYTES) * _LARGE_BYTES


def whole_pages(byte_count: int) -> int:
    """Return what the pages take that hold so many bytes, wherever in a page they begin."""
    return -(-(byte_count + PAGE_BYTES - 1) // PAGE_BYTES) * PAGE_BYTES if byte_count else 0


def _mapped(byte_count: int) -> mmap.mmap:
    byte_count = max(1, byte_count)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, byte_count)
    # what Python maps by itself could be shared with children; few systems give that large pages
    return mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE)
