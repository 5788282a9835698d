"""Where one tensor's bytes lie, and how they are read: `pread` into a buffer of ours, never a memory map.

A mapped file that is truncated kills the process with SIGBUS and counts as resident memory; a short `pread` is an
ordinary error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from rawmerge.errors import InputChangedError, MissingFileError, Problem, quote
from rawmerge.file_errors import named_errors
from rawmerge.formats.shard_header import (
    LENGTH_PREFIX,
    ShardHeader,
    parse_header_length,
    parse_shard_header,
)

if TYPE_CHECKING:
    from rawmerge.formats.tensor_archive import TensorArchive

#: One system call's worth of bytes: large enough to be fast, small enough to stay in the processor's cache.
CHUNK_BYTES: Final = 4 * 2**20
#: What is in memory of a source that is gone through once, for a checksum or a comparison.
SCAN_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The bytes of one tensor in one file.

    Attributes:
        path: the file.
        offset: first byte, from the start of the file.
        byte_count: how many bytes.
        dtype: storage dtype code.
        shape: dimensions, outermost first.
    """

    path: str
    offset: int
    byte_count: int
    dtype: str
    shape: tuple[int, ...]

    def is_same_place(self, other: TensorSource) -> bool:
        """Whether both are the same bytes of one file, as tied tensors are in files of torch.save."""
        return (self.path, self.offset, self.byte_count) == (other.path, other.offset, other.byte_count)

    def rows(self, first: int, count: int) -> TensorSource:
        """Return some rows of a matrix, which lie together in the file."""
        row_bytes = self.byte_count // self.shape[0]
        shape = (count, *self.shape[1:])
        return TensorSource(self.path, self.offset + first * row_bytes, count * row_bytes, self.dtype, shape)


class TensorFile(Protocol):
    """A file of tensors, of whatever format."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def digest(self) -> str:
        """SHA-256 of its header: names, dtypes, shapes and places of all tensors."""

    def sources(self) -> Iterable[tuple[str, TensorSource]]:
        """Yield (tensor name, where it lies)."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file and its checked header.

    Attributes:
        path: the file.
        size: its length in bytes.
        header: what it holds.
    """

    path: Path
    size: int
    header: ShardHeader

    @property
    def digest(self) -> str:
        """SHA-256 of the header text."""
        return self.header.digest

    def sources(self) -> Iterable[tuple[str, TensorSource]]:
        """Yield (tensor name, where it lies) in file order."""
        start = self.header.data_start
        for entry in self.header.entries:
            source = TensorSource(str(self.path), start + entry.start, entry.byte_count, entry.dtype, entry.shape)
            yield entry.name, source


@dataclass(frozen=True, slots=True)
class PickleFile:
    """One file of `torch.save` and what its pickle lists, of which nothing was run.

    Attributes:
        path: the file.
        size: its length in bytes.
        archive: what it holds.
    """

    path: Path
    size: int
    archive: TensorArchive

    @property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and places of all tensors."""
        return self.archive.digest

    def sources(self) -> Iterable[tuple[str, TensorSource]]:
        """Yield (tensor name, where it lies) in the order of the pickle."""
        for at in self.archive.tensors:
            yield at.name, TensorSource(str(self.path), at.offset, at.byte_count, at.dtype, at.shape)


def read_small_file(path: Path, limit: int = 16 * 2**20) -> bytes:
    """Return a whole file of JSON, at most `limit` bytes.

    Raises:
        MissingFileError: it does not exist, is no regular file, or is larger than `limit`.
    """
    expected = f"a regular file of at most {limit} bytes"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise MissingFileError(Problem(str(path), expected, f"{status.st_size} bytes, or no regular file"))
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(Problem(str(path), expected, error.strerror or str(error))) from error


def read_shard_file(path: Path) -> ShardFile:
    """Return the file's checked header; no tensor is read.

    Raises:
        MissingFileError: it cannot be opened, or is no regular file.
        ShardFormatError: its header breaks the format.
    """
    with open_regular_file(path, "a readable safetensors file") as (descriptor, size):
        prefix = _read_range(descriptor, LENGTH_PREFIX.size, 0)
        length = parse_header_length(prefix, size, str(path))
        raw = _read_range(descriptor, length, LENGTH_PREFIX.size)
        data_bytes = size - LENGTH_PREFIX.size - length
        return ShardFile(path, size, parse_shard_header(raw, data_bytes, str(path)))


def _read_range(descriptor: int, byte_count: int, offset: int) -> bytes:
    """Return bytes from `offset` on, fewer where the file ends; one call may return less than there is."""
    parts = []
    while byte_count and (part := os.pread(descriptor, byte_count, offset)):
        parts.append(part)
        byte_count, offset = byte_count - len(part), offset + len(part)
    return b"".join(parts)


def read_pickle_file(path: Path) -> PickleFile:
    """Return what a file of `torch.save` lists; no tensor is read, and nothing is run.

    Raises:
        MissingFileError: it cannot be opened, or is no regular file.
        AdapterError: it holds, or asks for, anything but tensors stored as they are; or it is damaged.
    """
    with (
        open_regular_file(path, "a readable file of torch.save") as (descriptor, size),
        os.fdopen(descriptor, "rb", closefd=False) as file,
    ):
        from rawmerge.formats.tensor_archive import read_tensor_archive  # most adapters are none

        return PickleFile(path, size, read_tensor_archive(file, size, str(path)))


@contextmanager
def open_regular_file(path: Path, expected: str) -> Iterator[tuple[int, int]]:
    """Open a file to read; give its descriptor and its size in bytes.

    Raises:
        MissingFileError: it cannot be opened, or is no regular file.
    """
    try:
        # O_NONBLOCK: opening a named pipe must be refused below, not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        found = error.strerror or str(error)
        hint = "the checkpoint is incomplete; fetch it again" if isinstance(error, FileNotFoundError) else ""
        raise MissingFileError(Problem(str(path), expected, found, hint)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MissingFileError(Problem(str(path), "a regular file", "something else"))
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


class OpenFiles:
    """Read-only descriptors, opened at first use and shared by all threads (`pread` has no position)."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all; a file that is asked for again is opened again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def descriptor(self, path: str) -> int:
        """Return an open descriptor of `path`; the same one for every call."""
        known = self._descriptors.get(path)
        if known is not None:
            return known
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        kept = self._descriptors.setdefault(path, opened)
        if kept != opened:  # another thread opened it meanwhile
            os.close(opened)
        return kept

    def chunks(self, source: TensorSource) -> Iterator[memoryview]:
        """Yield the bytes of `source` in order, in a buffer of its own that each step reuses.

        Raises:
            InputChangedError: the file ends early.
        """
        buffer = memoryview(bytearray(min(SCAN_BYTES, source.byte_count)))
        for start in range(0, source.byte_count, SCAN_BYTES):
            chunk = buffer[: source.byte_count - start]
            self.read_into(source.path, source.offset + start, chunk)
            yield chunk

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset` on.

        Raises:
            InputChangedError: the file ends before the buffer is full.
        """
        descriptor = self.descriptor(path)
        filled = 0
        while filled < len(buffer):
            with named_errors(path, "reading", offset + filled):
                count = os.preadv(descriptor, [buffer[filled : filled + CHUNK_BYTES]], offset + filled)
            if count == 0:
                raise InputChangedError(
                    f"{quote(path)}: expected {len(buffer)} bytes at {offset}, the file ends after {filled}; "
                    "it was changed while it was read"
                )
            filled += count
