"""`${…}` in a merge file, as far as OmegaConf's own: `${oc.env:NAME}`, with a default, and `${other_key}`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rawmerge.errors import Problem, RefusedError, quote

_PART: Final = re.compile(r"\$\{([^${}]*)\}")
#: Keys may refer to keys that refer to keys; a circle would go on for ever.
_MAX_ROUNDS: Final = 8
_MAX_TEXT: Final = 64 * 2**10


def interpolated(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table in which the texts at the top have their `${…}` filled in; in lists and inner tables, too.

    Raises:
        RefusedError: with each that stands for nothing: an unset variable, an unknown key, another resolver.
    """
    problems: list[Problem] = []
    result = {key: _filled(value, key, document, problems) for key, value in document.items()}
    if problems:
        raise RefusedError(*problems)
    return result


def _filled(value: Any, key: str, document: Mapping[str, Any], problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner, f"{key}.{name}", document, problems) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, key, document, problems) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    try:
        return _fill(value, document)
    except LookupError as error:
        expected = "${oc.env:NAME} of a variable that is set, or ${key} of a key with one value"
        problems.append(Problem(key, expected, str(error.args[0]), "write the value itself"))
        return value


def _fill(text: str, document: Mapping[str, Any]) -> str:
    for _ in range(_MAX_ROUNDS):
        filled = "".join(_pieces(text, document))
        if filled == text:
            break
        text = filled
    if "${" in text:
        raise LookupError(quote(text))
    return text


def _pieces(text: str, document: Mapping[str, Any]) -> Iterator[str]:
    position, length = 0, len(text)
    for part in _PART.finditer(text):
        yield text[position : part.start()]
        value = _looked_up(part[1].strip(), document)
        position, length = part.end(), length + len(value)
        if length > _MAX_TEXT:  # a short file may stand for gigabytes
            raise LookupError(f"a text of more than {_MAX_TEXT} characters")
        yield value
    yield text[position:]


def _looked_up(name: str, document: Mapping[str, Any]) -> str:
    resolver, colon, argument = name.partition(":")
    if colon and resolver == "oc.env":
        variable, comma, default = argument.partition(",")
        value: Any = os.environ.get(variable.strip(), default.strip() if comma else None)
    else:
        value = None if colon else _at(document, name.split("."))
    if not isinstance(value, str | int | float):
        raise LookupError(f"${{{quote(name)}}}, which stands for no text or number")  # noqa: TRY004  # or for nothing
    return str(value)


def _at(document: Any, path: list[str]) -> Any:
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document
