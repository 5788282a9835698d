"""Puts page cache and free memory into a known state before a timed run."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")
READ_BYTES: Final = 4 << 20

#: Of the free memory, how much is touched at most: enough to matter, too little to push out cached files.
TOUCHED_SHARE: Final = 0.9


def settle() -> None:
    """Write out every dirty page, so that no run pays for what came before it."""
    os.sync()


def warm(directories: Iterable[Path]) -> str:
    """Read every file once; return the state's name."""
    buffer = bytearray(READ_BYTES)
    for path in _files(directories):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return "warm"


def chill(directories: Iterable[Path]) -> str:
    """Drop all caches if allowed to, else only the pages of these files; return the state's name.

    The second is the milder one: programs and directory entries stay cached.
    """
    settle()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        _forget(directories)
        return "cold (posix_fadvise)"
    return "cold (drop_caches)"


def touch_memory(byte_count: int) -> None:
    """Allocate and release up to `byte_count` bytes of free memory, so that the next run finds them backed.

    A virtual machine with a balloon hands idle free memory to its host within seconds. The run that takes it
    back pays in faults, which made the same copy five times slower here, by nothing but what came before it.
    """
    size = min(byte_count, int(TOUCHED_SHARE * psutil.virtual_memory().free))
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def _forget(directories: Iterable[Path]) -> None:
    for path in _files(directories):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(directories: Iterable[Path]) -> Iterator[Path]:
    return (path for directory in directories for path in sorted(directory.rglob("*")) if path.is_file())
