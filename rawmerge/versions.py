"""Versions of installed packages, without importing them, nor what reads all of a package's metadata."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def installed_version(package: str) -> str:
    """Return the version of a package whose module has the same name; empty where it is not installed.

    Source: the folder's name `NAME-VERSION.dist-info` beside the module (PyPA, "Recording installed projects"); where
    there is none, importlib.metadata, whose import takes longer than a small plan.
    """
    spec = find_spec(package)
    if spec and spec.origin:
        folder = Path(spec.origin).parent.parent
        pattern = re.compile(rf"{re.escape(package)}-([^-]+)\.dist-info", re.IGNORECASE)
        found = [match[1] for path in folder.glob(f"{package}-*.dist-info") if (match := pattern.fullmatch(path.name))]
        if len(found) == 1:
            return found[0]
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
