"""The directory in which an output is made: in a hidden folder beside it, published by one rename, or removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.errors import OutputError, Problem, quote
from rawmerge.output.folder_lock import locked_folder
from rawmerge.output.output_directory import OutputPolicy, looks_like_checkpoint
from rawmerge.signals import HeldSignals

_TAG: Final = "rawmerge"
#: What systems answer to a rename onto a directory that holds something: XFS the second.
_NOT_EMPTY: Final = {errno.ENOTEMPTY, errno.EEXIST}
#: The output in its hidden folder.
_STAGED: Final = "output"
#: So much of an output's name is in that of the directory that it is made in; a name of 255 bytes holds it anyway.
_SHOWN: Final = 40
#: Linux, include/uapi/linux/fcntl.h and fs.h.
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
PUBLISHED_NOTE: Final = "the output was published before"


class StagingDirectory:
    """A new directory in a hidden folder beside the target; both are gone on leaving the block.

    The folder's name follows from the target's, so that a second merge to it is noticed, and what one that was killed
    left. It is locked, and holds what is replaced until that is removed.

    Attributes:
        output: the target.
        path: the directory, in the hidden folder unless another is given.
        notes: what was found in its place.
    """

    def __init__(self, output: Path, path: Path | None = None) -> None:
        self.output = output
        self._folder = hidden_beside(output)
        self.path = path or self._folder / _STAGED
        self._is_hidden = path is None
        self.notes: list[str] = []
        self._lock = ExitStack()
        self._created: list[Path] = []
        self._published = False

    def __enter__(self) -> StagingDirectory:
        try:
            self._make()
        except BaseException:
            self._lock.close()
            remove_folders(self._created)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()  # the folder goes
        if not self._published:
            remove_folders(self._created)
        elif error is not None:
            error.add_note(PUBLISHED_NOTE)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file durably."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, raw: bytes) -> None:
        """Write a small file durably."""
        with (self.path / name).open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())

    def sync(self) -> None:
        """Make the names of all files durable."""
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            sync_directory(folder)

    def publish(self, policy: OutputPolicy) -> None:
        """Give the directory its final name; what stood there is replaced as a whole.

        Raises:
            OSError: the rename failed, or something stands there that may not be replaced; it is still there.
            KeyboardInterrupt, or what the caller's signal handler raises: if the output was published, it gets a note
                that says so when the directory is left.
        """
        self.sync()
        with HeldSignals():  # between two renames nothing may be interrupted
            self._rename(policy)

    def _rename(self, policy: OutputPolicy) -> None:
        old = self._replaced
        # it may have come into being since it was checked: renaming onto a directory that is not empty fails
        replaces = policy.overwrite and self.output.exists()
        if replaces and not looks_like_checkpoint(self.output, policy.record_name):
            raise self._other_work()
        # an unfinished folder tells by its names how far it is
        if replaces and self._is_hidden and exchange(self.path, self.output):
            self._published = True
            sync_directory(self.output.parent)
            shutil.rmtree(self.path, ignore_errors=True)  # now, for shards that were taken over have one name again
            return
        if replaces:
            self.output.rename(old)
        try:
            self.path.rename(self.output)
        except BaseException as error:
            if replaces:
                old.rename(self.output)
            if isinstance(error, OSError) and error.errno in _NOT_EMPTY:
                raise self._other_work() from error
            raise
        self._published = True
        sync_directory(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)

    @property
    def _replaced(self) -> Path:
        """What stood at the output, where it has to go before the new one comes."""
        return self.path.with_name(f"{self.path.name}-old")

    def _restore(self) -> None:
        """Give back its name to an output that a merge that was killed had put aside."""
        if self.output.exists():  # it was killed after the new one had come
            shutil.rmtree(self._replaced)
            return
        self._replaced.rename(self.output)
        found = "the one of before, which a merge that was killed was replacing; it has its name again"
        raise OutputError(Problem(str(self.output), "nothing there yet", found, "run the command again"))

    def _remove_folder(self) -> None:
        if self._published or not self._replaced.exists():  # else that is the only copy of what stood at the output
            shutil.rmtree(self._folder, ignore_errors=True)

    def _other_work(self) -> OSError:
        return OSError(errno.ENOTEMPTY, "the output has changed meanwhile and holds other work", str(self.output))

    def _make(self) -> None:
        make_folders(self.output.parent, self._created)
        was_there = self._lock.enter_context(locked_folder(self._folder))
        self._lock.callback(self._remove_folder)  # before it is unlocked
        if self._replaced.exists():
            self._restore()
        left = list(self._folder.iterdir()) if was_there else []
        for entry in left:  # of a merge that was killed: nothing in it is of use
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if left:
            self.notes.append(f"{quote(self._folder)}, which a merge that was killed had left, was cleared")
        self.path.mkdir()


def hidden_beside(output: Path) -> Path:
    """Return the hidden directory beside `output` in which it is made; the same for every process."""
    at = Path(os.path.abspath(output))  # noqa: PTH100  # `out/..` has no name of its own
    digest = hashlib.sha256(os.fsencode(at.name)).hexdigest()[:8]
    return at.parent / f".{_TAG}-{at.name[:_SHOWN]}-{digest}"


def exchange(one: Path, other: Path) -> bool:
    """Let two directories take each other's name at once, where the system can; return whether it did.

    Source: renameat2(2), RENAME_EXCHANGE; Linux 3.15, glibc 2.28.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0


def make_folders(folder: Path, created: list[Path]) -> None:
    """Make a folder and those above it that are missing; add each to `created` as it is made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        created.append(path)


def remove_folders(created: list[Path]) -> None:
    """Remove the folders that `make_folders` made, as far as they are empty."""
    for folder in reversed(created):
        try:
            folder.rmdir()
        except OSError:  # another process put something there: it stays
            return


def sync_directory(folder: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
