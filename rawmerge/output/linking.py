"""`--link`: shards that the merge leaves as they are become hard links to the base's, and take no room.

A hard link is a second name of the same file: a program that edits the output's shard in place edits the base's. Most
tools write a new file and rename it, which is safe; rawmerge never writes to a file that has a name already.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rawmerge.errors import OutputError, Problem, quote
from rawmerge.inputs.hub_cache import is_in_hub_cache

#: Another file system after all (a bind mount), a file of another user, links that the file system lacks or has too
#: many of: then the shard is copied.
_NO_LINK: Final = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


def check_links(links: Mapping[str, str], folder: Path) -> None:
    """Refuse links that cannot be made, as far as it can be known before.

    Args:
        links: output shard name to base shard.
        folder: an existing one on the output's file system.

    Raises:
        OutputError: a base shard lies in the hub's cache, or on another file system; with all reasons.
    """
    device = folder.stat().st_dev
    hint = "leave --link out: the shard is copied then"
    problems = [
        Problem(path, "a file that may be linked to", found, hint)
        for path in links.values()
        if (found := _reason_against(Path(path), device))
    ]
    if problems:
        raise OutputError(*problems)


def _reason_against(path: Path, device: int) -> str:
    if is_in_hub_cache(path):
        return "one in the hub's cache, which the output must not share"
    try:
        return "" if path.stat().st_dev == device else "one on another file system than the output"
    except OSError as error:
        return error.strerror or str(error)


def link_shard(source: str, target: Path) -> str:
    """Make `target` a hard link to the base shard, and its content durable.

    Returns:
        An empty string, or why it has to be copied instead.

    Raises:
        OSError: of any other kind.
    """
    real = os.path.realpath(source)  # a link to a link of the user's would break when either moves
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return f"{quote(source)} was copied, not linked: {error.strerror}"
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ""
