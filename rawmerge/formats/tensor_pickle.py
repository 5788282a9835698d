"""The pickle inside a file of `torch.save`: which tensors it lists and where their storages are, with nothing run.

The machine of `pickle_machine.py` goes through the pickle; here is what torch would make of the few names, calls and
references that a table of tensors needs. Everything else is refused.

Source: torch 2.13 `serialization.py` (`_save`: persistent ids, storage types), `_utils.py` (`_rebuild_tensor_v2`,
`_rebuild_tensor_v3`, `_rebuild_parameter`), `storage.py` (`_new_dtypes`: those of `_rebuild_tensor_v3`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import AdapterError
from rawmerge.formats.pickle_machine import Global, PickleMachine, kind_of, refused

#: Longest pickle that is read; one of ten thousand tensors takes some two megabytes.
MAX_PICKLE_BYTES: Final = 8 * 2**20
_MAX_DIMENSIONS: Final = 64
#: Types of storages by the dtype of their elements; where they are plain bytes, each tensor says its own.
_STORAGE_DTYPES: Final = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
    "torch ComplexFloatStorage": "C64",
    "torch.storage UntypedStorage": "U8",
}
#: Dtypes newer than types of storages.
_DTYPES: Final = {
    "torch float8_e4m3fn": "F8_E4M3",
    "torch float8_e5m2": "F8_E5M2",
    "torch float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch float8_e8m0fnu": "F8_E8M0",
    "torch uint16": "U16",
    "torch uint32": "U32",
    "torch uint64": "U64",
}
#: Dtypes that safetensors has no code for, or another packing of.
_NOT_STORED: Final = {
    "torch ComplexDoubleStorage": "complex128",
    **{
        f"torch {name}": name
        for name in ("complex32", "float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16")
    },
}
_DICT: Final = "collections OrderedDict"
_TENSOR: Final = "torch._utils _rebuild_tensor_v2"
_TENSOR_OF_DTYPE: Final = "torch._utils _rebuild_tensor_v3"
_PARAMETER: Final = "torch._utils _rebuild_parameter"
_CALLS: Final = frozenset({_DICT, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER})
_NAMES: Final = frozenset({*_STORAGE_DTYPES, *_DTYPES, *_NOT_STORED, *_CALLS})
_CONVERT: Final = "load it where you trust it, turn that tensor into another dtype, such as float32, and save it again"


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as a pickle refers to it.

    Attributes:
        key: its name in the archive.
        dtype: storage dtype code.
        element_count: how many elements.
    """

    key: str
    dtype: str
    element_count: int

    @property
    def byte_count(self) -> int:
        """How many bytes it takes."""
        return self.element_count * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it: contiguous, and within its storage.

    Attributes:
        storage: where its elements are.
        dtype: storage dtype code of its elements.
        first: which of them is its first, from the start of the storage.
        shape: dimensions, outermost first.
    """

    storage: Storage
    dtype: str
    first: int
    shape: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Its first byte, from the start of the storage."""
        return self.first * self._width

    @property
    def byte_count(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self._width

    @property
    def _width(self) -> int:
        return DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class _Unstored:
    """A storage of a dtype that safetensors does not have.

    Attributes:
        dtype: torch's name of it.
    """

    dtype: str


def parse_tensor_pickle(raw: bytes, path: str) -> dict[str, PickledTensor]:
    """Return the tensors of a flat table, name to description.

    Args:
        raw: the pickle.
        path: the file it comes from, for messages.

    Raises:
        AdapterError: it holds, or asks for, anything but tensors; or it is damaged.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise refused(path, f"a pickle of at most {MAX_PICKLE_BYTES} bytes", f"{len(raw)} bytes")
    machine = PickleMachine(path)
    try:
        table = machine.run(raw, _TensorMeanings(machine))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # what a damaged pickle leads to
        raise refused(path, "a pickle that torch.save wrote", f"a damaged one ({type(error).__name__})") from error
    if not isinstance(table, dict):
        raise refused(path, "a table of tensors", _kind_of(table))
    for name, value in table.items():
        if not isinstance(value, PickledTensor):
            raise refused(f"{path}: {name}", "a tensor", _kind_of(value))
    return table


class _TensorMeanings:
    """What torch would make of the names, calls and references of a table of tensors."""

    names = _NAMES

    def __init__(self, machine: PickleMachine) -> None:
        self._machine = machine
        self.calls: dict[str, Callable[[tuple[Any, ...]], Any]] = {
            _DICT: self._make_dict,
            _TENSOR: self._make_tensor,
            _TENSOR_OF_DTYPE: self._make_tensor_of_dtype,
            _PARAMETER: self._make_parameter,
        }

    def reference(self, reference: Any) -> Storage | _Unstored:
        """Return the storage that a persistent id stands for."""
        kind, type_, key, device, count = reference
        are_texts = isinstance(key, str) and isinstance(device, str)
        if kind != "storage" or not isinstance(type_, Global) or not are_texts or not _is_size(count):
            raise TypeError("not a storage")
        if type_.name in _NOT_STORED:
            return _Unstored(_NOT_STORED[type_.name])
        return Storage(key, _STORAGE_DTYPES[type_.name], count)

    def _make_dict(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if arguments:
            raise TypeError("a table with arguments")
        return {}

    def _make_parameter(self, arguments: tuple[Any, ...]) -> PickledTensor:
        tensor, _, _ = arguments
        if not isinstance(tensor, PickledTensor):
            raise TypeError("not a tensor")
        return tensor

    def _make_tensor(self, arguments: tuple[Any, ...]) -> PickledTensor:
        storage, first, shape, strides, _, _, *metadata = arguments
        if isinstance(storage, _Unstored):
            raise self._refuse_dtype(storage.dtype)
        if not isinstance(storage, Storage):
            raise TypeError("not a storage")
        return self._described(storage, storage.dtype, (first, shape, strides), metadata)

    def _make_tensor_of_dtype(self, arguments: tuple[Any, ...]) -> PickledTensor:
        storage, first, shape, strides, _, _, dtype, *metadata = arguments
        if not isinstance(storage, Storage) or not isinstance(dtype, Global):
            raise TypeError("not a storage with a dtype")
        if dtype.name in _NOT_STORED:
            raise self._refuse_dtype(_NOT_STORED[dtype.name])
        return self._described(storage, _DTYPES[dtype.name], (first, shape, strides), metadata)

    def _described(
        self, storage: Storage, dtype: str, layout: tuple[Any, Any, Any], metadata: list[Any]
    ) -> PickledTensor:
        """Return the description, if the elements lie one after another within the storage."""
        first, shape, strides = layout
        if not _is_size(first) or not _is_shape(shape) or not _is_shape(strides):
            raise TypeError("not a tensor")
        if metadata not in ([], [None], [{}]):  # such as that the values are the negatives of those that are stored
            raise self._refuse("tensors that are what is stored", "one with more to know of it")
        if not _is_contiguous(shape, strides):
            found = f"one of shape {list(shape)} and strides {list(strides)}"
            raise self._refuse("tensors whose elements lie one after another", found)
        tensor = PickledTensor(storage, dtype, first, shape)
        if tensor.offset + tensor.byte_count > storage.byte_count:
            raise self._refuse(f"a tensor within its storage of {storage.byte_count} bytes", "one that is larger")
        return tensor

    def _refuse_dtype(self, dtype: str) -> AdapterError:
        found = f"one of torch.{dtype}, which rawmerge does not write"
        return refused(self._machine.subject(), "tensors of dtypes that safetensors has", found, _CONVERT)

    def _refuse(self, expected: str, found: str) -> AdapterError:
        return refused(self._machine.subject(), expected, found)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another, the last dimension's next to each other."""
    count = 1
    expected = []
    for size in reversed(shape):
        expected.append(count)
        count *= size
    pairs = zip(shape, strides, reversed(expected), strict=True)
    return not count or all(size <= 1 or stride == want for size, stride, want in pairs)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_DIMENSIONS and all(map(_is_size, value))


def _kind_of(value: object) -> str:
    return "a tensor" if isinstance(value, PickledTensor) else kind_of(value)
