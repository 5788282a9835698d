"""Which blocks of a sum have torch's bits on this machine, remembered from run to run.

They are found by trial, for which torch is imported; a run that finds all it needs here does without torch. What is
remembered holds for one processor, one torch, one build of the kernel, one set of the variables that libraries heed,
and the same processors to run on; a machine that is alike in these may be given a copy. A file that cannot be read or
written costs the time of the trials and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Final

from rawmerge._version import __version__
from rawmerge.native import library_path
from rawmerge.native.recipe import Recipe
from rawmerge.user_cache import cache_folder, replace_text
from rawmerge.versions import installed_version

FILE_NAME: Final = "products.json"
_FORMAT: Final = "rawmerge-products-1"
#: Beginnings of the names of variables that choose a matrix library's code.
_PREFIXES: Final = ("MKL", "ATEN", "OMP", "KMP", "OPENBLAS", "ONEDNN", "DNNL", "TORCH", "GOTO", "BLIS", "ARMPL")

_FIELDS: Final = tuple(field.name for field in fields(Recipe))


class Certificates:
    """Recipes and the blocks that were found for them; 0 where torch's bits cannot be had."""

    def __init__(self) -> None:
        self._machine = machine_key()
        self._blocks = self._read()

    def block(self, recipe: Recipe) -> int | None:
        """Return the block of a recipe; None where no trial was made."""
        return self._blocks.get(_key(recipe))

    def missing(self, recipes: Iterable[Recipe]) -> list[Recipe]:
        """Return the recipes without a trial, each once."""
        return [recipe for recipe in dict.fromkeys(recipes) if self.block(recipe) is None]

    def add(self, found: Mapping[Recipe, int]) -> None:
        """Remember blocks, now and in the user's cache folder."""
        self._blocks.update({_key(recipe): block for recipe, block in found.items()})
        text = json.dumps({"format": _FORMAT, "machine": self._machine, "blocks": self._blocks}, indent=1)
        with suppress(OSError):
            replace_text(cache_folder() / FILE_NAME, text + "\n")

    def _read(self) -> dict[str, int]:
        try:
            stored = json.loads((cache_folder() / FILE_NAME).read_text(encoding="utf-8"))
            if stored["format"] != _FORMAT or stored["machine"] != self._machine:
                return {}
            return {str(key): block for key, block in stored["blocks"].items() if _is_block(block)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def machine_key() -> str:
    """Return a SHA-256 of all that the order of torch's sums may depend on."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith(_PREFIXES))
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [os.cpu_count()]
    torch_version = installed_version("torch")
    facts = [__version__, torch_version, sys.version, platform.machine(), _processor(), _build(), usable, variables]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _processor() -> str:
    """Return what the system says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return platform.processor()
    told = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "cache size")
    return "\n".join(line for line in first.splitlines() if line.partition("\t")[0].strip() in told)


def _build() -> str:
    """Return what tells one build of the kernel from another, wherever and whenever it was installed: its SHA-256."""
    path = library_path()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def _key(recipe: Recipe) -> str:
    return " ".join(f"{getattr(recipe, name)}" for name in _FIELDS)


def _is_block(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
