"""Which modules a config targets, as PEFT decides it.

Source: PEFT 0.21.2 `tuners/tuners_utils.py` `check_target_module_exists`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from rawmerge.errors import AdapterError, Problem
from rawmerge.formats.adapter_config import TASK_HEADS, AdapterConfig, matches_target
from rawmerge.formats.patterns import MAX_CHARACTERS, MAX_REPEATS, compiled, fits_whole, may_explode

#: The first number below a list of modules: PEFT's layer, where the config names no other list.
_ANY_LAYER: Final = r".*?\.[^.]*"


def is_targeted(config: AdapterConfig, path: str) -> bool:
    """Return whether PEFT puts an adapter on the module of this path in the trained model."""
    saved = (*config.modules_to_save, *TASK_HEADS.get(config.task_type, ()))
    if _fits(config.exclude_modules, path) or any(f".{name}." in f".{path}." for name in saved):
        return False
    if isinstance(config.target_modules, str) or path in config.target_modules or not config.layers_to_transform:
        return _fits(config.target_modules, path)
    return _fits(config.target_modules, path) and _layer(config, path) in config.layers_to_transform


def _fits(targets: str | tuple[str, ...], path: str) -> bool:
    if not isinstance(targets, str):
        return matches_target(targets, path)
    return _is_pattern(targets) and fits_whole(targets, path, "target_modules")


def _layer(config: AdapterConfig, path: str) -> int | None:
    """Return the number of the layer that a module is in, None outside of layers."""
    lists = [rf"(^|.*?\.){name}" for name in map(re.escape, config.layers_pattern)] or [_ANY_LAYER]
    patterns = (re.compile(rf"{start}\.(?P<layer>[0-9]{{1,9}})\.") for start in lists)
    found = next(filter(None, (pattern.match(path) for pattern in patterns)), None)
    return int(found["layer"]) if found else None


@lru_cache(maxsize=64)
def _is_pattern(text: str) -> bool:
    """Return whether a text is a pattern; PEFT could not have trained with one that is none.

    Raises:
        AdapterError: matching it could take for ever.
    """
    if len(text) > MAX_CHARACTERS or may_explode(text):
        expected = f"at most {MAX_CHARACTERS} characters and {MAX_REPEATS} repeats, none of a group"
        found = f"{ascii(text)[:80]}, which can take for ever"
        raise AdapterError(Problem("target_modules", expected, found, "list the modules one by one"))
    try:
        compiled(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
