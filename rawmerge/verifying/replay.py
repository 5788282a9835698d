"""Computes every tensor of a plan again, and compares it with a checkpoint that is there. Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from rawmerge.computing.step_paths import StepPaths
from rawmerge.dtypes import OUTPUT_DTYPES
from rawmerge.engine.engine import Engine
from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import Problem
from rawmerge.inputs.input_check import check_inputs
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.memory.budget import COMPARING_BYTES, choose_budget
from rawmerge.merge_plan import MergePlan
from rawmerge.run_options import RunOptions
from rawmerge.verifying.compared_shard import ComparedShard
from rawmerge.verifying.findings import TensorDifference
from rawmerge.verifying.piece_sums import PieceSummers


def replay(
    plan: MergePlan, tensors: Mapping[str, TensorSource], options: RunOptions, report: ProgressCallback | None = None
) -> tuple[TensorDifference, ...]:
    """Return how the tensors of a checkpoint differ from what the plan gives, in the order of the plan.

    Tensors of another dtype or shape are not compared: `layout_problems` tells them.

    Args:
        plan: what the checkpoint should hold.
        tensors: the checkpoint's.
        options: threads, memory, and means of speed not to use.
        report: told of the progress; an exception from it ends the replay.

    Raises:
        MergeError: a tensor cannot be computed, or an input changed; MemoryLimitError: the limit cannot be kept.
        OSError: a file cannot be read.
    """
    check_inputs(plan.base_files, plan.adapter_files)
    paths = StepPaths(plan.options.compute_dtype, options)
    budget, _ = choose_budget(plan, options, paths, COMPARING_BYTES)
    entries = {step.entry.name: step.entry for step in plan.steps()}
    alike = {
        name: found
        for name, found in tensors.items()
        if name in entries and (found.dtype, found.shape) == (entries[name].dtype, entries[name].shape)
    }
    _forget({found.path for found in alike.values()})
    summers = PieceSummers()
    shards = [ComparedShard(shard, alike, summers) for shard in plan.shards]
    engine = Engine(plan.options.compute_dtype, plan.tensor_bytes, options, budget=budget, paths=paths, measures=False)
    engine.run(zip(plan.shards, shards, strict=True), report)
    return tuple(tally.difference() for shard in shards for tally in shard.tallies if tally.has_differences)


def _dtype_hint(code: str) -> str:
    names = {code: name for name, code in OUTPUT_DTYPES.items()}
    return f"if it was merged so, give --dtype {names[code]}" if code in names else ""


def _forget(paths: Iterable[str]) -> None:
    """Let the system give up its copies of files in memory: what is compared is what the disk holds."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def layout_problems(plan: MergePlan, tensors: Mapping[str, TensorSource], second_name: str = "") -> Iterator[Problem]:
    """Yield what is missing from a checkpoint, or there without reason, or of another dtype or shape.

    Args:
        plan: what the checkpoint should hold.
        tensors: the checkpoint's.
        second_name: one of them that another's bytes may have beside its own.
    """
    names = set()
    for step in plan.steps():
        entry, found = step.entry, tensors.get(step.entry.name)
        names.add(entry.name)
        expected = f"{entry.dtype} {list(entry.shape)}"
        if found is None:
            yield Problem(entry.name, expected, "no such tensor")
        elif (found.dtype, found.shape) != (entry.dtype, entry.shape):
            hint = _dtype_hint(found.dtype) if found.shape == entry.shape else ""
            yield Problem(entry.name, expected, f"{found.dtype} {list(found.shape)}", hint)
    for name, found in tensors.items():
        if name not in names and name != second_name:
            yield Problem(name, "no such tensor", f"{found.dtype} {list(found.shape)}")
