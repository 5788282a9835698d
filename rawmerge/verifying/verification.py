"""Verifies an output: alone, or against the base and the adapter that it should come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Final

from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MissingFileError, Problem, RefusedError, VerificationError, quote
from rawmerge.formats.card_metadata import CARD_NAME
from rawmerge.formats.model_config import ModelConfig
from rawmerge.inputs.adapter import is_adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, read_base
from rawmerge.matching.tied_copies import tied_copy
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.output.manifest import MANIFEST_NAME
from rawmerge.output.staging_directory import hidden_beside
from rawmerge.run_options import RunOptions
from rawmerge.verifying.checkpoint_check import checkpoint_problems
from rawmerge.verifying.config_check import config_notes, config_problems
from rawmerge.verifying.diagnosis import diagnose
from rawmerge.verifying.file_check import card_problems, file_notes, file_problems
from rawmerge.verifying.findings import NOT_REPLAYED, TensorDifference, Verification
from rawmerge.verifying.folder_check import FolderCheck
from rawmerge.verifying.merge_record import MergeRecord
from rawmerge.verifying.replay import layout_problems, replay

_HALTED: Final = "it cannot be read as a checkpoint: nothing else was looked at"
_NO_CONFIG: Final = "its config cannot be read, so nothing in it was compared with the tensors"


class OutputVerifier:
    """Verifies one output, of which record, headers, index and config are read once."""

    def __init__(self, output: Path) -> None:
        """Read what describes the output.

        Args:
            output: the checkpoint; of rawmerge or of another program.

        Raises:
            MissingFileError: there is no checkpoint; OSError: a file cannot be read.
        """
        _check_is_checkpoint(output)
        self._output = output
        self._record = MergeRecord(output)
        self._found, self._unreadable = _read(output.absolute())

    def options(self, given: MergeOptions | Mapping[str, str | int | float | None], adapter_count: int) -> MergeOptions:
        """Return the choices by which the output is replayed; see `MergeRecord.options`."""
        return self._record.options(given, adapter_count)

    def alone(self) -> Verification:
        """Verify what the output tells of itself: headers, index, config, record, and the checksums of its files.

        Raises:
            OSError: a file cannot be read.
        """
        found = self._found
        if found is None:
            return self._halted(replayed=False)
        folder = FolderCheck(found, is_ours=self._record.exists)
        looked = f"compared by {MANIFEST_NAME} only" if folder.has_manifest else "not looked at"
        notes = (*config_notes(found), f"{NOT_REPLAYED}{looked}")
        return self._verification(found, folder, config_problems(found), notes)

    def against(
        self,
        plan: MergePlan,
        options: RunOptions,
        *,
        tolerance: float = 0,
        report: ProgressCallback | None = None,
    ) -> Verification:
        """Replay a plan, and compare the output with it.

        Args:
            plan: what it should be.
            options: threads, memory, and means of speed not to use.
            tolerance: distance that passes in tensors that the adapter changes, in units in the last place of the
                larger of the expected value and the base's.
            report: told of the progress.

        Raises:
            MergeError: the plan cannot be computed, or an input changed; MemoryLimitError: the limit cannot be kept.
            OSError: a file cannot be read.
        """
        found, record = self._found, self._record
        if found is None:
            return self._halted(replayed=True)
        differences = replay(plan, found.tensors, options, report)
        problems = (
            *layout_problems(plan, found.tensors, tied_copy(found)),
            *diagnose(plan, differences, tolerance),
            *(file_problems(plan, found, record.fields) if record.exists else ()),
        )
        folder = FolderCheck(found, is_ours=record.exists)
        of_files = self._card_notes(plan) if record.exists else file_notes(plan, found)
        notes = (*_config_notes(found), *of_files, *record.notes())
        return self._verification(found, folder, problems, notes, differences)

    def card_problems(self, plan: MergePlan) -> tuple[Problem, ...]:
        """Return what is wrong with a model card that nobody can have edited yet."""
        return tuple(card_problems(plan, self._output)) if self._output.is_dir() else ()

    def _card_notes(self, plan: MergePlan) -> Iterator[str]:
        if self.card_problems(plan):
            yield (
                f"{CARD_NAME} is not what a merge would write now: it was edited, or base or adapter had another name "
                "or another card"
            )

    def _halted(self, *, replayed: bool) -> Verification:
        return Verification(str(self._output), replayed, 0, 0, self._unreadable, notes=(_HALTED,))

    def _verification(
        self,
        found: BaseCheckpoint,
        folder: FolderCheck,
        problems: Iterable[Problem],
        notes: Iterable[str],
        differences: Sequence[TensorDifference] | None = None,
    ) -> Verification:
        """Return a verification with what is looked at in any case; it was replayed where there are `differences`."""
        return Verification(
            output=str(self._output),
            replayed=differences is not None,
            tensor_count=len(found.tensors),
            element_count=sum(prod(at.shape) for at in found.tensors.values()),
            findings=(
                *self._unreadable,
                *self._record.problems,
                *checkpoint_problems(found, self._record.fields),
                *problems,
                *folder.problems(),
            ),
            differences=tuple(differences or ()),
            notes=(*notes, *folder.notes(), *([_NO_CONFIG] if self._unreadable else [])),
        )


def verify_staged(folder: Path, plan: MergePlan, options: RunOptions, report: ProgressCallback | None = None) -> None:
    """Replay a plan before its output is published.

    Args:
        folder: where the output stands.
        plan: what it should be.
        options: threads, memory, and means of speed not to use.
        report: told of the progress, from the start.

    Raises:
        VerificationError: with all findings. MergeError: an input changed; OSError: a file cannot be read.
    """
    verifier = OutputVerifier(folder)
    findings = (*verifier.against(plan, options, report=report).findings, *verifier.card_problems(plan))
    if findings:
        raise VerificationError("what was written is not what was computed; nothing was published", findings)


def _check_is_checkpoint(output: Path) -> None:
    if output.exists():
        found, hint = "an adapter", "name the output first, and the adapter behind --adapter"
        is_wrong = is_adapter(output)
    else:
        found, hint, is_wrong = "nothing there", "check the path: a directory, or a file of weights", True
        if hidden_beside(output).exists():
            hint = f"a merge to it was cut off ({quote(hidden_beside(output))}): run its command again"
    if is_wrong:
        raise MissingFileError(Problem(str(output), "a merged checkpoint", found, hint))


def _read(root: Path) -> tuple[BaseCheckpoint | None, tuple[Problem, ...]]:
    """Return a checkpoint, without its config where only that cannot be read; and what cannot be read."""
    try:
        return read_base(root), ()
    except RefusedError as error:
        problems = error.problems
    try:
        return read_base(root, ModelConfig("", {})), problems
    except RefusedError as error:
        return None, error.problems


def _config_notes(found: BaseCheckpoint) -> Iterator[str]:
    """Yield what is odd in a config of which the output's maker is not to blame: it may be the base's own."""
    yield from config_notes(found)
    for problem in config_problems(found):
        yield f"{quote(problem.subject)}: expected {problem.expected}, found {problem.found}"
