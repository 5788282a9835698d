"""Stands where a merge writes a shard as safetensors, and puts its tensors where a file of `torch.save` has them.

Whoever makes a shard need not know of it: tensors arrive at the places that they would have in a safetensors file. Each
is read back for its checksum as soon as it is whole, by the thread that wrote the last of it, while the system probably
still has it in memory. What holds the checksums is written when all are there.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rawmerge.engine.page_edges import place_in
from rawmerge.engine.shard_target import ShardTarget
from rawmerge.file_errors import named_errors
from rawmerge.formats.shard_names import is_pickle
from rawmerge.inputs.tensor_source import OpenFiles
from rawmerge.merge_plan import ShardPlan

#: Bytes that are read back at a time: few enough to stay in the processor's cache.
_CHUNK_BYTES: Final = 2**18


class ArchivedShard:
    """A shard in a file of `torch.save`, which `target` writes, or compares with the one that is there."""

    def __init__(self, target: ShardTarget, path: Path, plan: ShardPlan) -> None:
        """Find the places of its tensors.

        Args:
            target: takes the bytes of the file.
            path: the file.
            plan: the shard, whose steps have their places in a safetensors file.
        """
        self._target = target
        self._path = path
        self._layout = plan.layout
        placed = ((plan.data_start + step.entry.start, number) for number, step in enumerate(plan.steps))
        found = sorted(pair for pair in placed if self._layout.sizes[pair[1]])
        self._starts = array("Q", (start for start, _ in found))
        self._numbers = array("Q", (number for _, number in found))  # of each, its place in the table
        self._lock = threading.Lock()
        self._missing = array("q", (self._layout.sizes[number] for number in self._numbers))
        self._checksums = array("Q", bytes(8 * len(plan.steps)))

    def write_header(self, text: str) -> None:
        """Take a header, of which this format has no use."""

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Write bytes that a safetensors file would have from `offset` on."""
        for done, index, place, count in self._parts(offset, len(buffer)):
            self._target.write_at(place, buffer[done : done + count])
            self._count(index, count)

    def write_placed(self, offset: int, byte_count: int, pages: memoryview) -> None:
        """Write bytes that lie in pages of memory as in those of a safetensors file."""
        self.write_at(offset, place_in(pages, offset, byte_count))

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Copy a byte range of another file."""
        for done, index, place, count in self._parts(offset, byte_count):
            self._target.copy_from(files, path, source_offset + done, place, count)
            self._count(index, count)

    def clone(self, _: OpenFiles, __: str, /) -> bool:
        """Say that nothing can be cloned: the base's file is another."""
        return False

    def flush(self) -> None:
        """Make durable what was written."""
        self._target.flush()

    def finish(self, *, gives_up_pages: bool = False) -> None:
        """Write what stands between the tensors, make all durable, and close.

        Raises:
            OSError: the file cannot be read or written.
        """
        for number, missing in zip(self._numbers, self._missing, strict=True):
            if missing:  # written twice, in part: what was read back then is another now
                self._checksums[number] = self._checksum(number)
        for offset, raw in self._layout.frames(self._checksums):
            self._target.write_at(offset, memoryview(raw))
        self._target.finish(gives_up_pages=gives_up_pages)

    def close(self) -> None:
        """Close the file; safe to call again."""
        self._target.close()

    def _parts(self, offset: int, byte_count: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (how far in the range, which tensor, place in the file, bytes) of each tensor's part of a range."""
        done, index = 0, bisect_right(self._starts, offset) - 1
        while done < byte_count:
            number, within = self._numbers[index], offset + done - self._starts[index]
            count = min(byte_count - done, self._layout.sizes[number] - within)
            yield done, index, self._layout.tensor_starts[number] + within, count
            done, index = done + count, index + 1

    def _count(self, index: int, byte_count: int) -> None:
        """Count bytes of a tensor that were written, and take its checksum where they were the last."""
        with self._lock:
            self._missing[index] -= byte_count
            is_whole = self._missing[index] == 0
        if is_whole:
            self._checksums[self._numbers[index]] = self._checksum(self._numbers[index])

    def _checksum(self, number: int) -> int:
        """Return the CRC-32 of a tensor as it stands in the file."""
        checksum, place, size = 0, self._layout.tensor_starts[number], self._layout.sizes[number]
        end, chunk = place + size, memoryview(bytearray(min(_CHUNK_BYTES, size)))
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while place < end:
                with named_errors(self._path, "reading back", place):
                    count = os.preadv(descriptor, [chunk[: end - place]], place)
                    if not count:  # else this would go on for ever
                        raise OSError(errno.EIO, "the file has become shorter")
                checksum, place = zlib.crc32(chunk[:count], checksum), place + count
        finally:
            os.close(descriptor)
        return checksum


def in_format(target: ShardTarget, path: Path, shard: ShardPlan) -> ShardTarget:
    """Return what takes a shard's bytes as an engine gives them, and gives `target` those of its file.

    Args:
        target: of the file at `path`.
        path: the file.
        shard: the plan of it.
    """
    return ArchivedShard(target, path, shard) if is_pickle(shard.name) else target
