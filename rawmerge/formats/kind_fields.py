"""What the config of an adapter kind may hold beside the fields that all kinds have, and how values are checked.

A kind names its fields here-by: those that it follows, with a check and a default, and those that do not change a
merge. Everything else that is set is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """A config field that a kind follows.

    Attributes:
        check: whether a value that is not null can be used.
        expected: what such a value is, for messages.
        default: PEFT's default, which stands for an absent field and for null.
        is_required: whether an absent field is refused, for no default is safe.
    """

    check: Callable[[Any], bool]
    expected: str
    default: Any = None
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class KindFields:
    """The config fields of one kind.

    Attributes:
        followed: name to field.
        ignored: names of fields that do not change a merge.
        rank: name of the field that holds the rank, empty for kinds without; `rank_pattern` is followed with it.
        alpha: name of the field that holds alpha, empty for kinds without; `alpha_pattern` is followed with it.
        token_indices: name of the field that holds the rows of trained tokens, empty for kinds without.
    """

    followed: Mapping[str, Field] = field(default_factory=dict)
    ignored: Collection[str] = ()
    rank: str = ""
    alpha: str = ""
    token_indices: str = ""


def switch(default: bool) -> Field:
    """Return a field that is true or false."""
    return Field(lambda value: isinstance(value, bool), "true or false", default)


def whole_number(default: int, least: int = 0, most: int = 2**31) -> Field:
    """Return a field that is a whole number from `least` to `most`."""
    return Field(
        lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}", default
    )


def finite_number(default: float) -> Field:
    """Return a field that is a finite number."""
    return Field(is_finite, "a finite number", default)


def one_of(default: Any, *others: Any) -> Field:
    """Return a field that has one of some values."""
    values = (default, *others)
    shown = ", ".join(map(ascii, values))
    return Field(
        lambda value: any(value == one and type(value) is type(one) for one in values), f"one of {shown}", default
    )


def is_finite(value: object) -> bool:
    """Return whether a value is a number that a float can hold."""
    return (type(value) is int and abs(value) < 2**53) or (type(value) is float and math.isfinite(value))
