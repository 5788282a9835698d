"""Whether an output may be written where it is wanted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.byte_sizes import format_bytes
from rawmerge.errors import OutputError, Problem, quote
from rawmerge.inputs.hub_cache import is_in_hub_cache

_MARGIN_BYTES: Final = 2**20  # directories, block ends and the record


@dataclass(frozen=True, slots=True)
class OutputPolicy:
    """What may stand at the output, and what must not be touched.

    Attributes:
        overwrite: an existing checkpoint may be replaced.
        record_name: file by which an output of ours is recognised.
        base_root: the base's directory or file; the output may not lie in it.
        input_files: every file that is read, links not followed; the output may not hold one.
    """

    overwrite: bool
    record_name: str
    base_root: Path
    input_files: tuple[Path, ...]


def check_output(output: Path, policy: OutputPolicy) -> None:
    """Refuse an output that exists, cannot be written, or touches an input.

    Raises:
        OutputError: all reasons at once.
    """
    try:
        problems = [*_overlaps(output, policy), *_existing(output, policy), *_unwritable(output)]
    except OSError as error:  # a name too long, too many links
        raise OutputError(Problem(str(output), "a usable path", error.strerror or str(error))) from error
    if problems:
        raise OutputError(*problems)


def check_space(output: Path, byte_count: int, ways: Iterable[str] = ()) -> None:
    """Refuse when the output's file system has too little room.

    Args:
        output: what is to be made.
        byte_count: what it takes.
        ways: to need less, for the hint.

    Raises:
        OutputError: fewer free bytes than `byte_count` and a small margin.
    """
    free = shutil.disk_usage(nearest_folder(output)).free
    needed = byte_count + _MARGIN_BYTES
    if free < needed:
        found = f"{format_bytes(free)} free, {format_bytes(needed - free)} too little"
        hint = f"free some space, or choose an output on another disk{''.join(f'; {way}' for way in ways)}"
        raise OutputError(Problem(str(output), f"{format_bytes(needed)} free", found, hint))


def nearest_folder(output: Path) -> Path:
    """Return the output's parent, or the first folder above it that exists."""
    parent = output.absolute().parent
    return next(folder for folder in (parent, *parent.parents) if folder.exists())


def _unwritable(output: Path) -> Iterable[Problem]:
    folder = nearest_folder(output)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        hint = "choose an output elsewhere, or let this user write there"
        yield Problem(str(folder), "a directory that can be written", "one that cannot", hint)
    yield from long_names(folder, output.parts)


def long_names(folder: Path, names: Iterable[str]) -> Iterable[Problem]:
    """Yield the names that the file system of `folder` has no room for."""
    longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in names:
        if len(os.fsencode(name)) > longest:
            yield Problem(name, f"a name of at most {longest} bytes", f"{len(os.fsencode(name))}")


def _existing(output: Path, policy: OutputPolicy) -> Iterable[Problem]:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        hint = "choose another output, or move it away"
        yield Problem(str(output), "a directory, or nothing yet", "a file or a link", hint)
    elif output.exists() and not policy.overwrite:
        yield Problem(str(output), "nothing there yet", "a directory", "--overwrite (overwrite=True) replaces it")
    elif output.exists() and not looks_like_checkpoint(output, policy.record_name):
        hint = "it may hold other work; remove it yourself, or choose another output"
        yield Problem(str(output), "an empty directory or a checkpoint to overwrite", "neither", hint)


def _overlaps(output: Path, policy: OutputPolicy) -> Iterable[Problem]:
    target, base = Path(os.path.realpath(output)), Path(os.path.realpath(policy.base_root))
    if target.is_relative_to(base):
        hint = f"choose a folder beside it, such as {quote(base.parent / f'{base.name}-merged')}"
        yield Problem(str(output), "an output apart from the base", f"one in {base}", hint)
        return
    if is_in_hub_cache(output):
        found, hint = f"one at {target}, which other programs share", "choose a folder of your own"
        yield Problem(str(output), "an output apart from the hub's cache", found, hint)
        return
    for path in policy.input_files:  # shards may be links into the output
        source = Path(os.path.realpath(path))
        if source.is_relative_to(target):
            hint = "choose another output: what stands there is replaced whole"
            yield Problem(str(output), "an output apart from the inputs", f"one that holds {source}", hint)
            return


def looks_like_checkpoint(output: Path, record_name: str) -> bool:
    """Whether a directory is empty, or holds a checkpoint, and so may be replaced when asked."""
    names = [entry.name for entry in output.iterdir()]
    is_ours = record_name in names or "config.json" in names
    return not names or is_ours or any(name.endswith(".safetensors") for name in names)
