"""Modules of the base that `target_modules` names and the adapter has no tensors for: information, never an error.

An adapter may well have been trained on some layers only; but a name in the list that nothing answers to is often the
first sign of a broken save.

Source: PEFT 0.21.2 `tuners/tuners_utils.py` `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

from rawmerge.errors import quote
from rawmerge.families import base_prefixes
from rawmerge.formats.adapter_config import TASK_HEADS, AdapterConfig
from rawmerge.formats.target_names import is_targeted
from rawmerge.matching.disk_names import DiskNames

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_FAMILIES: Final = 8


def untouched_note(names: DiskNames, config: AdapterConfig, changed: Collection[str], *, is_exact: bool = False) -> str:
    """Return a note on modules that the config targets and no update changes; empty where there are none.

    Args:
        names: the base's tensors.
        config: the adapter's config.
        changed: base tensors that the adapter updates.
        is_exact: whether to follow what else decides: a `target_modules` that is a pattern, and `layers_to_transform`.
    """
    found = _missing(names, config, changed) if is_exact else _untouched(names, config, changed)
    missed = Counter(_NUMBER.sub("*", path) for path in found)
    if not missed:
        return ""
    listed = [f"{quote(path)}{f' (x {count})' if count > 1 else ''}" for path, count in missed.items()]
    more = f" and {len(listed) - _MAX_FAMILIES} more" if len(listed) > _MAX_FAMILIES else ""
    shown = f"{', '.join(listed[:_MAX_FAMILIES])}{more}"
    return f"target_modules also fits modules that the adapter has no tensors for, so they stay as they are: {shown}"


def absent_note(config: AdapterConfig, modules: Collection[str]) -> str:
    """Return a note on modules that `modules_to_save` names and the adapter stores nothing of.

    Args:
        config: the adapter's config.
        modules: paths of all modules that the adapter stores whole.
    """
    heads = TASK_HEADS.get(config.task_type, ())  # PEFT adds all names that such a head may have
    saved = [name for name in config.modules_to_save if name not in heads]
    absent = [name for name in saved if not any(name in path for path in modules)]
    return (
        f"modules_to_save names {', '.join(map(quote, absent))}, and the adapter stores nothing of it" if absent else ""
    )


def _missing(names: DiskNames, config: AdapterConfig, changed: Collection[str]) -> Iterator[str]:
    prefixes = [f"{prefix}." for prefix in base_prefixes(names.model_types)]
    for name, source in names.tensors.items():
        if name in changed or len(source.shape) < 2 or not name.endswith(".weight"):
            continue
        paths = {path.removesuffix(".weight") for path in (name, names.family.canonical(name))}
        paths |= {f"{prefix}{path}" for prefix in prefixes for path in paths}
        paths |= {path.removeprefix(prefix) for prefix in prefixes for path in paths}
        if any(is_targeted(config, path) for path in paths):
            yield name.removesuffix(".weight")


def _untouched(names: DiskNames, config: AdapterConfig, changed: Collection[str]) -> Iterator[str]:
    if isinstance(config.target_modules, str):
        return
    for name, source in names.tensors.items():
        if name in changed or len(source.shape) < 2 or not name.endswith(".weight"):
            continue
        paths = {path.removesuffix(".weight") for path in (name, names.family.canonical(name))}
        if any(is_targeted(config, path) for path in paths):
            yield name.removesuffix(".weight")
