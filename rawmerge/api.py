"""The library: hub ids and paths in, plans and checkpoints out. Never prints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rawmerge.hub import resolve_adapter, resolve_base, resolve_either
from rawmerge.inspection import Inspection, inspect_root
from rawmerge.jobs import ProgressCallback
from rawmerge.merge_plan import MergeOptions, MergePlan
from rawmerge.plan import make_plan
from rawmerge.run import MergeSummary, run_plan


def plan_merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
) -> MergePlan:
    """Decide a merge from headers and configs; nothing is written.

    Args:
        base: directory, safetensors file, or hub id `org/name[@revision]`.
        adapter: directory, its safetensors file, or hub id.
        compute_dtype: `float32` is bit-equal to PEFT's default merge on CPU; `float64` gives the same bytes on
            every machine.
        dtype: `float32`, `bfloat16` or `float16` for all float tensors of the output; None keeps each tensor's own.

    Raises:
        RefusedError: with every reason against the merge in `.problems`.
        ValueError: an option is none of its choices.
    """
    options = MergeOptions(compute_dtype=compute_dtype, output_dtype=dtype or "")
    base_source, adapter_source = resolve_base(base), resolve_adapter(adapter)
    plan = make_plan(base_source.path, adapter_source.path, options)
    return replace(plan, base_repo=base_source.pinned, adapter_repo=adapter_source.pinned)


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> MergeSummary:
    """Plan a merge and run it: `output` appears complete, or not at all.

    Args:
        base: see `plan_merge`, as for `adapter`, `compute_dtype` and `dtype`.
        adapter: see `plan_merge`.
        output: directory to make.
        compute_dtype: see `plan_merge`.
        dtype: see `plan_merge`.
        overwrite: replace a checkpoint that stands at `output`, once the new one is complete.
        threads: how many threads work; changes no bit of the output.
        progress: called as bytes are finished; an exception from it cancels the merge and leaves nothing behind.

    Raises:
        RefusedError: nothing was written; reasons in `.problems`.
        MergeError: writing failed; nothing was published and nothing is left.
        ValueError: an option is none of its choices.
    """
    plan = plan_merge(base, adapter, compute_dtype=compute_dtype, dtype=dtype)
    return run_plan(plan, Path(output), overwrite=overwrite, threads=threads, progress=progress)


def inspect_path(path: str | os.PathLike[str]) -> Inspection:
    """Tell what a directory, file or hub id holds: a base or an adapter, and whether it can be merged.

    Raises:
        RefusedError: neither a base nor an adapter can be read there.
    """
    return inspect_root(resolve_either(path).path)
