"""Keeps other processes out of a folder; the lock ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rawmerge.errors import OutputError, Problem


@contextmanager
def locked_folder(path: Path) -> Iterator[bool]:
    """Make a folder where it is missing, keep other processes out of it in the block, and give whether it was there.

    Raises:
        OutputError: another process works in it, or it is a file or a link; on Windows, which has no such lock, also
            where it is there at all.
    """
    was_there = _make(path)
    descriptor = _opened(path) if sys.platform != "win32" else -1
    try:
        yield was_there
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _make(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        if sys.platform == "win32":
            hint = "wait until it is done; remove the folder if it was killed"
            raise _busy(path, hint) from None
        return True
    return False


def _opened(path: Path) -> int:
    """Return a descriptor of the folder that holds its lock."""
    import fcntl  # not everywhere

    descriptor = _folder(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.fstat(descriptor).st_ino == path.lstat().st_ino
    except OSError:  # taken by another; or finished and removed by it just now
        is_there = False
    if not is_there:
        os.close(descriptor)
        raise _busy(path, "wait until it is done")
    return descriptor


def _folder(path: Path) -> int:
    """Return a descriptor of what must be a folder itself: what a link leads to would be cleared as a merge's own."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:  # finished and removed by another just now
        raise _busy(path, "run the command again") from None
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
        raise _foreign(path) from error


def _foreign(path: Path) -> OutputError:
    expected, found = "nothing yet, or a folder that a merge to this output left", "a file or a link"
    return OutputError(Problem(str(path), expected, found, "remove it, or choose another output"))


def _busy(path: Path, hint: str) -> OutputError:
    return OutputError(Problem(str(path), "no other merge to this output", "one that another process is making", hint))
