"""An adapter as it was asked for: where it lies, and by what its deltas are multiplied."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Final

_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE: Final = re.compile(r"[+-]?(nan|inf(inity)?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One adapter of a merge.

    Attributes:
        path: its local directory or file.
        repo: `org/name@commit` of one from the hub, else empty.
        weight: by what its deltas are multiplied; 0 leaves it out.
    """

    path: Path
    repo: str = ""
    weight: float = 1.0


def split_weight(text: str) -> tuple[str, float]:
    r"""Return the place that an argument names, and the weight behind its last colon, 1 where there is none.

    A path that is there is a path, whatever it looks like. `C:\adapters` has no weight: what follows the colon is no
    number.

    Example:
        >>> split_weight("org/name@main:-0.5"), split_weight(r"C:\adapters")
        (('org/name@main', -0.5), ('C:\\adapters', 1.0))

    Raises:
        ValueError: the weight is not finite, or none, where what stands before the colon is there.
    """
    place, colon, number = text.rpartition(":")
    if not colon or not place or _is_there(text):
        return text, 1.0
    if _NOT_FINITE.fullmatch(number):
        raise ValueError(f"the weight of an adapter must be a finite number, not {number!r} as in {text!r}")
    if not _NUMBER.fullmatch(number):
        if _is_there(place):
            raise ValueError(f"{number!r} is no number: a weight looks like {f'{place}:0.5'!r}")
        return text, 1.0
    weight = float(number)
    if not isfinite(weight) or (weight == 0 and re.search("[1-9]", re.split("[eE]", number)[0])):
        raise ValueError(f"the weight of an adapter must be a number that a float can hold, not {number!r}")
    return place, weight


def _is_there(text: str) -> bool:
    return os.path.lexists(os.path.expanduser(text))  # noqa: PTH111  # Path's raises for `~name` of no known user
