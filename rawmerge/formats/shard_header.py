"""The header of one safetensors file: bytes to `ShardHeader` and back, with every rule of the format checked.

Source: safetensors 0.8, README section "Format" and `Metadata::validate` in `safetensors/src/tensor.rs`. Stricter
than it: duplicate keys, unknown fields of a tensor's entry, more than 64 dimensions, sizes past 2**63 and names of more
than 4096 characters are refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import PurePath
from typing import Any, Final

from rawmerge.dtypes import DTYPES, StorageDtype
from rawmerge.errors import Problem, ShardFormatError, quote
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

LENGTH_PREFIX: Final = struct.Struct("<Q")
MAX_HEADER_BYTES: Final = 100_000_000
MAX_RANK: Final = 64
#: Of a tensor's name: looking for its module takes a time that grows faster than its length.
MAX_NAME_CHARACTERS: Final = 4096
ALIGNMENT: Final = 8
_ENDING: Final = ".safetensors"
_METADATA: Final = "__metadata__"
_ENTRY_FIELDS: Final = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a header lists it.

    Attributes:
        name: the full key.
        dtype: storage dtype code, a key of `rawmerge.dtypes.DTYPES`.
        shape: dimensions, outermost first; `()` for a scalar.
        start: first byte, relative to the end of the header.
        end: last byte, exclusive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def byte_count(self) -> int:
        """Size on disk in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A checked header.

    Attributes:
        text: the JSON exactly as it stands in the file, padding included.
        entries: all tensors in the order of their bytes.
        metadata: the `__metadata__` table, or None where the file has none.
    """

    text: str
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str] | None

    @property
    def data_start(self) -> int:
        """Offset in the file of the first tensor byte."""
        return LENGTH_PREFIX.size + len(self.text.encode())

    @property
    def digest(self) -> str:
        """SHA-256 of the header text: names, dtypes, shapes and places of all tensors."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def parse_header_length(prefix: bytes, file_size: int, path: str) -> int:
    """Return the header's length in bytes from the first eight bytes of a file of `file_size` bytes.

    Raises:
        ShardFormatError: the file is too short, or the length is beyond the file or the format's limit.
    """
    if len(prefix) < LENGTH_PREFIX.size:
        raise _no_shard(path) or _broken(path, "a safetensors file of at least 8 bytes", f"{len(prefix)} bytes")
    length: int = LENGTH_PREFIX.unpack(prefix)[0]
    limit = min(MAX_HEADER_BYTES, file_size - LENGTH_PREFIX.size)
    if length > limit:
        raise _no_shard(path) or _broken(path, f"a header of at most {limit} bytes", f"a header length of {length}")
    return length


def parse_shard_header(raw: bytes, data_bytes: int, path: str) -> ShardHeader:
    """Return the checked header.

    Args:
        raw: the header's JSON bytes, without the length prefix.
        data_bytes: how many bytes follow the header in the file.
        path: the file's name for messages.

    Raises:
        ShardFormatError: any rule of the format is broken.
    """
    try:
        document = parse_json_object(raw)
    except StrictJsonError as error:
        raise _broken(path, "a header of strict JSON", str(error)) from error
    metadata = _parse_metadata(document.pop(_METADATA, None), path)
    entries = [_parse_entry(name, fields, path) for name, fields in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_contiguous(entries, data_bytes, path)
    return ShardHeader(text=raw.decode(), entries=tuple(entries), metadata=metadata)


def format_shard_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None) -> str:
    """Return header text for `entries`, padded so that the data starts at a multiple of eight bytes."""
    document: dict[str, Any] = {} if metadata is None else {_METADATA: dict(sorted(metadata.items()))}
    for entry in entries:
        offsets = [entry.start, entry.end]
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % ALIGNMENT)


def encode_header(text: str) -> bytes:
    """Return the first bytes of a safetensors file with this header text: length prefix and JSON."""
    raw = text.encode()
    return LENGTH_PREFIX.pack(len(raw)) + raw


def _no_shard(path: str) -> ShardFormatError | None:
    """Return the error of a file that its name makes no shard either; None for one that is damaged."""
    ending = PurePath(path).suffix.lower()
    if ending == _ENDING:
        return None
    is_yaml = ending in {".yaml", ".yml"}
    hint = (
        "a merge file is for `rawmerge export`" if is_yaml else "name a folder, or a file of safetensors or torch.save"
    )
    return ShardFormatError(Problem(path, "a safetensors file", "no safetensors file", hint))


def _broken(path: str, expected: str, found: str) -> ShardFormatError:
    hint = "the file is damaged or incomplete; fetch it again"
    return ShardFormatError(Problem(subject=path, expected=expected, found=found, hint=hint))


def _parse_metadata(value: object, path: str) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _broken(path, "__metadata__ to map strings to strings", type(value).__name__)
    return value


def _parse_entry(name: str, fields: object, path: str) -> TensorEntry:
    if len(name) > MAX_NAME_CHARACTERS:
        raise _broken(path, f"names of at most {MAX_NAME_CHARACTERS} characters", f"one of {len(name)}: {quote(name)}")
    if not isinstance(fields, dict) or set(fields) != _ENTRY_FIELDS:
        raise _broken(path, f"tensor {quote(name)} to have dtype, shape and data_offsets", _field_names(fields))
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"tensor {quote(name)} to have a safetensors dtype", repr(dtype)[:80])
    shape = _parse_sizes(fields["shape"], f"shape of {quote(name)}", path)
    if len(shape) > MAX_RANK:
        raise _broken(path, f"{quote(name)} to have at most {MAX_RANK} dimensions", str(len(shape)))
    offsets = _parse_sizes(fields["data_offsets"], f"data_offsets of {quote(name)}", path)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"data_offsets of {quote(name)} to be [start, end]", str(list(offsets))[:80])
    entry = TensorEntry(name, dtype, shape, offsets[0], offsets[1])
    _check_size(entry, DTYPES[dtype], path)
    return entry


def _field_names(fields: object) -> str:
    return str(sorted(fields))[:120] if isinstance(fields, dict) else type(fields).__name__


def _parse_sizes(value: object, what: str, path: str) -> tuple[int, ...]:
    # type() and not isinstance(): JSON's true is an int in Python
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise _broken(path, f"{what} to be a list of sizes", repr(value)[:80])
    return tuple(value)


def _check_size(entry: TensorEntry, dtype: StorageDtype, path: str) -> None:
    if prod(size for size in entry.shape if size) >= 2**63:  # a dimension of 0 does not excuse the others
        raise _broken(path, f"{quote(entry.name)} to have a countable shape", str(list(entry.shape))[:80])
    needed = dtype.byte_count(prod(entry.shape))
    if entry.byte_count != needed:
        described = f"{needed} bytes for {dtype.code} {list(entry.shape)}" if needed >= 0 else "whole bytes"
        raise _broken(path, f"{quote(entry.name)} to take {described}", f"{entry.byte_count} bytes")


def _check_contiguous(entries: Iterable[TensorEntry], data_bytes: int, path: str) -> None:
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "a hole" if entry.start > position else "an overlap"
            raise _broken(path, f"{quote(entry.name)} to start at byte {position}", f"{kind}: {entry.start}")
        position = entry.end
    if position != data_bytes:
        raise _broken(path, f"{position} bytes of tensors after the header", f"{data_bytes} bytes")
