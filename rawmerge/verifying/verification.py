"""Verifies an output: alone, or against the base and the adapter that it should come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import Problem, RefusedError, VerificationError
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, read_base
from rawmerge.inputs.identity import RECORD_NAME, read_record
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.output.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, manifest_problems
from rawmerge.output.record import RECORD_FORMAT
from rawmerge.run_options import RunOptions
from rawmerge.verifying.checkpoint_check import checkpoint_problems
from rawmerge.verifying.diagnosis import diagnose
from rawmerge.verifying.file_check import file_notes, file_problems
from rawmerge.verifying.findings import Verification
from rawmerge.verifying.replay import layout_problems, replay

#: Fields of `MergeOptions` by the record's names for them, and what the record calls an empty one.
_RECORDED: Final = {
    "compute_dtype": ("compute_dtype", ""),
    "dtype": ("output_dtype", "as stored"),
    "vocab": ("vocab", "as stored"),
    "tokenizer": ("tokenizer", ""),
    "moe_lora_b_layout": ("moe_lora_b_layout", "as marked"),
}


def verify_alone(output: Path) -> Verification:
    """Verify what an output tells of itself: headers, index, config and record."""
    try:
        found = read_base(output.absolute())
    except RefusedError as error:
        return Verification(str(output), False, 0, 0, error.problems)
    record = read_record(found.root)
    notes = [record.note] if record.note else []
    listed = list(_manifest_problems(found))
    has_manifest = found.is_directory and (found.root / MANIFEST_NAME).is_file()
    looked = f"compared by {MANIFEST_NAME} only" if has_manifest else "not looked at"
    notes.append(f"base and adapter were not given: values were {looked}")
    problems = (*checkpoint_problems(found, record.fields), *listed)
    return _verification(output, found, problems, replayed=False, notes=tuple(notes))


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
        OSError: a file cannot be read.
    """
    try:
        found = read_base(output.absolute())
    except RefusedError as error:
        return Verification(str(output), True, 0, 0, error.problems)
    record = read_record(found.root).fields
    is_ours = record.get("format") == RECORD_FORMAT
    differences = replay(plan, found.tensors, options, report)
    problems = [
        *checkpoint_problems(found, record),
        *layout_problems(plan, found.tensors),
        *diagnose(plan, differences, tolerance),
        *(file_problems(plan, found, record) if is_ours else ()),
        *_manifest_problems(found),
    ]
    notes = [*(() if is_ours else file_notes(plan, found)), *_device_notes(record)]
    made = _verification(output, found, tuple(problems), replayed=True, notes=tuple(notes))
    return replace(made, differences=differences)


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


def recorded_options(output: Path) -> Mapping[str, str]:
    """Return the choices that an output's record tells, as arguments of `MergeOptions`; none without a record."""
    record = read_record(output).fields
    stated = record.get("options")
    if record.get("format") != RECORD_FORMAT or not isinstance(stated, dict):
        return {}
    found = {field: (stated.get(name), empty) for name, (field, empty) in _RECORDED.items()}
    return {field: "" if value == empty else value for field, (value, empty) in found.items() if isinstance(value, str)}


def options_to_verify(output: Path, given: Mapping[str, str | None]) -> MergeOptions:
    """Return the choices by which an output is replayed: those given, else the record's, else the usual ones.

    A wrong base must not keep the replay from being made: it is what a verification is to find.
    """
    stated = {name: value for name, value in given.items() if value is not None}
    return MergeOptions(**{**recorded_options(output), **stated}, force=True)


def _manifest_problems(found: BaseCheckpoint) -> Iterator[Problem]:
    """Yield what a manifest in the checkpoint contradicts; nothing where there is none."""
    path = found.root / MANIFEST_NAME
    if not found.is_directory or not path.is_file():
        return
    try:
        yield from manifest_problems(found.root, read_small_file(path, MAX_MANIFEST_BYTES))
    except RefusedError as error:
        yield from error.problems


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
