"""The user's cache folder, for what may be lost at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/rawmerge`, else `~/.cache/rawmerge`; it need not exist.

    Raises:
        OSError: the user has no home.

    Source: XDG Base Directory Specification 0.8.
    """
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if told.is_absolute():  # the specification has relative paths ignored
        return told / "rawmerge"
    try:
        return Path.home() / ".cache" / "rawmerge"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def replace_text(path: Path, text: str) -> None:
    """Write a small file, so that whoever reads it meanwhile finds the old or the new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
