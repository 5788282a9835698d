"""One output file while it is written: allocated first, header next, then ranges in any order, then fsync."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.engine.anonymous_memory import PAGE_BYTES, anonymous_memory, large_memory
from rawmerge.engine.page_edges import PageEdges, cut_at_pages, place_in
from rawmerge.file_errors import named_errors
from rawmerge.formats.shard_header import encode_header
from rawmerge.inputs.tensor_source import CHUNK_BYTES, OpenFiles

if sys.platform != "win32":
    # not where it is used: a signal during an import can leave the import lock held, and torch's import waiting
    import fcntl

#: What file systems answer when they cannot allocate ahead.
_NO_PREALLOCATION: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
#: What is answered to a direct write from mapped pages: of a file system that cannot, or of a file that is shorter now.
_NO_MAPPED_WRITE: Final = {errno.EINVAL, errno.EFAULT, errno.EACCES, errno.ENODEV, errno.ENOMEM, errno.EPERM}
#: Linux, include/uapi/linux/fs.h: _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409
#: Edges of ranges that are kept in memory at most: 1 MiB of pages.
_MOST_EDGES: Final = 256
#: What is read and written at a time where bytes are only copied: one large page.
BUFFER_BYTES: Final = 2 * 2**20
#: Below it, what is left of a range must not take a large page.
_LITTLE_BYTES: Final = 2**16
_LOCAL: Final = threading.local()


class OutputFile:
    """A new file of known size; `pwrite` from any thread."""

    def __init__(
        self,
        path: Path,
        byte_count: int,
        *,
        preallocates: bool = True,
        is_direct: bool = False,
        turn: AbstractContextManager[object] | None = None,
        finished: Callable[[], object] | None = None,
    ) -> None:
        """Create the file and reserve its space.

        Args:
            path: where; must not exist.
            byte_count: final size in bytes.
            preallocates: whether space is taken at once, so that it cannot lack later and writing is faster.
            is_direct: whether whole pages go past the page cache, where the file system can: without it a merge pays
                for pages of memory that nobody reads, and for their way to the disk.
            turn: held by a thread while it waits for a direct write.
            finished: called by `finish` once the content is durable.

        Raises:
            OSError: it exists, or the disk is too small.
        """
        self.path = path
        self._lock = threading.Lock()
        # 0o666 less the umask: a checkpoint is no secret of its writer's
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = -1
        self._is_lost = False
        self._edges = PageEdges()
        self._turn = turn or nullcontext()
        self._finished = finished
        try:
            self._byte_count = byte_count
            self._reserve(byte_count, preallocates)
        except BaseException:
            os.close(self._descriptor)
            raise
        if is_direct and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # file systems without it
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_header(self, text: str) -> None:
        """Write a safetensors header at the start."""
        self.write_at(0, memoryview(encode_header(text)))

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Write all of `buffer` (bytes) from `offset` on."""
        if self._direct < 0:
            self._write_cached(offset, buffer)
            return
        for done, count, pages in self._placed_parts(offset, len(buffer)):
            place_in(pages, offset + done, count)[:] = buffer[done : done + count]
            self.write_placed(offset + done, count, pages)

    def write_placed(self, offset: int, byte_count: int, pages: memoryview) -> None:
        """Do the same with bytes that lie in pages of memory as they are to lie in pages of the file.

        Args:
            offset: where they are written.
            byte_count: how many they are.
            pages: whole pages; what else is in them is overwritten.
        """
        if self._direct < 0:
            self._write_cached(offset, place_in(pages, offset, byte_count))
            return
        start, end = self._edges.complete(offset, byte_count, pages)
        if start < end:
            first = offset // PAGE_BYTES * PAGE_BYTES
            self._write_direct(start, pages[start - first : end - first])
        if len(self._edges) > _MOST_EDGES:
            self._write_edges()

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Copy a byte range of another file.

        Where it lies alike in both files, whole pages go from the page cache to the disk. Else through a buffer that
        stays in the processor's cache: between two files on a local disk the kernel's own copy takes as long or
        longer, and unaligned ranges are never shared. `clone` is for what can be shared.
        """
        copied, step = 0, 1
        while step and copied < byte_count:
            part = min(BUFFER_BYTES, byte_count - copied)
            step = self._copy_pages(files, path, source_offset + copied, offset + copied, part)
            copied += step
        for done, count, pages in self._placed_parts(offset + copied, byte_count - copied):
            place = place_in(pages, offset + copied + done, count)
            files.read_into(path, source_offset + copied + done, place)
            self.write_placed(offset + copied + done, count, pages)

    def _copy_pages(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> int:
        """Write the first part of a range straight from the source's cached pages; return how long it was.

        The pages are mapped, but no program looks at them: where the file has become shorter, the kernel's answer is
        an error, not the signal that would end the process.
        """
        head = -offset % PAGE_BYTES
        count = (byte_count - head) // PAGE_BYTES * PAGE_BYTES
        if self._direct < 0 or count <= 0 or (source_offset - offset) % PAGE_BYTES:
            return 0
        start = source_offset + head
        at = start % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(files.descriptor(path), at + count, mmap.MAP_SHARED, mmap.PROT_READ, offset=start - at)
            with pages, memoryview(pages) as view, view[at:] as whole, self._turn, self._named(offset + head):
                written = os.pwrite(self._direct, whole, offset + head)
            if os.fstat(files.descriptor(path)).st_size < start + count:  # of a page beyond it, zeros are mapped
                return 0
        except (OSError, ValueError) as error:  # mapping is not possible, or the file has become shorter: reading tells
            if isinstance(error, OSError) and error.errno not in _NO_MAPPED_WRITE:
                raise
            return 0
        edge = memoryview(bytearray(head))
        files.read_into(path, source_offset, edge)
        self._edges.put(offset, edge)
        return head + written // PAGE_BYTES * PAGE_BYTES

    def _placed_parts(self, offset: int, byte_count: int) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (how far, bytes of the next part, pages of memory for it), cut at pages of the file."""
        memory = _copy_buffer() if byte_count >= _LITTLE_BYTES else anonymous_memory(byte_count + 2 * PAGE_BYTES)
        for done, count in cut_at_pages(offset, byte_count, BUFFER_BYTES):
            yield done, count, memory

    def _write_direct(self, offset: int, buffer: memoryview) -> None:
        """Write whole pages past the page cache; what the system leaves goes through it."""
        try:
            with self._turn, self._named(offset):
                written = os.pwrite(self._direct, buffer, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            written = 0  # pages here are larger than ours, or memory must lie otherwise
        if written < len(buffer):
            self._write_cached(offset + written, buffer[written:])

    def _write_cached(self, offset: int, buffer: memoryview) -> None:
        written = 0
        while written < len(buffer):
            chunk = buffer[written : written + CHUNK_BYTES]
            with self._named(offset + written):
                count = os.pwrite(self._descriptor, chunk, offset + written)
                if not count:  # else this would go on for ever
                    raise OSError(errno.EIO, "the system took no byte and gave no reason")
            written += count

    def _write_edges(self) -> None:
        for offset, part in self._edges.take():
            self._write_cached(offset, memoryview(part))

    def clone(self, files: OpenFiles, path: str) -> bool:
        """Make the file share all of another's blocks, of which each is copied only once it is written to.

        Returns:
            Whether the file system can, and the source is long enough; if not, everything has to be written.
        """
        if sys.platform == "win32":
            return False
        try:
            # ioctl_ficlone(2): XFS, Btrfs, bcachefs, OCFS2, NFS 4.2; both files on one file system
            fcntl.ioctl(self._descriptor, _FICLONE, files.descriptor(path))
            byte_count = os.fstat(files.descriptor(path)).st_size
        except OSError:
            return False
        if byte_count < self._byte_count:  # it has become shorter, and zeros stand for the rest: copying will tell
            return False
        os.ftruncate(self._descriptor, self._byte_count)  # the source may be the longer one
        return True

    def flush(self) -> None:
        """Wait until what is written is on the disk, and give up its pages; nothing where the file is closed."""
        with self._lock:  # the file may be finished, and its number another's, by now
            if self._descriptor >= 0:
                self._sync(getattr(os, "fdatasync", os.fsync))
                self._give_up_pages()

    def finish(self, *, gives_up_pages: bool = False) -> None:
        """Make the content durable and close the file.

        Args:
            gives_up_pages: whether the system need not keep the content in memory.
        """
        self._write_edges()
        with self._lock:  # else of two syncs at a time, only the other might be told of an error
            self._sync(os.fsync)
        if gives_up_pages:
            self._give_up_pages()
        self.close()
        if self._finished:
            self._finished()

    def close(self) -> None:
        """Close the file; safe to call again."""
        with self._lock:
            if self._descriptor >= 0:
                descriptors = [self._descriptor, self._direct]
                self._descriptor = self._direct = -1
                for descriptor in descriptors:
                    if descriptor >= 0:
                        os.close(descriptor)

    def _named(self, offset: int) -> AbstractContextManager[None]:
        return named_errors(self.path, "writing", offset)

    def _sync(self, call: Callable[[int], None]) -> None:
        """Wait for the disk; once that has failed, never again.

        The system tells of pages that it could not write once, and then counts them as written: fsync(2).
        """
        if self._is_lost:
            raise OSError(errno.EIO, "not all that was written has reached the disk (syncing)", str(self.path))
        self._is_lost = True
        with named_errors(self.path, "syncing"):
            call(self._descriptor)
        self._is_lost = False

    def _give_up_pages(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # dirty ones stay

    def _reserve(self, byte_count: int, preallocates: bool) -> None:
        if byte_count == 0:
            return
        if preallocates and hasattr(os, "posix_fallocate"):
            try:
                with named_errors(self.path, f"allocating {byte_count} bytes"):
                    os.posix_fallocate(self._descriptor, 0, byte_count)
            except OSError as error:
                if error.errno not in _NO_PREALLOCATION:
                    raise
            else:
                return
        with named_errors(self.path, f"allocating {byte_count} bytes"):
            os.ftruncate(self._descriptor, byte_count)


def _copy_buffer() -> memoryview:
    """Return the calling thread's buffer."""
    if not hasattr(_LOCAL, "buffer"):
        _LOCAL.buffer = large_memory(BUFFER_BYTES)
    buffer: memoryview = _LOCAL.buffer
    return buffer
