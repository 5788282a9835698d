"""One output file while it is written: allocated first, header next, then ranges in any order, then fsync."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.formats.shard_header import encode_header
from rawmerge.tensor_source import CHUNK_BYTES, OpenFiles

#: What file systems answer when they cannot allocate ahead.
_NO_PREALLOCATION: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
#: Linux, include/uapi/linux/fs.h: _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409
_PAGE_BYTES: Final = 4096
#: What is read and written at a time where bytes are only copied; a third of a processor core's cache or so.
_COPY_BYTES: Final = 2**20
_LOCAL: Final = threading.local()


class OutputFile:
    """A new file of known size; `pwrite` from any thread."""

    def __init__(self, path: Path, byte_count: int, *, preallocates: bool = True) -> None:
        """Create the file and reserve its space.

        Args:
            path: where; must not exist.
            byte_count: final size in bytes.
            preallocates: whether space is taken at once, so that it cannot lack later and writing is faster.

        Raises:
            OSError: it exists, or the disk is too small.
        """
        self.path = path
        self._lock = threading.Lock()
        # 0o666 less the umask: a checkpoint is no secret of its writer's
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._reserve(byte_count, preallocates)
        except BaseException:
            os.close(self._descriptor)
            raise

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
        written = 0
        while written < len(buffer):
            chunk = buffer[written : written + CHUNK_BYTES]
            written += os.pwrite(self._descriptor, chunk, offset + written)

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Copy a byte range of another file.

        Through a buffer that stays in the processor's cache: between two files on a local disk the kernel's own copy
        takes as long or longer, and unaligned ranges are never shared. `clone` is for what can be shared.
        """
        buffer = _copy_buffer()
        for done in range(0, byte_count, len(buffer)):
            chunk = buffer[: byte_count - done]
            files.read_into(path, source_offset + done, chunk)
            self.write_at(offset + done, chunk)

    def clone(self, files: OpenFiles, path: str) -> bool:
        """Make the file share all of another's blocks, of which each is copied only once it is written to.

        Returns:
            Whether the file system can; if not, the file is as it was.
        """
        try:
            import fcntl

            # ioctl_ficlone(2): XFS, Btrfs, bcachefs, OCFS2, NFS 4.2; both files on one file system
            fcntl.ioctl(self._descriptor, _FICLONE, files.descriptor(path))
        except (ImportError, OSError):
            return False
        return True

    def start_writing(self, offset: int, byte_count: int) -> None:
        """Let the disk begin with a range that is complete, without waiting; what is wrong is told by `finish`."""
        start = -(-offset // _PAGE_BYTES) * _PAGE_BYTES  # a page that another range shares waits for it
        count = (offset + byte_count) // _PAGE_BYTES * _PAGE_BYTES - start
        if count > 0 and hasattr(os, "posix_fadvise"):
            # Linux starts writing what it is told will not be needed, and drops it only where it is clean already
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Wait until what is written is on the disk, and give up its pages; nothing where the file is closed."""
        with self._lock:  # the file may be finished, and its number another's, by now
            if self._descriptor >= 0:
                os.fdatasync(self._descriptor) if hasattr(os, "fdatasync") else os.fsync(self._descriptor)
                self._give_up_pages()

    def finish(self, *, gives_up_pages: bool = False) -> None:
        """Make the content durable and close the file.

        Args:
            gives_up_pages: whether the system need not keep the content in memory.
        """
        os.fsync(self._descriptor)
        if gives_up_pages:
            self._give_up_pages()
        self.close()

    def close(self) -> None:
        """Close the file; safe to call again."""
        with self._lock:
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)

    def _give_up_pages(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # dirty ones stay

    def _reserve(self, byte_count: int, preallocates: bool) -> None:
        if byte_count == 0:
            return
        if preallocates and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, byte_count)
            except OSError as error:
                if error.errno not in _NO_PREALLOCATION:
                    raise
            else:
                return
        os.ftruncate(self._descriptor, byte_count)


def _copy_buffer() -> memoryview:
    """Return the calling thread's buffer."""
    if not hasattr(_LOCAL, "buffer"):
        _LOCAL.buffer = memoryview(mmap.mmap(-1, _COPY_BYTES))
    buffer: memoryview = _LOCAL.buffer
    return buffer
