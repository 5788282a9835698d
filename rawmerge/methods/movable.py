"""Prepared updates that can be moved to an accelerator: all they compute with is data in sight.

An update is prepared on the CPU always: random numbers, decompositions and PEFT's roundings on the way come from
there, whatever device adds the result to the base. What is moved are the tensors that `apply` uses.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class ImmovableError(Exception):
    """A prepared update keeps tensors where they cannot be found, or does not say that it may be moved."""


class Movable:
    """A dataclass whose `apply` (or call) makes all tensors of its own where its fields' tensors are.

    Its fields hold tensors, numbers, dtypes, names, functions without a closure, partials of such functions, tuples
    and dicts of all these, and other Movables. Whatever else they hold keeps the update on the CPU.
    """

    __slots__ = ()


def moved(value: Any, device: torch.device) -> Any:
    """Return a prepared update, or a part of one, with its tensors on `device`.

    Raises:
        ImmovableError: a part of it is none of what a Movable may hold, such as a closure.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Movable):
        return type(value)(**{name: moved(getattr(value, name), device) for name in _fields(value)})
    if isinstance(value, partial):
        named = {name: moved(argument, device) for name, argument in value.keywords.items()}
        return partial(moved(value.func, device), *moved(value.args, device), **named)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, torch.dtype) or _is_plain(value):
        return value
    raise ImmovableError(type(value).__name__)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a name, nothing, a function without a closure, or a dataclass of such."""
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    if is_dataclass(value):
        return all(_is_plain(getattr(value, name)) for name in _fields(value))
    return isinstance(value, int | float | str | NoneType)


def _fields(value: Any) -> list[str]:
    return [field.name for field in fields(value)]
