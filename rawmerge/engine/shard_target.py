"""Where the engine puts the bytes of a shard."""

from __future__ import annotations

from typing import Protocol

from rawmerge.inputs.tensor_source import OpenFiles


class ShardTarget(Protocol):
    """What takes the bytes of a shard, from any thread and in any order: a file, or what compares them with one."""

    def write_header(self, text: str) -> None:
        """Take the header, which comes first."""

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Take bytes from `offset` on."""

    def write_placed(self, offset: int, byte_count: int, pages: memoryview) -> None:
        """Take bytes that lie in pages of memory as they are to lie in pages of the shard."""

    def copy_from(self, files: OpenFiles, path: str, source_offset: int, offset: int, byte_count: int) -> None:
        """Take a byte range of another file."""

    def clone(self, files: OpenFiles, path: str, /) -> bool:
        """Take all of another file at once; return whether that was possible."""

    def flush(self) -> None:
        """Make durable what was taken."""

    def finish(self, *, gives_up_pages: bool = False) -> None:
        """Make all of it durable, and close."""

    def close(self) -> None:
        """Close; safe to call again."""
