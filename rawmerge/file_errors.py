"""Names the file and the byte in errors of calls that know descriptors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_errors(path: str | Path, deed: str, offset: int = -1) -> Iterator[None]:
    """Let an OSError of the block, unless it names a file, name this one, what was done to it, and from which byte on.

    Args:
        path: the file.
        deed: such as `writing`.
        offset: in bytes from the file's start; negative for the whole file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
            error.strerror = f"{error.strerror} ({deed}{f' at byte {offset}' if offset >= 0 else ''})"
        raise
