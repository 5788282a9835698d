"""What merges that were cut off have left beside an output, and how it goes away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rawmerge.consuming.unfinished import GONE, unfinished_folder
from rawmerge.errors import MergeError, OutputError, Problem, RawmergeError, quote
from rawmerge.output.staging_directory import StagingDirectory, hidden_beside


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder that was removed.

    Attributes:
        path: where it was.
        byte_count: of its files.
    """

    path: str
    byte_count: int


def clean_output(output: str | os.PathLike[str]) -> tuple[Leftover, ...]:
    """Remove what merges to `output` that were cut off have left beside it; the output itself is not touched.

    Folders there that a killed process of rawmerge was removing go too, whatever their output.

    Args:
        output: the directory that they were to make.

    Returns:
        What was removed.

    Raises:
        OutputError: another process works there; or what is left is the only copy of a base's shards, or of an output
            that was being replaced, which then has its name again. MergeError: it cannot be removed.
    """
    at = Path(output).expanduser()
    try:
        return (*_clean_plain(at), *_clean_consuming(at), *_clean_gone(at))
    except OSError as error:
        if isinstance(error, RawmergeError):
            raise
        raise MergeError(f"{quote(error.filename or at)}: {error.strerror or error}; it is still there") from error


def _clean_plain(output: Path) -> Iterator[Leftover]:
    folder = hidden_beside(output)
    if os.path.lexists(folder):
        found = Leftover(str(folder), _byte_count(folder))
        with StagingDirectory(output):
            pass  # which is removed on leaving it
        yield found


def _clean_consuming(output: Path) -> Iterator[Leftover]:
    folder = unfinished_folder(output)
    if not os.path.lexists(folder.path):
        return
    with folder.locked():
        journal = folder.journal()
        if journal and journal.deleted and not folder.is_published(journal):
            raise folder.refusal(journal, ())
        found = Leftover(str(folder.path), _byte_count(folder.path))
        folder.remove()
    if os.path.lexists(folder.path):
        raise OutputError(Problem(str(folder.path), "files of rawmerge alone", "others too", "remove it yourself"))
    yield found


def _clean_gone(output: Path) -> Iterator[Leftover]:
    """Remove what processes that were killed were removing, of any output beside this one."""
    parent = Path(os.path.abspath(output)).parent  # noqa: PTH100  # as `hidden_beside`
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        if GONE.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            found = Leftover(str(path), _byte_count(path))
            shutil.rmtree(path)
            yield found


def _byte_count(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
