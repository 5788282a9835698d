"""The library: hub ids and paths in, plans and checkpoints out. Never prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MergeError, RawmergeError, quote
from rawmerge.inputs.hub import resolve_either
from rawmerge.inspection import Inspection, inspect_root
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.planning import (
    Adapters,
    MergeChoices,
    PlanChoices,
    chosen_options,
    plan_for_output,
    plan_inputs,
    read_errors_refused,
    split_choices,
)
from rawmerge.run import MergeSummary, run_plan
from rawmerge.run_options import ReplayChoices, RunOptions
from rawmerge.verifying.findings import Verification


def plan_merge(
    base: str | os.PathLike[str],
    adapter: Adapters,
    *,
    options: MergeOptions | None = None,
    **choices: Unpack[PlanChoices],
) -> MergePlan:
    """Decide a merge from headers and configs; nothing is written.

    Args:
        base: directory, safetensors file, or hub id `org/name[@revision]`.
        adapter: directory, its safetensors file, or hub id; or several of them, each as `path:0.7` if its deltas are to
            be multiplied, by 0 to leave it out.
        options: what decides the output's bytes, from `choose_options`; or else
        choices: the same, name by name: `compute_dtype`, `dtype`, `order`, `combine` and so on, the fields of
            `MergeOptions`.

    Raises:
        RefusedError: with every reason against the merge in `.problems`.
        ValueError: an option is none of its choices, or options are given in both ways.
    """
    return plan_inputs(base, adapter, chosen_options(options, choices))


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: Adapters,
    output: str | os.PathLike[str],
    *,
    options: MergeOptions | None = None,
    progress: ProgressCallback | None = None,
    **choices: Unpack[MergeChoices],
) -> MergeSummary:
    """Plan a merge and run it: `output` appears complete, or not at all.

    Args:
        base: see `plan_merge`.
        adapter: see `plan_merge`.
        output: directory to make.
        options: see `plan_merge`.
        progress: called as bytes are finished; an exception from it cancels the merge and leaves nothing behind, but
            with `consume_base`: then the same call goes on.
        choices: what decides the output's bytes, if there are no `options`, and how the plan is carried out, none of
            which changes a bit on the CPU: `overwrite: bool`, `threads: int | None`, `max_memory: int | None` in bytes,
            `device: str` (`cpu`, `cuda`, `cuda:1`, `mps`), `link: bool`, `consume_base: bool`, `reuse: bool`,
            `resume: bool`, `verify: bool`, `checksum: bool`, `without: Collection[str]`, the fields of `RunOptions`.

    Raises:
        RefusedError: nothing was written; reasons in `.problems`.
        MergeError: writing failed; nothing was published. Where the system failed it, finished shards are kept, as its
            notes say, and the same call goes on from them, unless `resume` is off.
        ValueError: an option is none of its choices, or options are given in both ways.
    """
    planned, run = split_choices(choices)
    chosen = chosen_options(options, planned)
    plan = plan_for_output(base, adapter, output, chosen, consumes=run.get("consume_base", False))
    return run_plan(plan, Path(output), progress=progress, **run)


def verify_merge(
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapter: Adapters | None = None,
    *,
    compute_dtype: str | None = None,
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str | None = None,
    moe_lora_b_layout: str | None = None,
    order: str | None = None,
    replaced_by: int | None = None,
    combine: str | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    seed: int | None = None,
    tolerance: float = 0,
    progress: ProgressCallback | None = None,
    **choices: Unpack[ReplayChoices],
) -> Verification:
    """Tell whether `output` is what base and adapter give; nothing is written, and no more is held than by a merge.

    With base and adapter, every tensor is computed again and compared bit for bit, whoever merged them and however the
    output is cut into shards. Without them, headers, index, config and record are compared with each other.

    Args:
        output: directory or safetensors file.
        base: see `plan_merge`; None, as `adapter`, to look at the output alone.
        adapter: see `plan_merge`.
        compute_dtype: see `plan_merge`; None for what the output's record tells, else `float32`. The same goes for all
            options here.
        dtype: see `plan_merge`.
        vocab: see `plan_merge`.
        tokenizer: see `plan_merge`.
        moe_lora_b_layout: see `plan_merge`.
        order: see `plan_merge`.
        replaced_by: see `plan_merge`.
        combine: see `plan_merge`; where it is given, `density`, `majority_sign` and `seed` are not the record's.
        density: see `plan_merge`.
        majority_sign: see `plan_merge`.
        seed: see `plan_merge`.
        tolerance: distance that passes in tensors that the adapter changes, in units in the last place of the larger
            of the expected value and the base's. Tensors that it does not change must be equal.
        progress: called as bytes are compared; an exception from it ends the verification.
        choices: `threads`, `max_memory` and `without`, as in `RunOptions`.

    Raises:
        RefusedError: base and adapter allow no merge. MergeError: the merge cannot be computed, or a file cannot be
            read. ValueError: an option is none of its choices, or one of base and adapter is missing.
    """
    from rawmerge.verifying.verification import OutputVerifier  # no merge needs it

    if (base is None) != (adapter is None):
        raise ValueError("base and adapter go together")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of at least 0, not {tolerance!r}")
    at = Path(output).expanduser()
    given: dict[str, str | int | float | None] = {
        "compute_dtype": compute_dtype,
        "dtype": dtype,
        "vocab": vocab,
        "tokenizer": tokenizer,
    }
    given |= {"moe_lora_b_layout": moe_lora_b_layout, "order": order, "replaced_by": replaced_by}
    given |= {"combine": combine, "density": density, "majority_sign": majority_sign, "seed": seed}
    with read_errors_refused(at):
        verifier = OutputVerifier(at)
        if base is None or adapter is None:
            return verifier.alone()
        options = verifier.options(given)
    plan = plan_inputs(base, adapter, options)
    try:
        return verifier.against(plan, RunOptions(**choices), tolerance=tolerance, report=progress)
    except OSError as error:
        if isinstance(error, RawmergeError):
            raise
        raise MergeError(f"{quote(error.filename or at)}: {error.strerror or error}; it was not verified") from error


def inspect_path(path: str | os.PathLike[str]) -> Inspection:
    """Tell what a directory, file or hub id holds: a base or an adapter, and whether it can be merged.

    Raises:
        RefusedError: neither a base nor an adapter can be read there.
    """
    with read_errors_refused(path):
        return inspect_root(resolve_either(path).path)
