"""The pickle inside a file of `torch.save`: which tensors it lists and where their storages are, with nothing run.

Unpickling calls what a file names. Here nothing is imported, called or built: a machine of the few opcodes and names
that a table of tensors needs notes what torch would make of them, and everything else is refused.

Source: torch 2.13 `serialization.py` (`_save`: persistent ids, storage types), `_utils.py` (`_rebuild_tensor_v2`,
`_rebuild_parameter`), `_weights_only_unpickler.py` (the same opcodes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from rawmerge.errors import AdapterError, Problem, quote
from rawmerge.formats.shard_header import MAX_NAME_CHARACTERS

#: Longest pickle that is read; one of ten thousand tensors takes some two megabytes.
MAX_PICKLE_BYTES: Final = 8 * 2**20
#: torch's pickles hold batches of 1000 pairs.
_MAX_STACK: Final = 20_000
_MAX_DIMENSIONS: Final = 64
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
}
_DICT: Final = "collections OrderedDict"
_TENSOR: Final = "torch._utils _rebuild_tensor_v2"
_PARAMETER: Final = "torch._utils _rebuild_parameter"
_KNOWN: Final = frozenset({*_STORAGE_DTYPES, _DICT, _TENSOR, _PARAMETER})
_SAVE_AGAIN: Final = "load it with PEFT where you trust it, and save it with safe_serialization=True"


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


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as a pickle describes it: contiguous, and within its storage.

    Attributes:
        storage: where its elements are.
        first: which of them is its first.
        shape: dimensions, outermost first.
    """

    storage: Storage
    first: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that unpickling would import; here it stays a name."""

    name: str


class _Mark:
    """Where a batch begins on the stack."""


_MARK: Final = _Mark()
#: Opcodes that push their argument, a constant, or a tuple of what they pop.
_VALUES: Final = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def parse_tensor_pickle(raw: bytes, path: str) -> dict[str, PickledTensor]:
    """Return the tensors of a flat table, name to description.

    Args:
        raw: the pickle.
        path: the file it comes from, for messages.

    Raises:
        AdapterError: it holds, or asks for, anything but tensors; or it is damaged.
    """
    if len(raw) > MAX_PICKLE_BYTES:
        raise _refused(path, f"a pickle of at most {MAX_PICKLE_BYTES} bytes", f"{len(raw)} bytes")
    try:
        table = _Machine(path).run(raw)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # what a damaged pickle leads to
        raise _refused(path, "a pickle that torch.save wrote", f"a damaged one ({type(error).__name__})") from error
    if not isinstance(table, dict):
        raise _refused(path, "a table of tensors", _kind_of(table))
    for name, value in table.items():
        if not isinstance(value, PickledTensor):
            raise _refused(f"{path}: {name}", "a tensor", _kind_of(value))
    return table


class _Machine:
    """Goes through a pickle's opcodes; its stack holds plain values and descriptions."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._calls: dict[str, Callable[[Any], Any]] = {
            _DICT: self._make_dict,
            _TENSOR: self._make_tensor,
            _PARAMETER: self._make_parameter,
        }
        self._operations: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "TUPLE": lambda _: self._stack.append(tuple(self._pop_to_mark())),
            "GLOBAL": self._global,
            "BINPERSID": lambda _: self._storage(*self._pop(1)),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "BUILD": lambda _: self._build(*self._pop(2)),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_to_mark()),
        }

    def run(self, raw: bytes) -> Any:
        """Return what the pickle stands for."""
        import pickletools  # most adapters are safetensors files

        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
            if len(self._stack) > _MAX_STACK:
                raise self._refuse("batches of 1000 entries", "one of very many")
        (result,) = self._stack
        return result

    def _step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            self._stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in self._operations:
            self._operations[name](argument)
        else:
            raise self._refuse("opcodes that a table of tensors needs", name)

    def _put(self, place: Any) -> None:
        self._memo[place] = self._stack[-1]

    def _get(self, place: Any) -> None:
        self._stack.append(self._memo[place])

    def _append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("not a list")
        self._stack[-1].extend(values)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("stack underflow")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        place = max(index for index, value in enumerate(self._stack) if value is _MARK)
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _set_items(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if not isinstance(table, dict) or len(items) % 2:
            raise TypeError("not a table")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):  # as keys, other values take time, or the process, to hash
                raise self._refuse("names that are text", _kind_of(name))
            if len(name) > MAX_NAME_CHARACTERS:
                raise self._refuse(f"names of at most {MAX_NAME_CHARACTERS} characters", f"one of {len(name)}")
            if isinstance(table.get(name), PickledTensor):
                raise self._refuse("each tensor once", f"{quote(name)} twice")
            table[name] = value

    def _global(self, name: str) -> None:
        if name not in _KNOWN:
            found = f"{quote(name.replace(' ', '.'))}, which unpickling would import and may call; nothing was run"
            raise self._refuse("a pickle of tensors alone", found)
        self._stack.append(_Global(name))

    def _storage(self, reference: Any) -> None:
        kind, type_, key, device, count = reference
        are_texts = isinstance(key, str) and isinstance(device, str)
        if kind != "storage" or not isinstance(type_, _Global) or not are_texts or not _is_size(count):
            raise TypeError("not a storage")
        self._stack.append(Storage(key, _STORAGE_DTYPES[type_.name], count))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("not a call")
        self._stack.append(self._calls[function.name](arguments))

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
        if not isinstance(storage, Storage) or not _is_size(first) or not _is_shape(shape) or not _is_shape(strides):
            raise TypeError("not a tensor")
        if metadata not in ([], [None], [{}]):  # such as that the values are the negatives of those that are stored
            raise self._refuse("tensors that are what is stored", "one with more to know of it")
        count = 1
        expected = []
        for size in reversed(shape):
            expected.append(count)
            count *= size
        pairs = zip(shape, strides, reversed(expected), strict=True)
        if count and any(size > 1 and stride != want for size, stride, want in pairs):
            hint = f"of shape {list(shape)} and strides {list(strides)}"
            raise _refused(self._subject(), "tensors whose elements lie one after another", f"one {hint}")
        if first + count > storage.element_count:
            raise self._refuse(f"a tensor within its storage of {storage.element_count} elements", "one that is larger")
        return PickledTensor(storage, first, shape)

    def _build(self, target: Any, _: Any) -> None:
        """Leave a state dict's `_metadata` aside; nothing else has a state."""
        if not isinstance(target, dict):
            raise TypeError("not a table")
        self._stack.append(target)

    def _subject(self) -> str:
        """Return the file and the name of the tensor in work: of a pair, the name is on the stack before the value."""
        name = next((value for value in reversed(self._stack) if isinstance(value, str)), "")
        return f"{self._path}: {name}" if name else self._path

    def _refuse(self, expected: str, found: str) -> AdapterError:
        return _refused(self._path, expected, found)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_DIMENSIONS and all(map(_is_size, value))


def _kind_of(value: object) -> str:
    names: Iterable[tuple[type, str]] = (
        (PickledTensor, "a tensor"),
        (dict, "a table"),
        (list, "a list"),
        (tuple, "a tuple"),
        (str, "text"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__.strip("_"))


def _refused(subject: str, expected: str, found: str) -> AdapterError:
    return AdapterError(Problem(subject, expected, found, _SAVE_AGAIN))
