"""Whether a merge that consumes its base can go on where it was cut off: all that it began with must be as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from rawmerge._version import __version__
from rawmerge.consuming.consumption import Consumption, plan_consumption
from rawmerge.consuming.journal import Beginning, Journal
from rawmerge.errors import OutputError, Problem, RawmergeError
from rawmerge.inputs.file_status import FileStatus, file_status
from rawmerge.merge_plan import MergePlan, ShardPlan
from rawmerge.output.record import file_sha256
from rawmerge.output.shard_file import is_shard_file
from rawmerge.run_options import RunOptions
from rawmerge.versions import installed_version

_HINT: Final = "put it back as it was, and run the same command again"
_LOST: Final = "the merge cannot go on; remove {folder}, fetch the base again, and merge anew"


def begin(plan: MergePlan, options: RunOptions) -> Beginning:
    """Return all that must still hold when the merge goes on after a crash; the adapter is read once.

    Raises:
        InputChangedError: the adapter is shorter than planned; OSError: an input cannot be found.
    """
    return Beginning(
        plan=plan,
        means=_means(options),
        base={file.path: file_status(file.path) for file in plan.base_files},
        adapter={file.path: file_sha256(file) for file in plan.adapter_files},
    )


def check_resumption(journal: Journal, options: RunOptions, staged: Path) -> None:
    """Refuse to go on where the bytes might not be those of a merge that was never cut off.

    Args:
        journal: of the merge.
        options: how it is to go on.
        staged: the folder of its finished shards.

    Raises:
        OutputError: with all reasons.
    """
    plan, folder = journal.beginning.plan, journal.path.parent
    finished = [shard for shard in plan.shards if shard.name in journal.finished]
    problems = [
        *_changed_means(journal.beginning.means, _means(options)),
        *_changed_adapter(journal.beginning),
        *_missing_base(journal, _LOST.format(folder=folder)),
        *_damaged_shards(finished, staged, _LOST.format(folder=folder)),
    ]
    if problems:
        raise OutputError(*problems)


def needed_base_files(journal: Journal) -> set[str]:
    """Return the base shards that shards which are not finished read."""
    consumption = plan_consumption(journal.beginning.plan, journal.finished)
    return {
        path
        for shard in consumption.order
        if shard.name not in journal.finished
        for path in consumption.frees[shard.name]
    }


def deletable_files(journal: Journal | None, consumption: Consumption) -> list[str]:
    """Return the base shards that are still to be deleted, without a journal all that ever are."""
    paths = [path for shard in consumption.order for path in consumption.frees[shard.name]]
    return [path for path in paths if journal is None or is_file_of(journal.beginning.base[path], path)]


def is_file_of(status: FileStatus, path: str) -> bool:
    """Whether the very file of that status lies at `path`, its content untouched; not a link to it."""
    try:
        return not Path(path).is_symlink() and file_status(path).has_same_content(status)
    except OSError:
        return False


def _means(options: RunOptions) -> dict[str, str]:
    return {"rawmerge": __version__, "torch": installed_version("torch"), "device": options.device}


def _changed_means(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Problem]:
    hint = "finish the merge with what it began with"
    for name, value in before.items():
        if now.get(name) != value:
            yield Problem(name, f"{value}, as when the merge began", str(now.get(name)), hint)


def _changed_adapter(beginning: Beginning) -> Iterator[Problem]:
    for file in beginning.plan.adapter_files:
        try:
            is_same = file_sha256(file) == beginning.adapter.get(file.path)
        except (OSError, RawmergeError):
            is_same = False
        if not is_same:
            yield Problem(file.path, "the adapter that the merge began with", "another, or none", _HINT)


def _missing_base(journal: Journal, hint: str) -> Iterator[Problem]:
    for path in sorted(needed_base_files(journal)):
        if not is_file_of(journal.beginning.base[path], path):
            yield Problem(path, "the base shard that the merge began with", "another file, or none", hint)


def _damaged_shards(shards: Iterable[ShardPlan], staged: Path, hint: str) -> Iterator[Problem]:
    for shard in shards:
        path = staged / shard.name
        if not is_shard_file(path, shard):
            yield Problem(str(path), "the shard as it was written", "another file, or none", hint)
