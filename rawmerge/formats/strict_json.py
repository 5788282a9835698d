"""JSON as checkpoints may use it: one object, no duplicate keys, no NaN.

Python's own parser keeps the last duplicate and accepts NaN; two readers of such a file may see two different
checkpoints, so both are refused here (the 2023 safetensors audit lists this as a parser differential).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


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


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Return the one JSON object that `raw` holds.

    Raises:
        StrictJsonError: not UTF-8, not JSON, not an object, a duplicate key, a NaN, or nested too deeply.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except ValueError as error:
        raise StrictJsonError(str(error)) from error
    if not isinstance(value, dict):
        raise StrictJsonError(f"not a JSON object but {type(value).__name__}")
    return value
