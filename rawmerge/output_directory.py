"""Where a merge writes: a staging directory beside the target, published by one rename, or removed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final

from rawmerge.errors import OutputError, Problem

_MARGIN_BYTES: Final = 2**20  # directories, block ends and the record
_TAG: Final = "rawmerge"


def check_output(output: Path, base: Path, adapter: Path, *, overwrite: bool, record_name: str) -> None:
    """Refuse an output that exists, cannot be written, or touches an input.

    Args:
        output: the directory to publish.
        base: the base's directory or file.
        adapter: the adapter's directory.
        overwrite: an existing checkpoint may be replaced.
        record_name: file by which an output of ours is recognised.

    Raises:
        OutputError: all reasons at once.
    """
    problems = list(_overlaps(output, base, adapter))
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        problems.append(Problem(str(output), "a directory, or nothing yet", "a file or a link"))
    elif output.exists() and not overwrite:
        problems.append(Problem(str(output), "nothing there yet", "a directory", "--overwrite replaces it"))
    elif output.exists() and not _looks_like_checkpoint(output, record_name):
        hint = "it may hold other work; remove it yourself, or choose another output"
        problems.append(Problem(str(output), "an empty directory or a checkpoint to overwrite", "neither", hint))
    parent = output.absolute().parent
    ancestor = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        problems.append(Problem(str(ancestor), "a directory that can be written", "one that cannot"))
    if problems:
        raise OutputError(*problems)


def check_space(output: Path, byte_count: int) -> None:
    """Refuse when the output's file system has too little room.

    Raises:
        OutputError: fewer free bytes than `byte_count` and a small margin.
    """
    parent = output.absolute().parent
    ancestor = next(folder for folder in (parent, *parent.parents) if folder.exists())
    free = shutil.disk_usage(ancestor).free
    needed = byte_count + _MARGIN_BYTES
    if free < needed:
        hint = "free some space, or choose an output on another disk"
        raise OutputError(Problem(str(output), f"{needed} free bytes", f"{free} free bytes", hint))


def _overlaps(output: Path, base: Path, adapter: Path) -> Iterable[Problem]:
    target, base_path, adapter_path = output.resolve(), base.resolve(), adapter.resolve()
    if target.is_relative_to(base_path):
        yield Problem(str(output), "an output apart from the base", f"one in {base_path}")
    for path in {base_path, adapter_path}:
        if (path.is_relative_to(target) and path != target) or path == target != base_path:
            yield Problem(str(output), "an output apart from the inputs", f"one that holds {path}")


def _looks_like_checkpoint(output: Path, record_name: str) -> bool:
    names = [entry.name for entry in output.iterdir()]
    is_ours = record_name in names or "config.json" in names
    return not names or is_ours or any(name.endswith(".safetensors") for name in names)


class StagingDirectory:
    """A new directory beside the target; removed on leaving the block unless it was published."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.parent / f".{output.name}.{_TAG}-{os.getpid()}-{secrets.token_hex(4)}"
        self._created: list[Path] = []
        self._published = False

    def __enter__(self) -> StagingDirectory:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            self._remove()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file durably."""
        path = self.path / name
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give the directory its final name; what stood there is replaced as a whole.

        Raises:
            OSError: the rename failed; what stood there is back in its place.
        """
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            _sync_directory(folder)
        old = self.path.with_name(f"{self.path.name}-old")
        replaces = self.output.exists()
        if replaces:
            self.output.rename(old)
        try:
            self.path.rename(self.output)
        except BaseException:
            if replaces:
                old.rename(self.output)
            raise
        self._published = True
        _sync_directory(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _make(self) -> None:
        missing = [folder for folder in (self.output.parent, *self.output.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._created.append(folder)
        self.path.mkdir()

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:  # another process put something there: it stays
                return


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
