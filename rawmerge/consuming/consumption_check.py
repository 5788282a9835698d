"""Whether the base's shards may be deleted as their successors are written: all reasons against it, beforehand."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from rawmerge.errors import OutputError, Problem
from rawmerge.inputs.hub_cache import is_in_hub_cache
from rawmerge.merge_plan import MergePlan

_HINT: Final = "leave --consume-base out, and the base stays"


def check_consumption(plan: MergePlan, paths: Iterable[str], folder: Path, *, links: bool) -> None:
    """Refuse to delete base shards that are not the user's own, or whose deletion frees nothing for the output.

    Args:
        plan: the merge.
        paths: the base shards that would be deleted.
        folder: an existing one on the output's file system.
        links: whether shards are to be linked as well.

    Raises:
        OutputError: with all reasons.
    """
    problems = [
        *_problems_of_base(plan, links),
        *_problems_of_names(plan),
        *_problems_of_files(paths, folder.stat().st_dev),
    ]
    if problems:
        raise OutputError(*problems)


def _problems_of_base(plan: MergePlan, links: bool) -> Iterator[Problem]:
    root = Path(plan.base_root)
    if links:
        yield Problem("--consume-base", "to be the only one of --link and --consume-base", "both", "choose one")
    if plan.base_repo or any(is_in_hub_cache(Path(file.path)) for file in plan.base_files):
        found = "one in the hub's cache, which other programs use"
        yield Problem(str(root), "a base of the user's own to delete", found, _HINT)
    for file in plan.base_files:  # a plan may come from a stranger's file
        if root not in {Path(file.path), Path(file.path).parent}:
            yield Problem(file.path, f"a file of the base in {root} to delete", "one elsewhere", "make the plan again")
    for folder in sorted({Path(file.path).parent for file in plan.base_files}):
        if not os.access(folder, os.W_OK | os.X_OK):
            yield Problem(str(folder), "a folder whose files may be deleted", "one that cannot be written", _HINT)


def _problems_of_names(plan: MergePlan) -> Iterator[Problem]:
    for path in dict.fromkeys(
        (plan.base_root, *(at.root for at in plan.adapters), *(file.path for file in plan.base_files))
    ):
        if not _is_text(path):  # the journal, without which nothing can go on, is JSON
            yield Problem(path, "a path in UTF-8, to be noted in a journal", "other bytes", _HINT)


def _is_text(path: str) -> bool:
    """Whether a path can be written as UTF-8; Python has lone surrogates for bytes that are none."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problems_of_files(paths: Iterable[str], device: int) -> Iterator[Problem]:
    for path in paths:
        try:
            status = Path(path).lstat()
        except OSError as error:
            yield Problem(path, "a base shard", error.strerror or str(error))
            continue
        if found := _reason_against(status, device):
            yield Problem(path, "a file of its own on the output's file system, to delete", found, _HINT)


def _reason_against(status: os.stat_result, device: int) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "a link, and what it points to may serve others"
    if status.st_nlink > 1:
        return f"one of {status.st_nlink} names of the same file: deleting it frees nothing"
    return "a file on another one: deleting it frees nothing there" if status.st_dev != device else ""
