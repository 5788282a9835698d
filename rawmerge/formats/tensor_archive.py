"""A file of `torch.save`: a zip whose members hold the storages as they are, so that each tensor has a place in it.

Source: torch 2.13 `serialization.py` `_save` and `caffe2/serialize/inline_container.cc` (members `data.pkl`,
`data/<key>`, `byteorder`; stored without compression); the zip format as in APPNOTE 6.3.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Final, cast

from rawmerge.errors import AdapterError, Problem
from rawmerge.formats.tensor_pickle import MAX_PICKLE_BYTES, PickledTensor, parse_tensor_pickle

#: The first bytes of every file that torch has saved since 1.6.
ZIP_MAGIC: Final = b"PK\x03\x04"
_LOCAL_HEADER: Final = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED: Final = 1
#: Most bytes of a zip's list of members that are read.
_MAX_DIRECTORY: Final = 64 * 2**20
_ORDER: Final = b"little"


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor's bytes in an archive.

    Attributes:
        name: the full key; dtype: storage dtype code; shape: dimensions, outermost first.
        offset: first byte, from the start of the file; byte_count: how many.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class TensorArchive:
    """What an archive holds.

    Attributes:
        tensors: in the order of the pickle.
        digest: SHA-256 of their names, dtypes, shapes and places.
    """

    tensors: tuple[ArchivedTensor, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int


class _OutsideError(OSError, zipfile.BadZipFile):
    """A place outside of the file: zipfile awaits the first where it only tries, and raises the second itself."""


class _Bounded:
    """A file of which no more than a bounded part is read at once, and nothing outside, whatever it says of itself."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int = -1) -> bytes:
        wanted = self._size - self._file.tell() if count is None or count < 0 else count
        if wanted > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("a list of members too long to be torch's")
        return self._file.read(wanted)

    def seek(self, offset: int, whence: int = 0) -> int:
        place = offset + (0, self._file.tell(), self._size)[whence]
        if not 0 <= place <= self._size:
            raise _OutsideError("a list of members that leads out of the file")
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def read_tensor_archive(file: BufferedReader, size: int, path: str) -> TensorArchive:
    """Return where each tensor lies; no tensor is read, and nothing of the pickle is run.

    Args:
        file: the open file.
        size: its length in bytes.
        path: its name, for messages.

    Raises:
        AdapterError: it is no archive of torch's, is compressed or damaged, or holds anything but tensors.
    """
    file.seek(0)
    if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
        hint = "torch before 1.6 wrote other files: load it with PEFT, and save it with safe_serialization=True"
        raise AdapterError(Problem(path, "a zip archive, as torch.save writes", "another format", hint))
    try:
        bounded = _Bounded(file, size)
        with zipfile.ZipFile(cast(IO[bytes], bounded)) as archive:
            members = _members(archive, bounded, path)
            root = _root(members, path)
            raw = archive.read(f"{root}/data.pkl")
            order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in members else _ORDER
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error, EOFError) as error:
        raise _broken(path, "a zip archive, as torch.save writes", f"a damaged one ({error})") from error
    if order != _ORDER:
        raise _broken(path, "values with the low byte first", "another order")
    pickled = parse_tensor_pickle(raw, path)
    tensors = tuple(_locate(name, tensor, members, root, path) for name, tensor in pickled.items())
    _check_disjoint(tensors, path)
    listed = [(at.name, at.dtype, at.shape, at.offset) for at in tensors]
    return TensorArchive(tensors, hashlib.sha256(json.dumps(listed).encode()).hexdigest())


def _members(archive: zipfile.ZipFile, file: _Bounded, path: str) -> dict[str, _Member]:
    """Return the members that lie in the file as they are, one after another."""
    members: dict[str, _Member] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        is_stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not is_stored or info.flag_bits & _ENCRYPTED:
            raise _broken(path, "members stored as they are", f"a compressed or encrypted one, {info.filename[:80]!a}")
        file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
        if header[0] != ZIP_MAGIC or header[3] != zipfile.ZIP_STORED or info.header_offset < end:
            raise _broken(path, "members one after another", "some that overlap or contradict the list of members")
        if info.filename in members:
            raise _broken(path, "each member once", f"{info.filename[:80]!a} twice")
        end = start + info.file_size
        members[info.filename] = _Member(start, info.file_size)
    if end > archive.start_dir:
        raise _broken(path, "members within the file", "one that goes on past its end")
    return members


def _root(members: Mapping[str, _Member], path: str) -> str:
    """Return the folder that everything in the archive is in."""
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0] or f"{roots[0]}/constants.pkl" in members:
        raise _broken(path, "a table of tensors, as torch.save writes", "another archive, such as a TorchScript module")
    if members[f"{roots[0]}/data.pkl"].size > MAX_PICKLE_BYTES:
        raise _broken(path, f"a pickle of at most {MAX_PICKLE_BYTES} bytes", "a larger one")
    order = members.get(f"{roots[0]}/byteorder")
    if order and order.size > len(_ORDER):  # it is read whole
        raise _broken(path, "values with the low byte first", "another order")
    return roots[0]


def _locate(name: str, tensor: PickledTensor, members: Mapping[str, _Member], root: str, path: str) -> ArchivedTensor:
    storage = tensor.storage
    member = members.get(f"{root}/data/{storage.key}")
    if member is None or member.size != storage.byte_count:
        found = "none" if member is None else f"{member.size} bytes"
        raise _broken(f"{path}: {name}", f"a storage of {storage.element_count} elements of {storage.dtype}", found)
    return ArchivedTensor(name, tensor.dtype, tensor.shape, member.offset + tensor.offset, tensor.byte_count)


def _check_disjoint(tensors: tuple[ArchivedTensor, ...], path: str) -> None:
    """Refuse tensors that share a part of their bytes; tied ones share them all."""
    end, last = 0, None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.byte_count)):
        extent = (tensor.offset, tensor.byte_count)
        if tensor.byte_count and tensor.offset < end and extent != last:
            raise _broken(f"{path}: {tensor.name}", "bytes of its own, or all of another's", "a part of another's")
        if tensor.byte_count:
            end, last = max(end, tensor.offset + tensor.byte_count), extent


def _broken(subject: str, expected: str, found: str) -> AdapterError:
    hint = "fetch the file again; or load it with PEFT where you trust it, and save it with safe_serialization=True"
    return AdapterError(Problem(subject, expected, found, hint))
