"""One output file while it is written: allocated first, header next, then ranges in any order, then fsync."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.formats.shard_header import encode_header
from rawmerge.tensor_source import CHUNK_BYTES, OpenFiles

#: What kernels and file systems answer when they cannot copy between two files themselves.
_NO_KERNEL_COPY: Final = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
    errno.ETXTBSY,
}


class OutputFile:
    """A new file of known size; `pwrite` from any thread."""

    def __init__(self, path: Path, byte_count: int) -> None:
        """Create the file and reserve its space.

        Args:
            path: where; must not exist.
            byte_count: final size in bytes.

        Raises:
            OSError: it exists, or the disk is too small.
        """
        self.path = path
        # 0o666 less the umask: a checkpoint is no secret of its writer's
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._reserve(byte_count)
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
        """Copy a byte range of another file, in the kernel where that is possible."""
        copied = self._kernel_copy(files.descriptor(path), source_offset, offset, byte_count)
        if copied == byte_count:
            return
        buffer = memoryview(bytearray(min(byte_count - copied, CHUNK_BYTES)))
        while copied < byte_count:
            chunk = buffer[: byte_count - copied]
            files.read_into(path, source_offset + copied, chunk)
            self.write_at(offset + copied, chunk)
            copied += len(chunk)

    def finish(self) -> None:
        """Make the content durable and close the file."""
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file; safe to call again."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _kernel_copy(self, source: int, source_offset: int, offset: int, byte_count: int) -> int:
        """Return how many bytes the kernel copied, fewer than asked where it stops."""
        copied = 0
        while hasattr(os, "copy_file_range") and copied < byte_count:
            try:
                count = os.copy_file_range(
                    source, self._descriptor, byte_count - copied, source_offset + copied, offset + copied
                )
            except OSError as error:
                if error.errno in _NO_KERNEL_COPY:
                    return copied
                raise
            if count == 0:  # the end of the source, or a file system that cannot; reading tells which
                return copied
            copied += count
        return copied

    def _reserve(self, byte_count: int) -> None:
        if byte_count == 0:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, byte_count)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
            else:
                return
        os.ftruncate(self._descriptor, byte_count)
