"""`OUTPUT.rawmerge-unfinished`: where a merge that consumes its base works, and what is left of one that was cut off.

The folder holds `output`, the checkpoint as far as it is written, and the journal. Once a base shard has been deleted
it is the only copy of that shard's tensors, so nothing removes it but the same command, once the output is published.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.consuming.journal import JOURNAL_NAME, Journal, read_journal
from rawmerge.consuming.plan_difference import difference, option_differences, plan_differences
from rawmerge.errors import OutputError, Problem, quote
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.output.folder_lock import locked_folder

SUFFIX: Final = ".rawmerge-unfinished"
STAGED_NAME: Final = "output"
REPLACED_NAME: Final = f"{STAGED_NAME}-old"  # as StagingDirectory names it
#: Names of folders that were being removed: whoever finds one may go on with it.
GONE: Final = re.compile(r"\.rawmerge-\d+-[0-9a-f]{8}-old")
_OWN_NAMES: Final = {JOURNAL_NAME, STAGED_NAME, REPLACED_NAME}


@dataclass(frozen=True, slots=True)
class UnfinishedFolder:
    """The working folder of one output.

    Attributes:
        path: where it is, or would be.
    """

    path: Path

    @property
    def staged(self) -> Path:
        """The output before it is published."""
        return self.path / STAGED_NAME

    @property
    def replaced(self) -> Path:
        """The output that stood there before, while the new one takes its place."""
        return self.path / REPLACED_NAME

    def journal(self) -> Journal | None:
        """Return the journal of a merge that was cut off; None where there is none.

        Raises:
            OutputError: it cannot be read.
        """
        return read_journal(self.path)

    def check(self, plan: MergePlan, *, consumes: bool) -> Journal | None:
        """Return the journal where this very plan may go on from it; None where there is none.

        Raises:
            OutputError: the folder belongs to another merge, or to someone else.
        """
        journal = self.journal()
        if journal is None:
            if consumes and os.path.lexists(self.path):
                self._check_is_own()
            return None
        differences = list(plan_differences(journal.beginning.plan, plan))
        if not consumes:
            differences.append(difference("--consume-base", "given", "not given"))
        if differences:
            raise self.refusal(journal, differences)
        return journal

    def refusal(self, journal: Journal, differences: Iterable[Problem]) -> OutputError:
        """Return why another merge to the same output is refused: in what it differs, and what can be done."""
        plan = journal.beginning.plan
        found = f"one of {', '.join(adapter.root for adapter in plan.adapters)} into {plan.base_root}"
        expected = "no unfinished merge to this output, or the same command"
        return OutputError(Problem(str(self.path), expected, found, self._way_out(journal)), *differences)

    def _way_out(self, journal: Journal) -> str:
        count = len(journal.deleted)
        if journal.failed_tensor:
            return (
                f"it cannot be finished, for {quote(journal.failed_tensor)} would fail again; fetch the base again, "
                "remove the folder, and merge anew"
            )
        hint = "run its command again, with --consume-base, to finish it"
        if journal.deleted:
            return f"{hint}; it holds the only copy of {count} shard{'s'[: count != 1]} deleted from the base"
        return f"{hint}, or remove the folder: the base is still whole"

    def is_published(self, journal: Journal) -> bool:
        """Whether all that is left to do is to remove the folder."""
        return journal.is_complete and not self.staged.exists()

    def clear(self) -> None:
        """Empty the folder of a merge that has deleted nothing; without its journal, the rest counts for nothing."""
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        for path in (self.replaced, self.staged):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder of a merge that has deleted nothing, or has published its output.

        It loses its name first: a process that is killed here leaves a hidden folder behind, not half a journal.
        """
        if self._foreign_names():
            self.clear()  # someone put something there: it stays
            return
        gone = self.path.with_name(f".rawmerge-{os.getpid()}-{os.urandom(4).hex()}-old")  # GONE knows it
        with suppress(OSError):
            self.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder where it is missing, and keep every other process out of it in the block.

        Raises:
            OutputError: another process works in it.
        """
        with locked_folder(self.path):
            yield

    def _check_is_own(self) -> None:
        if self._foreign_names():
            hint = "remove it, or choose another output"
            raise OutputError(Problem(str(self.path), "no such folder, or one of rawmerge's", "other files", hint))

    def _foreign_names(self) -> set[str]:
        """Return what is in the folder that no merge put there."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {self.path.name}
        return names - _OWN_NAMES


def unfinished_plan(
    output: Path, options: MergeOptions, other_inputs: Callable[[MergePlan], Iterable[Problem]]
) -> MergePlan | None:
    """Return the plan of an unfinished merge to `output`, for the command that began it; None where there is none.

    Args:
        output: the directory to make.
        options: the choices of the command.
        other_inputs: what the command names as base and adapter that is not a plan's.

    Raises:
        OutputError: the unfinished merge is another one's, or its journal cannot be read.
    """
    folder = unfinished_folder(output)
    journal = folder.journal()
    if journal is None:
        return None
    plan = journal.beginning.plan
    if differences := [*option_differences(plan.options, options), *other_inputs(plan)]:
        raise folder.refusal(journal, differences)
    return plan


def unfinished_folder(output: Path) -> UnfinishedFolder:
    """Return the folder beside `output` in which a merge that consumes its base works."""
    at = Path(os.path.abspath(output))  # noqa: PTH100  # `out/..` has no name of its own
    return UnfinishedFolder(at.parent / f"{at.name}{SUFFIX}")
