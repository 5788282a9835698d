"""The pickle of a table of tensors as `torch.save` writes it, made from names, dtypes and shapes, without torch.

Each tensor has a storage of its own, whose key is its place in the table.

Source: torch 2.13 `serialization.py` (`_save`: persistent ids, protocol 2), `_tensor.py` (`_reduce_ex_internal`: which
dtypes go by `_rebuild_tensor_v2`, which by `_rebuild_tensor_v3`); the opcodes as in Python's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import Problem, quote
from rawmerge.formats.shard_header import TensorEntry
from rawmerge.formats.tensor_pickle import MAX_PICKLE_BYTES

#: Types of storages, by the dtype of their elements.
_STORAGES: Final = {
    "F64": "torch DoubleStorage",
    "F32": "torch FloatStorage",
    "F16": "torch HalfStorage",
    "BF16": "torch BFloat16Storage",
    "I64": "torch LongStorage",
    "I32": "torch IntStorage",
    "I16": "torch ShortStorage",
    "I8": "torch CharStorage",
    "U8": "torch ByteStorage",
    "BOOL": "torch BoolStorage",
    "C64": "torch ComplexFloatStorage",
}
#: Dtypes newer than types of storages: their storages are plain bytes.
_BARE_DTYPES: Final = {
    "F8_E4M3": "torch float8_e4m3fn",
    "F8_E5M2": "torch float8_e5m2",
    "F8_E4M3FNUZ": "torch float8_e4m3fnuz",
    "F8_E5M2FNUZ": "torch float8_e5m2fnuz",
    "F8_E8M0": "torch float8_e8m0fnu",
    "U16": "torch uint16",
    "U32": "torch uint32",
    "U64": "torch uint64",
}
_KNOWN: Final = _STORAGES.keys() | _BARE_DTYPES.keys()
#: What `torch.save` puts into one SETITEMS, as `pickle` does.
_BATCH: Final = 1000
_PROTOCOL: Final = b"\x80\x02"


def dtype_problems(entries: Iterable[TensorEntry]) -> Iterator[Problem]:
    """Yield which tensors torch has no dtype for.

    Args:
        entries: of any dtype of safetensors.
    """
    expected, hint = "a dtype that torch.save writes, for --format bin", "--format safetensors keeps it as it is"
    unknown = (entry for entry in entries if entry.dtype not in _KNOWN)
    yield from (Problem(entry.name, expected, quote(entry.dtype), hint) for entry in unknown)


def length_problems(name: str, table: bytes, count: int) -> Iterator[Problem]:
    """Yield whether a table of so many tensors is too long for us to read it again.

    Args:
        name: of the file.
        table: from `table_pickle`.
        count: how many tensors it lists.
    """
    if len(table) > MAX_PICKLE_BYTES:
        hint = "cut the output with --max-shard-size, or take --format safetensors"
        expected = f"a table of tensors of at most {MAX_PICKLE_BYTES} bytes, for --format bin"
        yield Problem(name, expected, f"{len(table)} bytes, for {count} tensors", hint)


def table_pickle(entries: Sequence[TensorEntry]) -> bytes:
    """Return the pickle of a `dict` of contiguous tensors on the CPU, in this order.

    Args:
        entries: names, dtypes that `dtype_problems` passes, and shapes; where they lie does not matter.
    """
    memo = _Memo()
    parts = [_PROTOCOL, b"}"]
    for start in range(0, len(entries), _BATCH):
        batch = enumerate(entries[start : start + _BATCH], start)
        parts.append(b"(" + b"".join(part for key, entry in batch for part in _item(str(key), entry, memo)) + b"u")
    return b"".join([*parts, b"."])


class _Memo:
    """What a pickle names more than once, written whole the first time."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def __call__(self, raw: bytes) -> bytes:
        """Return the opcodes that put there what `raw` makes."""
        if raw in self._numbers:
            return b"h" + bytes([self._numbers[raw]])
        number = self._numbers[raw] = len(self._numbers)  # of a few dozen at most
        return raw + b"q" + bytes([number])


def _item(key: str, entry: TensorEntry, memo: _Memo) -> Iterator[bytes]:
    """Yield the opcodes of a name and its tensor."""
    count, bare = prod(entry.shape), _BARE_DTYPES.get(entry.dtype)
    storage = _STORAGES.get(entry.dtype, "torch.storage UntypedStorage")
    size = count * (DTYPES[entry.dtype].bits // 8 if bare else 1)
    yield _text(entry.name)
    yield memo(_global(f"torch._utils _rebuild_tensor_v{3 if bare else 2}"))
    yield b"(("
    yield memo(_text("storage")) + memo(_global(storage)) + _text(key) + memo(_text("cpu")) + _number(size)
    yield b"tQ" + _number(0) + _numbers(entry.shape) + _numbers(_strides(entry.shape))
    yield b"\x89" + memo(_global("collections OrderedDict")) + b")R"  # needs no gradient, has no hooks
    yield (memo(_global(bare)) if bare else b"") + b"tR"


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return torch's strides, in elements; those of an empty dimension count as one element does."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _numbers(values: Sequence[int]) -> bytes:
    if len(values) > 3:
        return b"(" + b"".join(map(_number, values)) + b"t"
    return b"".join(map(_number, values)) + (b")", b"\x85", b"\x86", b"\x87")[len(values)]


def _number(value: int) -> bytes:
    """Return a number from 0 in the shortest form."""
    if value < 2**16:
        return b"K" + bytes([value]) if value < 2**8 else b"M" + struct.pack("<H", value)
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
