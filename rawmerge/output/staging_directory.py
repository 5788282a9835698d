"""The directory in which an output is made: in a hidden folder beside it, published by one rename, kept, or removed."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.errors import OutputError, Problem, RawmergeError, quote
from rawmerge.file_errors import named_errors
from rawmerge.output.exchange import exchange
from rawmerge.output.folder_lock import locked_folder
from rawmerge.output.output_directory import OutputPolicy, looks_like_checkpoint
from rawmerge.signals import HeldSignals

_TAG: Final = "rawmerge"
#: What systems answer to a rename onto a directory that holds something: XFS the second.
_NOT_EMPTY: Final = {errno.ENOTEMPTY, errno.EEXIST}
#: The output in its hidden folder.
STAGED_NAME: Final = "output"
#: So much of an output's name is in that of the directory that it is made in; a name of 255 bytes holds it anyway.
_SHOWN: Final = 40
#: What a merge noted of its shards, in the hidden folder.
JOURNAL_NAME: Final = "finished.jsonl"
PUBLISHED_NOTE: Final = "the output was published before"


class StagingDirectory:
    """A directory in a hidden folder beside the target; both are gone on leaving the block, as a rule.

    The folder's name follows from the target's, so that a second merge to it is noticed, and what one that was cut off
    left. It is locked, and holds what is replaced until that is removed.

    Attributes:
        output: the target.
        folder: the hidden folder.
        path: the directory, in the hidden folder unless another is given.
        has_leftovers: whether a merge that was cut off had left something in the folder; `clear` removes it.
        finished: returns the files of the directory that are of use to the next merge. They stay, and the folder with
            them, where something from outside ends the block: the system, or a signal.
    """

    def __init__(self, output: Path, path: Path | None = None) -> None:
        self.output = output
        self.folder = hidden_beside(output)
        self.path = path or self.folder / STAGED_NAME
        self.has_leftovers = False
        self.finished: Callable[[], Collection[str]] = tuple
        self._is_hidden = path is None
        self._keeps_folder = False
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
        if error is not None and not self._published and comes_from_outside(error) and self.finished():
            self._keep(error)
        self._lock.close()  # the folder goes, unless it is kept
        if not self._published:
            remove_folders(self._created)
        elif error is not None:
            error.add_note(PUBLISHED_NOTE)

    def clear(self, kept: Collection[str] = ()) -> None:
        """Remove from the folder what a merge that was cut off left, but the files of the directory that are named.

        Raises:
            OSError: something cannot be removed.
        """
        own = {self.path, self._replaced, self.folder / JOURNAL_NAME}  # what is replaced may be the only copy of it
        for entry in (*self.folder.iterdir(), *self.path.iterdir()):
            if entry not in own and not (entry.parent == self.path and entry.name in kept):
                remove_entry(entry)

    def adopt_mode(self, names: Collection[str]) -> None:
        """Give the directory, and files in it, the modes that they would have if they were made now.

        Raises:
            OSError: one cannot be changed.
        """
        probe = self.folder / "mode"
        if os.path.lexists(probe):  # of a merge that was cut off just here
            remove_entry(probe)
        probe.mkdir()
        mode = probe.stat().st_mode & 0o777
        probe.rmdir()
        for path, wanted in ((self.path, mode), *((self.path / name, mode & 0o666) for name in names)):
            if path.stat().st_mode & 0o777 != wanted:
                path.chmod(wanted)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file durably."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, raw: bytes) -> None:
        """Write a small file durably."""
        with named_errors(self.path / name, "writing"), (self.path / name).open("xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())

    def replace_text(self, name: str, text: str) -> None:
        """Write a small file durably in place of one that is there, which stays whole until then."""
        new = f".{name}-new"
        (self.path / new).unlink(missing_ok=True)  # of a merge that was cut off here
        self.write_text(new, text)
        (self.path / new).replace(self.path / name)

    def sync(self) -> None:
        """Make the names of all files durable.

        Raises:
            OSError: they may not be; then nothing is kept, for a second try would tell nothing of what is lost.
        """
        try:
            for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
                sync_directory(folder)
        except OSError:
            self.finished = tuple
            raise

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
        hint = "it is whole again; a merge that is to replace it asks for --overwrite"
        raise OutputError(Problem(str(self.output), "nothing there yet", found, hint))

    def _keep(self, error: BaseException) -> None:
        """Keep what is finished for the next merge, and say so."""
        names = self.finished()
        with suppress(OSError):  # what else is there is only in the way
            self.clear(names)
        self._keeps_folder = True
        size = format_bytes(reclaimed_bytes(self.output))
        count = "1 shard is" if len(names) == 1 else f"{len(names)} shards are"
        error.add_note(
            f"nothing was published; {count} finished and kept in {quote(self.folder)} ({size}): the same command goes "
            f"on from there, `rawmerge clean {_shell_word(self.output)}` removes it"
        )

    def _remove_folder(self) -> None:
        if self._keeps_folder:
            return
        if self._published or not self._replaced.exists():  # else that is the only copy of what stood at the output
            shutil.rmtree(self.folder, ignore_errors=True)

    def _other_work(self) -> OSError:
        return OSError(errno.ENOTEMPTY, "the output has changed meanwhile and holds other work", str(self.output))

    def _make(self) -> None:
        make_folders(self.output.parent, self._created)
        was_there = self._lock.enter_context(locked_folder(self.folder))
        self._lock.callback(self._remove_folder)  # before it is unlocked
        if self._replaced.exists():
            self._restore()
        self.has_leftovers = was_there and any(self.folder.iterdir())
        if os.path.lexists(self.path) and (self.path.is_symlink() or not self.path.is_dir()):
            self.path.unlink()
        self.path.mkdir(exist_ok=True)


def comes_from_outside(error: BaseException) -> bool:
    """Whether the system or a signal ended a merge, so that the same command may succeed later."""
    is_ours = isinstance(error, RawmergeError)
    return not is_ours and isinstance(error, (OSError, MemoryError, KeyboardInterrupt, SystemExit))


def remove_entry(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _shell_word(path: Path) -> str:
    """Return a path as a shell takes it; one with control characters is escaped, which no shell takes back."""
    text = str(path.absolute()) if str(path).startswith("-") else str(path)
    return shlex.quote(text) if text.isprintable() else quote(text)


def hidden_beside(output: Path) -> Path:
    """Return the hidden directory beside `output` in which it is made; the same for every process."""
    at = Path(os.path.abspath(output))  # noqa: PTH100  # `out/..` has no name of its own
    digest = hashlib.sha256(os.fsencode(at.name)).hexdigest()[:8]
    return at.parent / f".{_TAG}-{at.name[:_SHOWN]}-{digest}"


def reclaimed_bytes(output: Path) -> int:
    """Return how many bytes on the disk a merge to `output` that was cut off takes, which the next one has."""
    total = 0
    for parent, _, names in os.walk(hidden_beside(output)):  # which passes over what another process removes meanwhile
        for name in names:
            with suppress(OSError):
                status = Path(parent, name).lstat()
                total += getattr(status, "st_blocks", 0) * 512 * (status.st_nlink == 1)
    return total


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
    with named_errors(folder, "syncing"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
