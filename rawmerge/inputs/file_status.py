"""By what a file is known again without reading it: its place in the file system, its size and its times."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

#: A write that follows another within this time may leave the file's times as they are: kernels count in ticks of at
#: most 10 ms (kernel/time/timekeeping.c, `ktime_get_coarse_real_ts64`). In nanoseconds, with room to spare.
TICK_NS: Final = 50_000_000


class FileStatus(NamedTuple):
    """One state of one file; whoever changes the file gives it another.

    Attributes:
        device: of the file system; inode: of the file.
        byte_count: its size.
        modified_ns: when its content changed last; changed_ns: when it, its mode or its links did, which no program
            can set at will.
    """

    device: int
    inode: int
    byte_count: int
    modified_ns: int
    changed_ns: int

    def has_same_content(self, other: FileStatus) -> bool:
        """Whether both are the same file with the same content; its mode and its other names may have changed."""
        return self[1:4] == other[1:4]  # a device may have another number after a restart


def file_status(path: str | Path) -> FileStatus:
    """Return the status of a file, links followed.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path)  # noqa: PTH116  # plans hold paths as text
    return FileStatus(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
