"""Stands where a merge writes a shard, and tells whether a file that is there holds just what would be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from rawmerge.engine.page_edges import place_in
from rawmerge.file_errors import named_errors
from rawmerge.formats.shard_header import encode_header
from rawmerge.inputs.tensor_source import OpenFiles

#: Bytes that are read at a time.
_CHUNK_BYTES: Final = 2**18


class SameShard:
    """Takes what a shard's file would take, and writes nothing.

    Attributes:
        is_same: whether all that came so far is in the file.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be opened.
        """
        self.is_same = True
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write_header(self, text: str) -> None:
        """Compare a header with the beginning."""
        self.write_at(0, memoryview(encode_header(text)))

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Compare bytes that would be written from `offset` on; no more once a difference is known."""
        for start in range(0, len(buffer), _CHUNK_BYTES):
            if self.is_same:
                part = buffer[start : start + _CHUNK_BYTES]
                with named_errors(self._path, "reading", offset + start):
                    found = os.pread(self._descriptor, len(part), offset + start)
                if found != part.tobytes():
                    self.is_same = False  # never back to True: another thread may have found a difference meanwhile

    def write_placed(self, offset: int, byte_count: int, pages: memoryview) -> None:
        """Compare bytes that lie in pages of memory as they would lie in pages of the file."""
        self.write_at(offset, place_in(pages, offset, byte_count))

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Compare with a byte range of another file."""
        for done in range(0, byte_count, _CHUNK_BYTES):
            if self.is_same:
                part = memoryview(bytearray(min(_CHUNK_BYTES, byte_count - done)))
                files.read_into(path, source_offset + done, part)
                self.write_at(offset + done, part)

    def clone(self, _: OpenFiles, __: str, /) -> bool:
        """Say that nothing can be cloned."""
        return False

    def flush(self) -> None:
        """Wait for nothing: nothing is written."""

    def finish(self, *, gives_up_pages: bool = False) -> None:  # noqa: ARG002  # there are none
        """Make durable what is there, and close: nobody knows whether whoever wrote it came so far."""
        if self.is_same:
            with named_errors(self._path, "syncing"):
                os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
