"""A machine that goes through a pickle's opcodes and runs nothing of it.

Unpickling calls what a file names. Here nothing is imported, called or built: a machine of the few opcodes that a table
of tensors needs keeps what they push, gives names, calls and references to those who know what torch would make of
them, and refuses everything else.

Source: CPython 3.13 `pickletools.py` (opcodes, protocols 2 to 5); torch 2.13 `_weights_only_unpickler.py` (those of
protocol 2 that it reads). Those of protocols 4 and 5 are the ones that `torch.save(..., pickle_protocol=5)` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from rawmerge.errors import AdapterError, Problem, quote
from rawmerge.formats.shard_header import MAX_NAME_CHARACTERS

#: torch's pickles hold batches of 1000 pairs.
_MAX_STACK: Final = 20_000
#: Bytes of the opcode FRAME and its argument, which says how many bytes follow it.
_FRAME_BYTES: Final = 9
_SAVE_AGAIN: Final = "load it with PEFT where you trust it, and save it with safe_serialization=True"


@dataclass(frozen=True, slots=True)
class Global:
    """A name that unpickling would import; here it stays a name.

    Attributes:
        name: module and attribute, with a space between.
    """

    name: str


class Meanings(Protocol):
    """What names, calls and references stand for, as descriptions; made without running anything."""

    @property
    def names(self) -> frozenset[str]:
        """The names that may be imported; any other is refused."""

    @property
    def calls(self) -> Mapping[str, Callable[[tuple[Any, ...]], Any]]:
        """What a call of a name stands for, by the name; a KeyError means that it may not be called."""

    def reference(self, reference: Any) -> Any:
        """Return what a persistent id stands for."""


#: Opcodes that push their argument, or a constant, or a tuple of what they pop, and those that change nothing.
_VALUES: Final = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IDLE: Final = ("PROTO", "FRAME")


class PickleMachine:
    """Goes through a pickle's opcodes; its stack holds plain values and descriptions."""

    def __init__(self, path: str) -> None:
        """Make a machine with an empty stack; `path` is the pickle's file, for messages."""
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []  # how much of the stack lay below the batch that was open before, of each
        self._below = 0  # how much of it lies below the one that is open now
        self._memo: dict[int, Any] = {}
        self._meanings: Meanings
        push = self._stack.append
        self._operations: dict[str, Callable[[Any], Any]] = {
            **dict.fromkeys(_IDLE, lambda _: None),
            **dict.fromkeys(_VALUES, push),
            **{name: partial(self._push_made, made) for name, made in _CONSTANTS.items()},
            **{name: partial(self._push_tuple, count) for name, count in _TUPLES.items()},
            "MARK": lambda _: self._mark(),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "BINGET": self._get,
            "LONG_BINGET": self._get,
            "TUPLE": lambda _: push(tuple(self._pop_to_mark())),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda _: self._global(_joined(*self._pop(2))),
            "BINPERSID": lambda _: push(self._meanings.reference(*self._pop(1))),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "BUILD": lambda _: self._build(*self._pop(2)),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_to_mark()),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_to_mark()),
        }

    def run(self, raw: bytes, meanings: Meanings) -> Any:
        """Return what the pickle stands for.

        Raises:
            AdapterError: it asks for what is no table of tensors. ValueError, IndexError, KeyError, TypeError or
                OverflowError: it is damaged.
        """
        import pickletools  # most adapters are safetensors files

        self._meanings = meanings
        for opcode, argument, place in pickletools.genops(raw):
            if opcode.name == "STOP":
                break
            if opcode.name == "FRAME" and (place or 0) + _FRAME_BYTES + (argument or 0) > len(raw):
                raise ValueError("a frame that goes on past the end")
            if opcode.name not in self._operations:
                raise self._refuse("opcodes that a table of tensors needs", opcode.name)
            self._operations[opcode.name](argument)
            if len(self._stack) + len(self._marks) > _MAX_STACK:
                raise self._refuse("batches of 1000 entries", "one of very many")
        (result,) = self._stack
        if self._marks:
            raise ValueError("a batch without an end")
        return result

    def subject(self) -> str:
        """Return the file and the name of the tensor in work: of a pair, the name is on the stack before the value."""
        name = next((value for value in reversed(self._stack) if isinstance(value, str)), "")
        return f"{self._path}: {name}" if name else self._path

    def _push_made(self, made: Callable[[], Any], _: Any) -> None:
        self._stack.append(made())

    def _push_tuple(self, count: int, _: Any) -> None:
        self._stack.append(tuple(self._pop(count)))

    def _put(self, place: Any) -> None:
        self._memo[place] = self._top()

    def _get(self, place: Any) -> None:
        self._stack.append(self._memo[place])

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise TypeError("not a list")
        target.extend(values)

    def _top(self) -> Any:
        if len(self._stack) <= self._below:
            raise IndexError("stack underflow")
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        """Return the last values; none from below the batch that is open, as torch does."""
        place = len(self._stack) - count
        if place < self._below:
            raise IndexError("stack underflow")
        values = self._stack[place:]
        del self._stack[place:]
        return values

    def _mark(self) -> None:
        self._marks.append(self._below)
        self._below = len(self._stack)

    def _pop_to_mark(self) -> list[Any]:
        place, self._below = self._below, self._marks.pop()
        values = self._stack[place:]
        del self._stack[place:]
        return values

    def _set_items(self, items: list[Any]) -> None:
        table = self._top()
        if not isinstance(table, dict) or len(items) % 2:
            raise TypeError("not a table")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str):  # as keys, other values take time, or the process, to hash
                raise self._refuse("names that are text", kind_of(name))
            if len(name) > MAX_NAME_CHARACTERS:
                raise self._refuse(f"names of at most {MAX_NAME_CHARACTERS} characters", f"one of {len(name)}")
            if name in table:
                raise self._refuse("each name once", f"{quote(name)} twice")
            table[name] = value

    def _global(self, name: str) -> None:
        if name not in self._meanings.names:
            found = f"{quote(name.replace(' ', '.'))}, which unpickling would import and may call; nothing was run"
            raise self._refuse("a pickle of tensors alone", found)
        self._stack.append(Global(name))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError("not a call")
        self._stack.append(self._meanings.calls[function.name](arguments))

    def _build(self, target: Any, _: Any) -> None:
        """Leave a state dict's `_metadata` aside; nothing else has a state."""
        if not isinstance(target, dict):
            raise TypeError("not a table")
        self._stack.append(target)

    def _refuse(self, expected: str, found: str) -> AdapterError:
        return refused(self._path, expected, found)


def _joined(module: Any, name: Any) -> str:
    """Return a name as GLOBAL has it; no known one holds more than one space, so it is one way to say it."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("not a name")
    return f"{module} {name}"


def kind_of(value: object) -> str:
    """Return what a plain value is, in plain words."""
    names = ((dict, "a table"), (list, "a list"), (tuple, "a tuple"), (str, "text"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__.strip("_"))


def refused(subject: str, expected: str, found: str, hint: str = _SAVE_AGAIN) -> AdapterError:
    """Return the refusal of a pickle, with the way out."""
    return AdapterError(Problem(subject, expected, found, hint))
