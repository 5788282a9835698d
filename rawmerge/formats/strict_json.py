"""JSON as checkpoints may use it: one object, and nothing that two parsers read differently.

Python's own parser keeps the last duplicate key, accepts NaN and half a surrogate pair, reads -0 as 0 and 1e999 as
infinity; two readers of such a file may see two different checkpoints, so all are refused here (the 2023 safetensors
audit lists this as a parser differential).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Final

MAX_DEPTH: Final = 200
_SURROGATE_ESCAPE: Final = re.compile(r"\\u[dD][89a-fA-F]")


class StrictJsonError(ValueError):
    """The text is not one strict JSON object; the message says why."""


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"key {key[:80]!r} occurs twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise StrictJsonError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise StrictJsonError(f"{text[:80]} is beyond any float")
    return value


def _unsigned_zero(text: str) -> int:
    if text == "-0":
        raise StrictJsonError("-0 is no whole number")
    return int(text)


def parse_json_object(raw: bytes, *, allows_infinity: bool = False) -> dict[str, Any]:
    """Return the one JSON object that `raw` holds.

    Args:
        raw: the file's bytes.
        allows_infinity: accept Infinity and NaN, as Python writes them.

    Raises:
        StrictJsonError: not UTF-8, not JSON, not an object, nested too deeply, or read differently by other parsers.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=None if allows_infinity else _refuse_constant,
            parse_float=None if allows_infinity else _finite_float,
            parse_int=_unsigned_zero if "-0" in text else None,  # int itself is faster
        )
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise StrictJsonError("half of a surrogate pair") from error
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except ValueError as error:
        raise StrictJsonError(str(error)) from error
    if not isinstance(value, dict):
        raise StrictJsonError(f"not a JSON object but {type(value).__name__}")
    _check_depth(value)
    return value


def _check_depth(value: dict[str, Any]) -> None:
    """Refuse what recursive readers could not follow; some Pythons parse it all the same."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        items = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for item in items for inner in item if isinstance(inner, dict | list)]
        if not level:
            return
    raise StrictJsonError("nested too deeply")
