"""Edits of `config.json` that leave every other byte of it as it was.

Re-serialising would change float spellings, escapes and key order that the base's author chose; so values are
replaced in place, in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

CONFIG_NAME: Final = "config.json"
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class _Member:
    """One key of one object in the text: its path, and where its value stands."""

    path: tuple[str, ...]
    start: int
    end: int


def replace_values(text: str, edits: Mapping[tuple[str, ...], Any]) -> str:
    """Return `text` with the value at each path of keys replaced; paths that the text lacks are ignored.

    Args:
        text: a JSON object.
        edits: path of keys from the top to the new value.
    """
    if not edits:  # a base without a config has an empty text
        return text
    pieces, position = [], 0
    for member in _members(text):
        if member.path in edits and member.start >= position:  # not inside a value that is replaced as a whole
            pieces += [text[position : member.start], json.dumps(edits[member.path])]
            position = member.end
    return "".join([*pieces, text[position:]])


def insert_value(text: str, key: str, value: Any, path: tuple[str, ...] = ()) -> str:
    """Return `text`, a JSON object, with one more member at the end of one of its objects.

    Args:
        text: a JSON object.
        key: the new member's name, which that object must not have.
        value: the new member's value, laid out as transformers writes it: indented by two spaces a level.
        path: keys from the top to the object; the top level itself where empty.

    Raises:
        KeyError: there is no object at `path`.
    """
    return insert_values(text, key, {path: value})


def insert_values(text: str, key: str, values: Mapping[tuple[str, ...], Any]) -> str:
    """Return `text`, a JSON object, with one more member of the same name at the end of several of its objects.

    The text is gone through once, however many there are: a stranger's config may nest thousands of objects.

    Args:
        text: a JSON object.
        key: the new members' name, which these objects must not have.
        values: path of keys from the top to the object, to its new member's value, laid out as in `insert_value`.

    Raises:
        KeyError: there is no object at a path.
    """
    ends = _object_ends(text, has_nested=any(values))
    pieces, position = [], 0
    for close, path in sorted((ends[path] - 1, path) for path in values):  # an inner object closes before its outer one
        body, indent = text[position:close].rstrip(), "  " * len(path)
        comma = "" if body.endswith("{") else ","
        laid_out = json.dumps(values[path], indent=2).replace("\n", f"\n{indent}  ")
        pieces += [body, f"{comma}\n{indent}  {json.dumps(key)}: {laid_out}\n{indent}"]
        position = close
    return "".join([*pieces, text[position:]])


def _object_ends(text: str, *, has_nested: bool) -> dict[tuple[str, ...], int]:
    """Return path to the position behind the object there, of the top one alone where no other is asked for."""
    members = _members(text) if has_nested else ()
    return {(): text.rindex("}") + 1, **{at.path: at.end for at in members if text[at.start] == "{"}}


def _members(text: str) -> list[_Member]:
    """Return the members of all objects that are not inside arrays, in the order of their text."""
    found: list[_Member] = []
    _scan_object(text, _skip_space(text, 0), (), found)
    return sorted(found, key=lambda member: member.start)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _scan_object(text: str, position: int, path: tuple[str, ...], found: list[_Member]) -> int:
    """Append the members of the object at `position` to `found`; return the position behind it."""
    position = _skip_space(text, position + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        start = _skip_space(text, _skip_space(text, position) + 1)
        if text[start] == "{":
            end = _scan_object(text, start, (*path, key), found)
        else:
            _, end = _DECODER.raw_decode(text, start)
        found.append(_Member((*path, key), start, end))
        position = _skip_space(text, end)
        position = _skip_space(text, position + 1) if text[position] == "," else position
    return position + 1
