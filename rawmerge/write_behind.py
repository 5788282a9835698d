"""Keeps the page cache small behind the work where memory is limited.

A control group's memory counts the cached pages of the files that its processes read and write. Clean ones go when
others are needed, but ones that wait for the disk cannot, so that a group that writes faster than the disk is held up
or killed. So a thread that has written a window's worth waits for the disk, which leaves at most two windows dirty,
and what was read or is on the disk is given up.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from rawmerge.shard_writer import OutputFile
from rawmerge.tensor_source import OpenFiles, TensorSource

_PAGE_BYTES: Final = 4096


class WriteBehind:
    """The pages behind the work of all threads; a window of 0 leaves them to the system."""

    def __init__(self, window_bytes: int) -> None:
        self._window = window_bytes
        self._lock = threading.Lock()
        self._disk = threading.Lock()
        self._dirty: dict[OutputFile, int] = {}

    @property
    def is_on(self) -> bool:
        """Whether pages are given up at all."""
        return self._window > 0

    def wrote(self, file: OutputFile, byte_count: int) -> None:
        """Count bytes that a thread has written, and let it wait for the disk where there are too many."""
        if not self.is_on:
            return
        with self._lock:
            self._dirty[file] = self._dirty.get(file, 0) + byte_count
        if self._is_full():
            with self._disk:  # whoever comes second finds the work done, and others must not get further ahead
                for each in self._taken() if self._is_full() else ():
                    each.flush()

    def _is_full(self) -> bool:
        with self._lock:
            return sum(self._dirty.values()) >= self._window

    def _taken(self) -> list[OutputFile]:
        with self._lock:
            files, self._dirty = list(self._dirty), {}
            return files

    def read(self, files: OpenFiles, path: str, offset: int, byte_count: int) -> None:
        """Give up the pages of a range that will not be read again."""
        first = -(-offset // _PAGE_BYTES) * _PAGE_BYTES  # pages shared with the neighbours stay
        count = (offset + byte_count) // _PAGE_BYTES * _PAGE_BYTES - first
        if self.is_on and count > 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(files.descriptor(path), first, count, os.POSIX_FADV_DONTNEED)

    def read_rows(self, files: OpenFiles, source: TensorSource, rows: tuple[int, int], row_count: int) -> None:
        """Give up the pages of (first row, how many) of a tensor that has `row_count` rows."""
        row_bytes = source.byte_count // row_count
        self.read(files, source.path, source.offset + rows[0] * row_bytes, rows[1] * row_bytes)
