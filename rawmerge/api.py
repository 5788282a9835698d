"""The library: hub ids and paths in, plans and checkpoints out. Never prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from rawmerge.consuming.finished_merge import finished_merge
from rawmerge.consuming.plan_difference import difference
from rawmerge.consuming.unfinished import unfinished_plan
from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MergeError, MissingFileError, OutputError, Problem, RawmergeError, quote
from rawmerge.formats.adapter_config import CONFIG_NAME as ADAPTER_CONFIG
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.hub import resolve_adapter, resolve_base, resolve_either
from rawmerge.inspection import Inspection, inspect_root
from rawmerge.merge_options import MergeOptions
from rawmerge.merge_plan import MergePlan
from rawmerge.plan import make_plan
from rawmerge.run import MergeSummary, run_plan
from rawmerge.run_options import ReplayChoices, RunChoices, RunOptions
from rawmerge.verifying.findings import Verification


def plan_merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str = "base",
    moe_lora_b_layout: str | None = None,
    force: bool = False,
) -> MergePlan:
    """Decide a merge from headers and configs; nothing is written.

    Args:
        base: directory, safetensors file, or hub id `org/name[@revision]`.
        adapter: directory, its safetensors file, or hub id.
        compute_dtype: `float32` is bit-equal to PEFT's default merge on CPU; `float64` sums in float64 and
            rounds once.
        dtype: `float32`, `bfloat16` or `float16` for all float tensors of the output; None keeps each tensor's own.
        vocab: `overlay` writes the rows of an adapter's smaller vocabulary over the first rows of the base's;
            None refuses such an adapter.
        tokenizer: whose tokenizer and chat template files the output gets, the `base`'s or the `adapter`'s.
        moe_lora_b_layout: how the columns of lora_B on fused experts are ordered, `rank_major` (PEFT) or
            `grouped_by_expert` (Unsloth until September 2026); None goes by the adapter's own marker, else PEFT's.
        force: merge although the adapter names another base, its stored embeddings are not the base's, or the base
            already holds this adapter.

    Raises:
        RefusedError: with every reason against the merge in `.problems`.
        ValueError: an option is none of its choices.
    """
    return _plan(base, adapter, merge_options(compute_dtype, dtype, vocab, tokenizer, moe_lora_b_layout, force))


def _plan(base: str | os.PathLike[str], adapter: str | os.PathLike[str], options: MergeOptions) -> MergePlan:
    with _read_errors_refused(base):
        base_source, adapter_source = resolve_base(base), resolve_adapter(adapter)
        repos = {"base_repo": base_source.pinned, "adapter_repo": adapter_source.pinned}
        return make_plan(base_source.path, adapter_source.path, options, **repos)


@contextmanager
def _read_errors_refused(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a refusal of what the system says against reading, where nothing is written yet."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RawmergeError):
            raise
        found = error.strerror or str(error)
        raise MissingFileError(Problem(str(error.filename or path), "to be readable", found)) from error


def plan_for_output(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: MergeOptions,
    *,
    consumes: bool,
) -> MergePlan:
    """Return `plan_merge`'s plan, or that of the same merge to `output` where `consume_base` was cut off.

    The base of such a merge is gone in part, so it cannot be planned again.

    Args:
        base: see `plan_merge`.
        adapter: see `plan_merge`.
        output: directory to make.
        options: what decides the output's bytes; see `merge_options`.
        consumes: whether the merge is to consume its base, so that a finished one may have.

    Raises:
        RefusedError: with every reason against the merge in `.problems`; an OutputError where another merge to
            `output` is unfinished, or this one has consumed its base and is finished. ValueError: an option is none
            of its choices.
    """
    with _read_errors_refused(output):
        plan = unfinished_plan(Path(output), options, lambda plan: _other_inputs(plan, base, adapter))
    if plan:
        return plan
    try:
        return _plan(base, adapter, options)
    except MissingFileError as error:
        root = Path(base).expanduser()
        if consumes and (problem := finished_merge(Path(output), root, resolve_adapter(adapter).path, options)):
            raise OutputError(problem) from error
        raise


def merge_options(
    compute_dtype: str,
    dtype: str | None,
    vocab: str | None,
    tokenizer: str,
    moe_lora_b_layout: str | None,
    force: bool,
) -> MergeOptions:
    """Return the arguments of `plan_merge` as a value, in which what is left out is empty."""
    return MergeOptions(
        compute_dtype=compute_dtype,
        output_dtype=dtype or "",
        vocab=vocab or "",
        tokenizer=tokenizer,
        moe_lora_b_layout=moe_lora_b_layout or "",
        force=force,
    )


def _other_inputs(plan: MergePlan, base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> Iterator[Problem]:
    """Yield what is named as base and adapter and is not the plan's; of the base, less than that may be left."""
    given = os.path.realpath(Path(base).expanduser())
    roots = {plan.base_root, *(str(Path(plan.base_root) / name) for name in (INDEX_NAME, CONFIG_NAME))}
    if given not in map(os.path.realpath, roots):
        yield difference("BASE", quote(plan.base_root), quote(given))
    found = resolve_adapter(adapter).path
    names = {
        plan.adapter_root,
        str(Path(plan.adapter_root) / ADAPTER_CONFIG),
        *(file.path for file in plan.adapter_files),
    }
    if os.path.realpath(found) not in map(os.path.realpath, names):
        yield difference("ADAPTER", quote(plan.adapter_root), quote(found))


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str = "base",
    moe_lora_b_layout: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
    **choices: Unpack[RunChoices],
) -> MergeSummary:
    """Plan a merge and run it: `output` appears complete, or not at all.

    Args:
        base: see `plan_merge`, as for `adapter`, `compute_dtype` and `dtype`.
        adapter: see `plan_merge`.
        output: directory to make.
        compute_dtype: see `plan_merge`.
        dtype: see `plan_merge`, as for `vocab`, `tokenizer`, `moe_lora_b_layout` and `force`.
        vocab: see `plan_merge`.
        tokenizer: see `plan_merge`.
        moe_lora_b_layout: see `plan_merge`.
        force: see `plan_merge`.
        progress: called as bytes are finished; an exception from it cancels the merge and leaves nothing behind, but
            with `consume_base`: then the same call goes on.
        choices: how the plan is carried out, none of which changes a bit on the CPU: `overwrite: bool`,
            `threads: int | None`, `max_memory: int | None` in bytes, `device: str` (`cpu`, `cuda`, `cuda:1`, `mps`),
            `link: bool`, `consume_base: bool`, `reuse: bool`, `resume: bool`, `verify: bool`, `checksum: bool`,
            `without: Collection[str]`; see `RunOptions`.

    Raises:
        RefusedError: nothing was written; reasons in `.problems`.
        MergeError: writing failed; nothing was published. Where the system failed it, finished shards are kept, as its
            notes say, and the same call goes on from them, unless `resume` is off.
        ValueError: an option is none of its choices.
    """
    options = merge_options(compute_dtype, dtype, vocab, tokenizer, moe_lora_b_layout, force)
    plan = plan_for_output(base, adapter, output, options, consumes=choices.get("consume_base", False))
    return run_plan(plan, Path(output), progress=progress, **choices)


def verify_merge(
    output: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    *,
    compute_dtype: str | None = None,
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str | None = None,
    moe_lora_b_layout: str | None = None,
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
        compute_dtype: see `plan_merge`; None for what the output's record tells, else `float32`. The same goes for
            `dtype`, `vocab`, `tokenizer` and `moe_lora_b_layout`.
        dtype: see `plan_merge`.
        vocab: see `plan_merge`.
        tokenizer: see `plan_merge`.
        moe_lora_b_layout: see `plan_merge`.
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
    given = {"compute_dtype": compute_dtype, "output_dtype": dtype, "vocab": vocab, "tokenizer": tokenizer}
    with _read_errors_refused(at):
        verifier = OutputVerifier(at)
        if base is None or adapter is None:
            return verifier.alone()
        options = verifier.options({**given, "moe_lora_b_layout": moe_lora_b_layout})
    plan = _plan(base, adapter, options)
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
    with _read_errors_refused(path):
        return inspect_root(resolve_either(path).path)
