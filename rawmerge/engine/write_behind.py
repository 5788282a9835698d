"""Keeps the page cache small behind the work where memory is limited.

A control group's memory counts the cached pages of the files that its processes read and write. Clean ones go when
others are needed, but ones that wait for the disk cannot, so that a group that writes faster than the disk is held up
or killed. So a thread that has written a window's worth waits for the disk, which leaves at most two windows dirty,
and what was read or is on the disk is given up.
"""

from __future__ import annotations

import os
import threading

from rawmerge.engine.shard_target import ShardTarget
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource


class WriteBehind:
    """The pages behind the work of all threads; a window of 0 leaves them to the system."""

    def __init__(self, window_bytes: int) -> None:
        self._window = window_bytes
        self._lock = threading.Lock()
        self._disk = threading.Lock()
        self._dirty: dict[ShardTarget, int] = {}
        self._read_bytes = 0
        self._ends: dict[str, int] = {}

    @property
    def is_on(self) -> bool:
        """Whether pages are given up at all."""
        return self._window > 0

    def wrote(self, file: ShardTarget, byte_count: int) -> None:
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

    def _taken(self) -> list[ShardTarget]:
        with self._lock:
            files, self._dirty = list(self._dirty), {}
            return files

    def read(self, files: OpenFiles, path: str, offset: int, byte_count: int) -> None:
        """Count bytes that were read and will not be again; after a window of them, give up what lies before them.

        Not range by range: the system forgets no block of pages that a range only touches, and blocks may be large.
        """
        if not (self.is_on and hasattr(os, "posix_fadvise")):
            return
        with self._lock:
            self._read_bytes += byte_count
            self._ends[path] = max(self._ends.get(path, 0), offset + byte_count)
            if self._read_bytes < self._window:
                return
            ends, self._ends, self._read_bytes = self._ends, {}, 0
        for each, end in ends.items():
            os.posix_fadvise(files.descriptor(each), 0, end, os.POSIX_FADV_DONTNEED)

    def read_rows(self, files: OpenFiles, source: TensorSource, rows: tuple[int, int], row_count: int) -> None:
        """Do the same for (first row, how many) of a tensor that has `row_count` rows."""
        row_bytes = source.byte_count // row_count
        self.read(files, source.path, source.offset + rows[0] * row_bytes, rows[1] * row_bytes)
