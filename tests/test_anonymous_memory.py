"""Memory for buffers: where it begins, how long it is, and what pages it is of."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from rawmerge.engine.anonymous_memory import PAGE_BYTES, anonymous_memory, large_memory, large_pages

LARGE = 2 * 2**20
SMAPS = Path("/proc/self/smaps")


def address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def bytes_in_large_pages(memory: memoryview | mmap.mmap) -> int:
    """Return how much lies in large pages of the mapping that holds `memory`, as Linux tells."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)[1:]:
        first, end = (int(number, 16) for number in text.split()[0].split("-"))
        if first <= start < end:
            return 1024 * sum(int(size) for size in re.findall(r"(?:AnonHugePages|ShmemPmdMapped): +(\d+) kB", text))
    raise AssertionError("no mapping holds it")


@pytest.mark.parametrize("make", [anonymous_memory, large_memory])
@pytest.mark.parametrize("byte_count", [0, 1, PAGE_BYTES, 3 * LARGE + 5])
def test_memory_begins_with_a_page_and_is_as_long_as_asked_for(make: object, byte_count: int) -> None:
    assert callable(make)
    memory = make(byte_count)
    assert len(memory) == byte_count
    memory[:] = bytes(byte_count)
    assert byte_count == 0 or address(memory) % PAGE_BYTES == 0


def test_a_number_of_large_pages_is_rounded_up() -> None:
    assert [large_pages(count) for count in (1, LARGE, LARGE + 1)] == [LARGE, LARGE, 2 * LARGE]


@pytest.mark.skipif(not SMAPS.exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux tells")
def test_large_memory_is_in_large_pages_where_the_system_gives_any() -> None:
    other = mmap.mmap(-1, 4 * LARGE, flags=mmap.MAP_PRIVATE)
    other.madvise(mmap.MADV_HUGEPAGE)
    other[:] = b"x" * len(other)
    if bytes_in_large_pages(other) < len(other):
        pytest.skip("the system has none to spare")
    memory = large_memory(4 * LARGE)
    memory[:] = b"x" * len(memory)
    assert bytes_in_large_pages(memory) >= 3 * LARGE  # not at the ends, if the system did not align it
