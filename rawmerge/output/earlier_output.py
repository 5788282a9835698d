"""What is remembered of an output, so that a merge that replaces it need not make again what would be the same.

The memory is a small file in the user's cache folder, not in the output: outputs are the same wherever they are made.
Whatever is wrong with it, the shards are made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rawmerge.computing.losses import Losses
from rawmerge.errors import RefusedError
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object
from rawmerge.inputs.file_status import FileStatus, file_status
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.output.loss_fields import loss_fields, parse_losses
from rawmerge.user_cache import cache_folder, replace_text

FORMAT: Final = "rawmerge-output-3"


@dataclass(frozen=True, slots=True)
class MadeShard:
    """A shard as it was published.

    Attributes:
        identity: what it was made from and how, of `rawmerge.output.shard_identity`.
        status: the file's.
        unchanged: its updated tensors of which no element differs from the base.
        losses: what rounding left of the deltas of its updated tensors, and what casts took from others.
    """

    identity: str
    status: FileStatus
    unchanged: tuple[str, ...]
    losses: Losses


def reusable_shards(output: Path, identities: Mapping[str, str], made: Mapping[str, MadeShard]) -> dict[str, MadeShard]:
    """Return which of the `made` shards of the output would come out the same, and have not been touched since."""
    return {
        name: shard
        for name, shard in made.items()
        if identities.get(name) == shard.identity and is_as_made(output / name, shard.status)
    }


def take_shard(output: Path, name: str, made: MadeShard, folder: Path) -> bool:
    """Give a shard of the output a second name in `folder`; the output keeps its own until it is replaced.

    Returns:
        Whether it was possible, and its mode that of a new file; if not, nothing stands in `folder`.
    """
    target = folder / name
    try:
        if not has_new_mode(output / name, folder):
            return False
        os.link(output / name, target, follow_symlinks=False)
    except OSError:  # a file system without links; or the shard has gone
        return False
    if file_status(target).has_same_content(made.status):
        return True
    target.unlink()
    return False


def read_made_shards(output: Path) -> dict[str, MadeShard]:
    """Return shard name to what is remembered of it; nothing where there is no memory, or it cannot be read."""
    try:
        document = parse_json_object(read_small_file(_memory_path(output)))
        if document.get("format") != FORMAT:
            return {}
        return {name: parse_made(fields) for name, fields in document["shards"].items()}
    except (RefusedError, StrictJsonError, OSError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return {}


def remember_shards(output: Path, made: Mapping[str, MadeShard]) -> None:
    """Write down what was published; silently nothing where the cache folder cannot be written."""
    shards = {name: made_fields(shard) for name, shard in made.items()}
    text = json.dumps({"format": FORMAT, "output": ascii(os.path.realpath(output)), "shards": shards}, indent=1)
    with contextlib.suppress(OSError):
        replace_text(_memory_path(output), text)


def statuses(folder: Path, names: Iterable[str]) -> dict[str, FileStatus]:
    """Return the statuses of the shards that can be looked at."""
    return dict(_statuses(folder, names))


def _statuses(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, FileStatus]]:
    for name in names:
        with contextlib.suppress(OSError):
            yield name, file_status(folder / name)


def _memory_path(output: Path) -> Path:
    """Return where the memory of this output is; OSError: the user has no home."""
    return cache_folder() / "outputs" / f"{hashlib.sha256(os.fsencode(os.path.realpath(output))).hexdigest()}.json"


def is_as_made(path: Path, status: FileStatus) -> bool:
    """Whether a file is untouched, and goes by no other name, which would be changed along with it."""
    try:
        return not path.is_symlink() and path.stat().st_nlink == 1 and file_status(path) == status
    except OSError:
        return False


def has_new_mode(path: Path, folder: Path) -> bool:
    """Whether a file has the mode that a file made now in a folder that was made now would have.

    Raises:
        OSError: one cannot be looked at.
    """
    return path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


def made_fields(made: MadeShard) -> dict[str, Any]:
    """Return what is remembered of a shard as JSON."""
    known = {"identity": made.identity, "status": made.status, "unchanged": made.unchanged}
    return known | loss_fields(made.losses)


def parse_made(fields: Any) -> MadeShard:
    """Return what `made_fields` gave.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is something else.
    """
    status = FileStatus(*fields["status"])
    if not all(type(value) is int for value in status) or not all(type(name) is str for name in fields["unchanged"]):
        raise TypeError("numbers and names were expected")
    return MadeShard(fields["identity"], status, tuple(fields["unchanged"]), parse_losses(fields))
