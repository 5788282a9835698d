"""Where everything lies in a file of `torch.save` that holds given tensors: known before any of their bytes.

A zip whose members are stored as they are, each at a multiple of 64 bytes. What the checksums of members decide, their
headers and the list at the end, is written when the tensors are there. The members with which torch tells that places
may be computed (`.format_version`) are left out: ours are at others, for their sizes stand before them.

Source: torch 2.13 `serialization.py` `_save`, `caffe2/serialize/inline_container.cc` (members, alignment by a field
`FB`); the zip format as in APPNOTE 6.3, with sizes and places of 64 bits where 32 do not hold them.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from rawmerge.formats.shard_header import TensorEntry
from rawmerge.formats.table_pickle import table_pickle

_LOCAL: Final = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL: Final = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END: Final = struct.Struct("<4sHHHHIIH")
_END_64: Final = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR: Final = struct.Struct("<4sIQI")
_FIELD: Final = struct.Struct("<HH")
#: Bytes at whose multiples members begin.
_ALIGNMENT: Final = 64
#: Numbers from here on need 64 bits; and so does a list of so many members.
_LARGE: Final = 0xFFFFFFFF
_MANY: Final = 0xFFFF
_FIELD_64: Final = 1
_PADDING: Final = 0x4246
_UTF8: Final = 1 << 11
#: The first day that a zip can name: the time is no part of what was merged.
_DATE: Final = 1 << 5 | 1
#: Versions of the format that a reader needs: the usual, and the one with numbers of 64 bits.
_VERSION, _VERSION_64 = 20, 45
_ROOT: Final = "archive"


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the archive.

    Attributes:
        name: in the archive.
        offset: first byte of its header; start: of its content, both from the start of the file.
        byte_count: of its content.
        content: what it is, where no tensor.
    """

    name: str
    offset: int
    start: int
    byte_count: int
    content: bytes | None = None

    def header(self, checksum: int) -> bytes:
        """Return what stands before the content, up to it."""
        is_large = self.byte_count >= _LARGE
        size, raw = (_LARGE if is_large else self.byte_count), self.name.encode()
        extra = _field(_FIELD_64, struct.pack("<QQ", self.byte_count, self.byte_count)) if is_large else b""
        padding = self.start - self.offset - _LOCAL.size - len(raw) - len(extra) - _FIELD.size
        extra += _field(_PADDING, b"Z" * padding)
        version = _VERSION_64 if is_large else _VERSION
        fields = (version, _UTF8, 0, 0, _DATE, checksum, size, size, len(raw), len(extra))
        return _LOCAL.pack(b"PK\x03\x04", *fields) + raw + extra

    def listing(self, checksum: int) -> bytes:
        """Return what the list at the end says of it."""
        large = [number for number in (self.byte_count, self.offset) if number >= _LARGE]
        if self.byte_count >= _LARGE:  # as stored, and as it is
            large.insert(0, self.byte_count)
        extra = _field(_FIELD_64, struct.pack(f"<{len(large)}Q", *large)) if large else b""
        size, offset, raw = min(self.byte_count, _LARGE), min(self.offset, _LARGE), self.name.encode()
        version = _VERSION_64 if large else _VERSION
        lengths = (len(raw), len(extra), 0, 0, 0, 0)
        fields = (version, version, _UTF8, 0, 0, _DATE, checksum, size, size, *lengths, offset)
        return _CENTRAL.pack(b"PK\x01\x02", *fields) + raw + extra


@dataclass(frozen=True, slots=True)
class ArchiveLayout:
    """The places in a file; numbers alone, for tables may be large.

    Attributes:
        table: the pickle of the table of tensors.
        sizes: bytes of each tensor, in the order of the table.
        tensor_starts: first byte of each, from the start of the file.
        byte_count: of the whole file.
    """

    table: bytes
    sizes: array[int]
    tensor_starts: array[int]
    byte_count: int

    def frames(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes | bytearray]]:
        """Yield (offset, bytes) of all that is no tensor.

        Args:
            checksums: CRC-32 of each tensor, in the order of the table.
        """
        of_tensors = iter(checksums)
        listed, count, start = bytearray(), 0, 0
        for member in _members(self.table, self.sizes):
            checksum = next(of_tensors) if member.content is None else zlib.crc32(member.content)
            yield member.offset, member.header(checksum) + (member.content or b"")
            listed += member.listing(checksum)
            count, start = count + 1, member.start + member.byte_count
        yield start, listed
        yield start + len(listed), _end(len(listed), count, start)


def archive_layout(entries: Sequence[TensorEntry]) -> ArchiveLayout:
    """Return the layout of a file that holds a table of these tensors, in this order.

    Args:
        entries: names, dtypes and shapes, as `table_pickle` takes them.
    """
    table, sizes, starts = table_pickle(entries), array("Q", (entry.byte_count for entry in entries)), array("Q")
    listed = count = end = 0
    for member in _members(table, sizes):
        if member.content is None:
            starts.append(member.start)
        listed, count, end = listed + len(member.listing(0)), count + 1, member.start + member.byte_count
    return ArchiveLayout(table, sizes, starts, end + listed + len(_end(listed, count, end)))


def _members(table: bytes, sizes: Sequence[int]) -> Iterator[Member]:
    """Yield the members in the order of the file."""
    end = 0
    for name, size, content in _contents(table, sizes):
        path = f"{_ROOT}/{name}"
        large = _FIELD.size + 16 if size >= _LARGE else 0
        start = end + _LOCAL.size + len(path) + large + _FIELD.size
        start += -start % _ALIGNMENT
        yield Member(path, end, start, size, content)
        end = start + size


def _contents(table: bytes, sizes: Sequence[int]) -> Iterator[tuple[str, int, bytes | None]]:
    """Yield (name, bytes, content where it is no tensor) of each member."""
    yield "data.pkl", len(table), table
    yield "byteorder", 6, b"little"
    for key, size in enumerate(sizes):
        yield f"data/{key}", size, None
    yield "version", 2, b"3\n"


def _field(kind: int, raw: bytes) -> bytes:
    return _FIELD.pack(kind, len(raw)) + raw


def _end(size: int, count: int, start: int) -> bytes:
    """Return what follows the list of members, which takes `size` bytes from `start` on, to the end of the file."""
    end = b""
    if count >= _MANY or start + size >= _LARGE:
        fields = (_END_64.size - 12, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start)
        end = _END_64.pack(b"PK\x06\x06", *fields) + _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    count, size, start = min(count, _MANY), min(size, _LARGE), min(start, _LARGE)
    return end + _END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)
