"""Regular expressions in strangers' configs: matched as PEFT matches them, where that cannot take for ever.

Source: PEFT 0.21.2 `utils/other.py` `get_pattern_key`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from math import comb
from typing import Final, NamedTuple, TypeVar

from rawmerge.errors import AdapterError, Problem

#: Repeats (`*`, `+`, `{…}`) that a pattern may have: each one more multiplies the time by the path's length.
MAX_REPEATS: Final = 4
#: Longest pattern, in characters: compiling takes some 100 bytes and a microsecond for each.
MAX_CHARACTERS: Final = 100_000
#: Patterns that one table may have; a large model's adapter has one for each module.
MAX_PATTERNS: Final = 65_536
#: Ways in which a pattern may be laid over one path; trying one takes some 5 nanoseconds.
MAX_STEPS: Final = 100_000_000

#: What is told apart in a pattern, the longer first: an escape, a set, and how a group begins.
_PIECE: Final = re.compile(r"\\.|\[\^?\]?(?:\\.|[^]\\])*(?:\]|\Z)|\((?:\?(?:P<\w*>|[a-zA-Z-]*:|<?[=!]))?", re.DOTALL)
#: A comment, or a group in which `#` begins one: what looks like a set in it would hide what follows.
_COMMENT: Final = re.compile(r"\(\?(#|[a-zA-Z]*x[a-zA-Z-]*[:)])")
_GROUP: Final = re.compile(r"\(([^()]*)\)")
_REPEAT: Final = re.compile(r"[*+{]")
_OPTION: Final = re.compile(r"(?<![*+?}])\?")
_LITERAL: Final = re.compile(r"[^.?*+{]*")

_T = TypeVar("_T")


class Pattern(NamedTuple):
    """A pattern, how many repeats it has, and how many ways its options and alternatives leave beside these."""

    regex: re.Pattern[str]
    repeats: int
    ways: int


def as_regex(key: str) -> str:
    """Return the regular expression that PEFT makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def may_explode(pattern: str) -> bool:
    """Whether matching could take exponential time, or a high power of the path's length."""
    plain = _plain(pattern)
    repeats = len(_REPEAT.findall(plain))
    return repeats > MAX_REPEATS or bool(_COMMENT.search(pattern)) or bool(re.search(r"\)[*+{]", plain))


def first_match(table: Mapping[str, _T], path: str, field: str) -> _T | None:
    """Return the value of the first key of `rank_pattern` or `alpha_pattern` that fits a path, None where none does.

    Raises:
        AdapterError: matching takes too many steps.
    """
    steps = 0
    for key, value in table.items():
        pattern = compiled(as_regex(key))
        steps += _steps(pattern, path)
        _check_steps(steps, path, field)
        if pattern.regex.match(path):
            return value
    return None


def fits_whole(pattern: str, path: str, field: str) -> bool:
    """Return whether a pattern fits the whole of a path.

    Raises:
        AdapterError: matching takes too many steps. re.error, RecursionError, OverflowError: it is no pattern.
    """
    known = compiled(pattern)
    _check_steps(_steps(known, path), path, field)
    return known.regex.fullmatch(path) is not None


@lru_cache(maxsize=MAX_PATTERNS)  # more than re keeps
def compiled(pattern: str) -> Pattern:
    """Return a pattern that can be matched.

    Raises:
        re.error, RecursionError, OverflowError: it is none.
    """
    plain = _plain(pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what may mean something else in a later Python: it is a stranger's text
        return Pattern(re.compile(pattern), len(_REPEAT.findall(plain)), _ways(plain))


def _plain(pattern: str) -> str:
    """Return a pattern with a dot for each escape and set, and bare brackets for groups, so that operators are left."""
    return _PIECE.sub(lambda match: "(" if match[0][0] == "(" else ".", pattern)


def _ways(plain: str) -> int:
    """Return in how many ways options (`?`) and alternatives (`|`) can be chosen where a text fits several of them."""
    ways: int = 2 ** min(len(_OPTION.findall(plain)), 64)
    while ways < MAX_STEPS and (groups := _GROUP.findall(plain)):
        for group in groups:
            ways *= _overlaps(group.split("|"))
        plain = _GROUP.sub(".", plain)
    return ways * _overlaps(plain.split("|"))


def _overlaps(alternatives: list[str]) -> int:
    """Return how many of these a text can fit at once: of plain ones, those that begin with one another."""
    if not all(map(_LITERAL.fullmatch, alternatives)):
        return len(alternatives)
    most, open_ones = 1, list[str]()
    for text in sorted(alternatives):
        while open_ones and not text.startswith(open_ones[-1]):
            open_ones.pop()
        open_ones.append(text)
        most = max(most, len(open_ones))
    return most


def _steps(pattern: Pattern, path: str) -> int:
    """Return the most ways in which repeats can share a path's characters, times the others."""
    return comb(len(path) + pattern.repeats, pattern.repeats) * pattern.ways


def _check_steps(steps: int, path: str, field: str) -> None:
    if steps > MAX_STEPS:
        found = f"more for a path of {len(path)} characters"
        hint = "list the modules one by one"
        raise AdapterError(Problem(field, f"patterns that match in at most {MAX_STEPS} steps", found, hint))
