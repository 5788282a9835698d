"""Runs a plan: staging directory, shards, side files, record, one rename. Decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path
from typing import Unpack

from rawmerge.adapter import read_weights
from rawmerge.engine import Engine
from rawmerge.errors import (
    InputChangedError,
    MergeError,
    NothingChangedError,
    PlanError,
    Problem,
    RefusedError,
    quote,
)
from rawmerge.formats.adapter_config import CONFIG_NAME
from rawmerge.formats.weight_map import is_safe_file_name
from rawmerge.identity import RECORD_NAME
from rawmerge.jobs import ProgressCallback
from rawmerge.merge_plan import KeepTensor, MergePlan, ReplaceTensor, ShardPlan, UpdateTensor
from rawmerge.output_directory import OutputPolicy, StagingDirectory, check_output, check_space
from rawmerge.record import record_text
from rawmerge.run_options import RunChoices, RunOptions
from rawmerge.shard_writer import OutputFile
from rawmerge.tensor_source import OpenFiles, TensorSource, read_shard_file


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a merge did.

    Attributes:
        output: the published directory.
        counts: tensors by what became of them: `kept`, `updated`, `cast`, `replaced`, `added`.
        unchanged: updated tensors of which no element changed: the delta is smaller than the rounding.
        byte_count: bytes of the output.
        seconds: wall time of the run.
        notes: the plan's notes, what a user may want to know.
    """

    output: str
    counts: dict[str, int]
    unchanged: tuple[str, ...]
    byte_count: int
    seconds: float
    notes: tuple[str, ...] = ()


def run_plan(
    plan: MergePlan,
    output: str | Path,
    *,
    progress: ProgressCallback | None = None,
    **choices: Unpack[RunChoices],
) -> MergeSummary:
    """Write what `plan` says to `output`; it appears complete, or not at all.

    Args:
        plan: from `plan_merge`.
        output: directory to make; it must not exist unless `overwrite`.
        choices: `RunOptions` tells them: `overwrite`, `threads`, `max_memory`, `device` and so on.
        progress: called in this thread as bytes are finished. An exception from it cancels the merge and leaves
            nothing behind.

    Raises:
        OutputError: the output may not be written; nothing was.
        MergeError: writing failed; nothing was published and nothing is left.
        ValueError: a choice is none of its values.
    """
    options = RunOptions(**choices)
    started = time.perf_counter()
    target = Path(output)
    check_target(plan, target, overwrite=options.overwrite)
    try:
        changed = _write(plan, target, options, progress)
    except OSError as error:
        raise MergeError(_describe(error)) from error
    return MergeSummary(
        output=str(target),
        counts=count_steps(plan),
        unchanged=tuple(name for name, is_changed in changed.items() if not is_changed),
        byte_count=plan.byte_count,
        seconds=time.perf_counter() - started,
        notes=plan.notes,
    )


def check_target(plan: MergePlan, output: Path, *, overwrite: bool = False) -> None:
    """Refuse an output that exists, cannot be written, touches an input, or does not fit on the disk.

    Raises:
        OutputError: with the reasons.
    """
    _check_names(plan)
    check_output(output, _policy(plan, overwrite))
    check_space(output, plan.byte_count)


def _check_names(plan: MergePlan) -> None:
    """Refuse a plan, which may come from a stranger's file, that would write outside the output or a file twice."""
    shards, texts = [shard.name for shard in plan.shards], [file.name for file in plan.written_files]
    sides = [file.name for file in plan.side_files]
    flat = (name for name in (*shards, *texts) if not is_safe_file_name(name))
    nested = (name for name in sides if {"", ".", ".."} & set(name.split("/")) or {"\\", "\0"} & set(name))
    twice = (name for name, count in Counter([*shards, *texts, *sides, RECORD_NAME]).items() if count > 1)
    expected = "a file of its own inside the output"
    if problems := [Problem(name, expected, "another path, or the name twice") for name in (*flat, *nested, *twice)]:
        raise PlanError(*problems)


def count_steps(plan: MergePlan) -> dict[str, int]:
    """Return how many output tensors are `kept`, `updated`, `cast`, `replaced` and `added` from the adapter."""
    counts = Counter({"kept": 0, "updated": 0, "cast": 0, "replaced": 0, "added": 0})
    for step in plan.steps():
        match step:
            case KeepTensor():
                counts["kept"] += 1
            case ReplaceTensor(base=None):
                counts["added"] += 1
            case ReplaceTensor() | UpdateTensor(updates=(), overlay=TensorSource()):
                counts["replaced"] += 1
            case UpdateTensor(updates=()):
                counts["cast"] += 1
            case UpdateTensor():
                counts["updated"] += 1
    return dict(counts)


