"""Verifies an output: alone, or against the base and the adapter that it should come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MissingFileError, Problem, RefusedError, VerificationError
from rawmerge.inputs.adapter import is_adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, read_base
from rawmerge.inputs.identity import RECORD_NAME, read_record
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_options import CHOICES, MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.output.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, manifest_problems
from rawmerge.run_options import RunOptions
from rawmerge.verifying.checkpoint_check import checkpoint_notes, checkpoint_problems
from rawmerge.verifying.diagnosis import diagnose
from rawmerge.verifying.file_check import file_notes, file_problems
from rawmerge.verifying.findings import Verification
from rawmerge.verifying.replay import layout_problems, replay

#: Fields of `MergeOptions` by the record's names for them, and what the record calls an empty one.
_RECORDED: Final = {
    "compute_dtype": ("compute_dtype", "float32"),
    "dtype": ("output_dtype", "as stored"),
    "vocab": ("vocab", "as stored"),
    "tokenizer": ("tokenizer", "base"),
    "moe_lora_b_layout": ("moe_lora_b_layout", "as marked"),
}


_HALTED: Final = "it cannot be read as a checkpoint: nothing else was looked at"


def verify_alone(output: Path) -> Verification:
    """Verify what an output tells of itself: headers, index, record, and the checksums of its files.

    Raises:
        MissingFileError: there is no checkpoint; OSError: a file cannot be read.
    """
    _check_is_checkpoint(output)
    try:
        found = read_base(output.absolute())
    except RefusedError as error:
        return Verification(str(output), False, 0, 0, error.problems, notes=(_HALTED,))
    record = _Record(found.root)
    looked = f"compared by {MANIFEST_NAME} only" if _has_manifest(found) else "not looked at"
    notes = (*checkpoint_notes(found), f"base and adapter were not given: values were {looked}")
    problems = (*record.problems, *checkpoint_problems(found, record.fields), *_manifest_problems(found))
    return _verification(output, found, problems, replayed=False, notes=notes)


def verify_against(
    output: Path,
    plan: MergePlan,
    options: RunOptions,
    *,
    tolerance: float = 0,
    report: ProgressCallback | None = None,
) -> Verification:
    """Replay a plan, and compare an output with it.

    Args:
        output: the checkpoint; of rawmerge or of another program.
        plan: what it should be.
        options: threads, memory, and means of speed not to use.
        tolerance: distance that passes in tensors that the adapter changes, in units in the last place of the larger
            of the expected value and the base's.
        report: told of the progress.

    Raises:
        MergeError: the plan cannot be computed, or an input changed; MemoryLimitError: the limit cannot be kept.
        MissingFileError: there is no checkpoint; OSError: a file cannot be read.
    """
    _check_is_checkpoint(output)
    try:
        found = read_base(output.absolute())
    except RefusedError as error:
        return Verification(str(output), True, 0, 0, error.problems, notes=(_HALTED,))
    record = _Record(found.root)
    differences = replay(plan, found.tensors, options, report)
    problems = (
        *record.problems,
        *checkpoint_problems(found, record.fields),
        *layout_problems(plan, found.tensors),
        *diagnose(plan, differences, tolerance),
        *(file_problems(plan, found, record.fields) if record.exists else ()),
        *_manifest_problems(found),
    )
    notes = (*(() if record.exists else file_notes(plan, found)), *_device_notes(record.fields))
    made = _verification(output, found, problems, replayed=True, notes=(*checkpoint_notes(found), *notes))
    return replace(made, differences=differences)


class _Record:
    """The merge record of an output.

    Attributes:
        exists: whether there is one, so that the output is rawmerge's.
        fields: what it says; empty where it cannot be read.
        options: the choices that it tells, as arguments of `MergeOptions`.
        problems: why it cannot be read, and choices that there are not.
    """

    def __init__(self, output: Path) -> None:
        folder = output if output.is_dir() else output.parent
        found = read_record(folder)
        self.exists = os.path.lexists(folder / RECORD_NAME)
        self.fields: Mapping[str, Any] = found.fields
        self.options: dict[str, str] = {}
        self.problems: list[Problem] = []
        if self.exists and not found.fields:
            self.problems.append(Problem(RECORD_NAME, "a merge record", found.note or "one that says nothing"))
        stated = found.fields.get("options")
        for name, (field, empty) in _RECORDED.items():
            self._take(field, name, stated.get(name, empty) if isinstance(stated, dict) else empty, empty)

    def _take(self, field: str, name: str, value: object, empty: str) -> None:
        if value == empty:
            return
        if isinstance(value, str) and value in CHOICES[field]:
            self.options[field] = value
        else:
            self.problems.append(Problem(f"{RECORD_NAME}: {name}", f"one of {CHOICES[field]}", ascii(value)[:80]))


def _check_is_checkpoint(output: Path) -> None:
    found = "nothing there" if not output.exists() else "an adapter" if is_adapter(output) else ""
    if found:
        raise MissingFileError(Problem(str(output), "a merged checkpoint", found))


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
    made = verify_against(folder, plan, options, report=report)
    if made.findings:
        raise VerificationError("what was written is not what was computed; nothing was published", made.findings)


def options_to_verify(output: Path, given: Mapping[str, str | None]) -> MergeOptions:
    """Return the choices by which an output is replayed: those given, else the record's, else the usual ones.

    A wrong base must not keep the replay from being made: it is what a verification is to find.
    """
    stated = {name: value for name, value in given.items() if value is not None}
    return MergeOptions(**{**_Record(output).options, **stated}, force=True)


def _has_manifest(found: BaseCheckpoint) -> bool:
    return found.is_directory and os.path.lexists(found.root / MANIFEST_NAME)


def _manifest_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield what a manifest in the checkpoint contradicts; nothing where there is none."""
    if not _has_manifest(found):
        return
    try:
        raw = read_small_file(found.root / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except RefusedError as error:
        yield from error.problems
        return
    yield from manifest_problems(found.root, raw, (shard.path.name for shard in found.shards))


def _device_notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    options = record.get("options")
    device = options.get("device") if isinstance(options, dict) else None
    if not isinstance(device, str) or device == "cpu":
        return ()
    return (f"by its {RECORD_NAME} it was computed on {ascii(device)[:40]}, where last bits may be others",)


def _verification(
    output: Path, found: BaseCheckpoint, problems: tuple[Problem, ...], *, replayed: bool, notes: tuple[str, ...]
) -> Verification:
    elements = sum(prod(at.shape) for at in found.tensors.values())
    return Verification(str(output), replayed, len(found.tensors), elements, problems, notes=notes)
