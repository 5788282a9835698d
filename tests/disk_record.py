"""Watches what a program does to a folder: each change of names and of bytes, and what of it is synced in between.

Changes are found by looking at the folder before and after each call of `os` that may make one, so that a change by
other means (a file object, `renameat2` by ctypes) is seen at the next call. Files and folders are told by inode; what
is removed goes to a vault instead, so that no number comes twice and a file can be put back as the very same one.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

#: A name: the inode of its folder, and the name in it.
Name: TypeAlias = tuple[int, str]
CHANGING = (
    *("pwrite", "pwritev", "write", "writev", "copy_file_range", "sendfile", "posix_fallocate", "ftruncate"),
    *("truncate", "mkdir", "link", "symlink", "utime"),
)


@dataclass(frozen=True)
class Version:
    """What a file held at one time, and its modification time in nanoseconds."""

    content: bytes = b""
    modified_ns: int = 0


@dataclass(frozen=True)
class NamesChanged:
    """What one call did to names: the inode that each has now, 0 for none; all of it comes to the disk, or nothing."""

    names: dict[Name, int]


@dataclass(frozen=True)
class FileChanged:
    """What a file holds from now on."""

    inode: int
    version: Version


@dataclass(frozen=True)
class Synced:
    """All that was done to a file, or to the names in a folder, is durable."""

    inode: int


Event: TypeAlias = NamesChanged | FileChanged | Synced


@dataclass
class Snapshot:
    """A folder as it is: the inode of each name, what files hold, and which inodes are folders."""

    names: dict[Name, int] = field(default_factory=dict)
    files: dict[int, Version] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)


def snapshot(root: Path) -> Snapshot:
    """Return all that is in `root`, which must hold nothing but folders and regular files."""
    found, folders = Snapshot(), [(root, root.stat().st_ino)]
    for folder, number in folders:
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            found.names[number, entry.name] = status.st_ino
            if stat.S_ISDIR(status.st_mode):
                folders.append((Path(entry.path), status.st_ino))
                found.folders.add(status.st_ino)
            elif status.st_ino not in found.files:
                assert stat.S_ISREG(status.st_mode), entry.path
                found.files[status.st_ino] = Version(Path(entry.path).read_bytes(), status.st_mtime_ns)
    return found


def separate_changes(before: dict[Name, int], now: dict[Name, int]) -> Iterator[dict[Name, int]]:
    """Yield the changes between two looks, those together that one rename or exchange made: they share an inode."""
    groups: list[tuple[set[Name], set[int]]] = []
    for key in sorted(before.keys() | now.keys()):
        inodes = {names[key] for names in (before, now) if key in names}
        if before.get(key) != now.get(key):
            same = [group for group in groups if group[1] & inodes]
            groups = [group for group in groups if group not in same]
            groups.append(({key}.union(*(keys for keys, _ in same)), inodes.union(*(found for _, found in same))))
    for keys, _ in groups:
        yield {key: now.get(key, 0) for key in keys}


class Vault:
    """Keeps files that are removed or replaced, by inode, beside the folder that they are removed from."""

    def __init__(self, folder: Path) -> None:
        self.files: set[int] = set()
        self._folder = folder
        self._unlink, self._rename, self._rmdir = os.unlink, os.rename, os.rmdir
        folder.mkdir()

    def place(self, inode: int) -> Path:
        """Return where the file of that number is kept, while it has no name elsewhere."""
        return self._folder / str(inode)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Let the calls that remove names keep what they remove; no sync waits for the disk."""
        for name in ("unlink", "remove"):
            patch.setattr(os, name, self.unlink)
        for name in ("rename", "replace"):
            patch.setattr(os, name, self.rename)
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _: None)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        """Do what `os.unlink` does, and keep the file."""
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        if status.st_ino in self.files and status.st_nlink == 1:
            self._rename(path, self.place(status.st_ino), src_dir_fd=dir_fd)
        else:
            self._unlink(path, dir_fd=dir_fd)

    def rename(self, source: Any, target: Any, **folders: Any) -> None:
        """Do what `os.rename` does, and keep a file that is replaced."""
        if os.path.isfile(target) and not os.path.samefile(source, target):  # noqa: PTH113, PTH121
            self.unlink(target)
        self._rename(source, target, **folders)

    def gather(self, root: Path) -> None:
        """Take in all files that belong here, and empty the folder."""
        for folder, names, files in os.walk(root, topdown=False):
            for name in files:
                self.unlink(Path(folder, name))
            for name in names:
                self._rmdir(Path(folder, name))


class DiskRecorder:
    """The events of all that happens to `root` in the block of `recording`."""

    def __init__(self, root: Path, vault: Vault) -> None:
        self.root = root
        self.vault = vault
        self.before = self._seen = snapshot(root)
        self.events: list[Event] = []
        self.folders = set(self.before.folders)
        self.syncs: Callable[[bool], bool] = lambda is_folder: True
        self._lock = threading.RLock()
        vault.files.update(self.before.files)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is done in the block, by any thread."""
        with pytest.MonkeyPatch.context() as patch:
            self.vault.patch(patch)
            for name in (*CHANGING, "unlink", "remove", "rename", "replace"):
                patch.setattr(os, name, self._watched(getattr(os, name)))
            patch.setattr(os, "rmdir", self._watched(self._rmdir))
            patch.setattr(os, "open", self._watched(os.open, self._makes))
            for name in ("fsync", "fdatasync"):
                patch.setattr(os, name, self._sync)
            yield
            self.look()

    def look(self) -> None:
        """Note what has changed since the last look."""
        with self._lock:
            now = snapshot(self.root)
            self.vault.files.update(now.files)
            self.folders |= now.folders
            self.events.extend(map(NamesChanged, separate_changes(self._seen.names, now.names)))
            for inode, version in now.files.items():
                if self._seen.files.get(inode, Version()).content != version.content:
                    self.events.append(FileChanged(inode, version))
            self._seen = now

    def _watched(self, call: Callable[..., Any], concerns: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            if not concerns(*arguments, **named):
                return call(*arguments, **named)
            with self._lock:
                self.look()
                try:
                    return call(*arguments, **named)
                finally:
                    self.look()

        return run

    @staticmethod
    def _makes(_: Any, flags: int, *__: Any, **___: Any) -> bool:
        return bool(flags & (os.O_CREAT | os.O_TRUNC))

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        """Remove a folder so that no other gets its number."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            if os.listdir(descriptor):  # noqa: PTH208
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            number = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        self.vault._rename(path, self.vault.place(number), src_dir_fd=dir_fd)

    def _sync(self, descriptor: int) -> None:
        with self._lock:
            self.look()
            status = os.fstat(descriptor)
            if self.syncs(stat.S_ISDIR(status.st_mode)):
                self.events.append(Synced(status.st_ino))