def _policy(plan: MergePlan, overwrite: bool) -> OutputPolicy:
    shards = [Path(file.path) for file in (*plan.base_files, *plan.adapter_files)]
    sides = [Path(file.path) for file in plan.side_files]
    files = (*shards, *sides, Path(plan.base_root), Path(plan.adapter_root) / CONFIG_NAME)
    return OutputPolicy(overwrite, RECORD_NAME, Path(plan.base_root), files)


def _write(plan: MergePlan, target: Path, options: RunOptions, progress: ProgressCallback | None) -> dict[str, bool]:
    """Write and publish the output; return the updated tensors and whether any element of each changed."""
    engine = Engine(plan.options.compute_dtype, plan.tensor_bytes, options)
    with StagingDirectory(target) as staging:
        _check_inputs(plan)
        with ExitStack() as opened:
            engine.run(_open_shards(plan, staging.path, opened), progress)
        changed = _changes(plan, engine, staging.path)
        _copy_side_files(plan, staging.path)
        for file in plan.written_files:
            staging.write_text(file.name, file.text)
        staging.write_text(RECORD_NAME, record_text(plan, count_steps(plan)))
        staging.publish(_policy(plan, options.overwrite))
    return changed


def _check_inputs(plan: MergePlan) -> None:
    """Refuse inputs that are no longer what the plan was made from."""
    readers = [
        *((file, read_shard_file) for file in plan.base_files),
        *((file, read_weights) for file in plan.adapter_files),
    ]
    for file, read in readers:
        try:
            found = read(Path(file.path))
        except RefusedError as error:
            raise InputChangedError(str(error)) from error
        if (found.size, found.digest) != (file.byte_count, file.header_sha256):
            raise InputChangedError(
                f"{quote(file.path)}: expected the file that the plan was made from, found another; plan again"
            )


def _open_shards(plan: MergePlan, folder: Path, opened: ExitStack) -> Iterator[tuple[ShardPlan, OutputFile]]:
    for shard in plan.shards:
        yield shard, opened.enter_context(OutputFile(folder / shard.name, shard.byte_count))


def _changes(plan: MergePlan, engine: Engine, folder: Path) -> dict[str, bool]:
    updated = [step for step in plan.steps() if isinstance(step, UpdateTensor) and step.updates]
    changed = {step.entry.name: step.entry.name in engine.changed for step in updated}
    is_changed = any(changed.values()) or _has_other_tensors(plan)
    if not is_changed and not any(_replacement_differs(shard, folder) for shard in plan.shards):
        raise NothingChangedError
    return changed


def _has_other_tensors(plan: MergePlan) -> bool:
    """Whether the output has rows laid over the base's, or copies of its layers, whatever their values."""
    steps = list(plan.steps())
    overlaid = any(isinstance(step, UpdateTensor) and step.overlay for step in steps)
    copied = Counter((step.source.path, step.source.offset) for step in steps if step.source.byte_count)
    return overlaid or any(count > 1 for count in copied.values())


def _replacement_differs(shard: ShardPlan, folder: Path) -> bool:
    """Whether a tensor of the shard that came from the adapter differs from the base's."""
    with OpenFiles() as files:
        for step in shard.steps:
            if isinstance(step, ReplaceTensor):
                if step.base is None or step.entry.shape != step.base.shape:
                    return True
                written = replace(step.base, path=str(folder / shard.name), offset=shard.data_start + step.entry.start)
                is_cast = step.entry.dtype != step.base.dtype
                if is_cast or not all(map(eq, files.chunks(written), files.chunks(step.base))):
                    return True
    return False


def _copy_side_files(plan: MergePlan, folder: Path) -> None:
    with OpenFiles() as files:
        for side in plan.side_files:
            target = folder / side.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with OutputFile(target, side.byte_count) as file:
                file.copy_from(files, side.path, 0, 0, side.byte_count)
                file.finish()
            if Path(side.path).stat().st_size != side.byte_count:
                raise InputChangedError(f"{quote(side.path)}: expected {side.byte_count} bytes as planned; it changed")


def _describe(error: OSError) -> str:
    name = f"{quote(error.filename)}: " if error.filename else ""
    state = ", ".join(getattr(error, "__notes__", ())) or "nothing was published"
    return f"{name}{error.strerror or error}; {state}"
