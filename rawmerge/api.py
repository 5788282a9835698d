"""The library: hub ids and paths in, plans and checkpoints out. Never prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from rawmerge.engine.jobs import ProgressCallback
from rawmerge.errors import MergeError, RawmergeError, quote
from rawmerge.inputs.hub import resolve_either
from rawmerge.inspection import Inspection, inspect_root
from rawmerge.merge_plan import MergePlan
from rawmerge.planning import Adapters, merge_options, plan_for_output, plan_inputs, read_errors_refused
from rawmerge.run import MergeSummary, run_plan
from rawmerge.run_options import ReplayChoices, RunChoices, RunOptions
from rawmerge.verifying.findings import Verification


def plan_merge(
    base: str | os.PathLike[str],
    adapter: Adapters,
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str = "base",
    moe_lora_b_layout: str | None = None,
    max_shard_size: int | str | None = None,
    order: str | None = None,
    replaced_by: int | None = None,
    combine: str | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    force: bool = False,
    card: bool = True,
) -> MergePlan:
    """Decide a merge from headers and configs; nothing is written.

    Args:
        base: directory, safetensors file, or hub id `org/name[@revision]`.
        adapter: directory, its safetensors file, or hub id; or several of them, each as `path:0.7` if its deltas are to
            be multiplied, by 0 to leave it out.
        compute_dtype: `float32` is bit-equal to PEFT's default merge on CPU; `float64` sums in float64 and
            rounds once.
        dtype: `float32`, `bfloat16` or `float16` for all float tensors of the output, `auto` for the one that the
            base's `config.json` states; None keeps each tensor's own.
        vocab: `overlay` writes the rows of an adapter's smaller vocabulary over the first rows of the base's;
            None refuses such an adapter.
        tokenizer: whose tokenizer and chat template files the output gets, the `base`'s or the `adapter`'s.
        moe_lora_b_layout: how the columns of lora_B on fused experts are ordered, `rank_major` (PEFT) or
            `grouped_by_expert` (Unsloth until September 2026); None goes by the adapter's own marker, else PEFT's.
        max_shard_size: most bytes of an output shard's tensors, a number or a text such as `5GB` or `512MiB`, cut and
            named as transformers does; what fits in one file is `model.safetensors`. None keeps the base's shards.
        order: of several adapters, `serial` merges one after the other and rounds after each, as PEFT does; `once` adds
            all deltas up and rounds once, whatever the order in which they are named. None is `serial`, or `once` where
            adapters are combined.
        replaced_by: which of several adapters, from 1, gives a tensor that more than one replace; None refuses that.
        combine: how the deltas of several adapters become one, tensor by tensor, in float32 (or `compute_dtype`): `sum`
            as `order="once"`, `average` over all adapters, `magnitude`, `ties`, `dare` or `dare-ties`. Weights apply
            after pruning. Adapters that leave a tensor alone have no say in it. `peft-linear`, `peft-cat`,
            `peft-magnitude` and `peft-ties` combine the factors of plain LoRA, as PEFT's `add_weighted_adapter` does.
        density: the share of each delta's elements that `magnitude` and `ties` keep, the largest, and `dare` and
            `dare-ties` by chance; above 0 to 1.
        majority_sign: what decides the sign that `ties` and `dare-ties` keep of an element: the `total` of all deltas,
            or the `frequency` of signs.
        seed: of what `dare` and `dare-ties` keep by chance; the same seed gives the same bytes.
        force: merge although the adapter names another base, its stored embeddings are not the base's, or the base
            already holds this adapter.
        card: write a model card, `README.md`, beside which the base's own becomes `README_base.md`.

    Raises:
        RefusedError: with every reason against the merge in `.problems`.
        ValueError: an option is none of its choices.
    """
    options = merge_options(
        compute_dtype=compute_dtype,
        dtype=dtype,
        vocab=vocab,
        tokenizer=tokenizer,
        moe_lora_b_layout=moe_lora_b_layout,
        max_shard_size=max_shard_size,
        order=order,
        replaced_by=replaced_by,
        combine=combine,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
        force=force,
        card=card,
    )
    return plan_inputs(base, adapter, options)


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: Adapters,
    output: str | os.PathLike[str],
    *,
    compute_dtype: str = "float32",
    dtype: str | None = None,
    vocab: str | None = None,
    tokenizer: str = "base",
    moe_lora_b_layout: str | None = None,
    max_shard_size: int | str | None = None,
    order: str | None = None,
    replaced_by: int | None = None,
    combine: str | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    force: bool = False,
    card: bool = True,
    progress: ProgressCallback | None = None,
    **choices: Unpack[RunChoices],
) -> MergeSummary:
    """Plan a merge and run it: `output` appears complete, or not at all.

    Args:
        base: see `plan_merge`, as for `adapter`, `compute_dtype` and `dtype`.
        adapter: see `plan_merge`.
        output: directory to make.
        compute_dtype: see `plan_merge`.
        dtype: see `plan_merge`, as for `vocab`, `tokenizer`, `moe_lora_b_layout`, `max_shard_size` and `force`.
        vocab: see `plan_merge`.
        tokenizer: see `plan_merge`.
        moe_lora_b_layout: see `plan_merge`.
        max_shard_size: see `plan_merge`, as for `order` and `replaced_by`.
        order: see `plan_merge`.
        replaced_by: see `plan_merge`.
        combine: see `plan_merge`, as for `density`, `majority_sign` and `seed`.
        density: see `plan_merge`.
        majority_sign: see `plan_merge`.
        seed: see `plan_merge`.
        force: see `plan_merge`.
        card: see `plan_merge`.
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
    options = merge_options(
        compute_dtype=compute_dtype,
        dtype=dtype,
        vocab=vocab,
        tokenizer=tokenizer,
        moe_lora_b_layout=moe_lora_b_layout,
        max_shard_size=max_shard_size,
        order=order,
        replaced_by=replaced_by,
        combine=combine,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
        force=force,
        card=card,
    )
    plan = plan_for_output(base, adapter, output, options, consumes=choices.get("consume_base", False))
    return run_plan(plan, Path(output), progress=progress, **choices)


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
        order: see `plan_merge`.
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
    with read_errors_refused(at):
        verifier = OutputVerifier(at)
        if base is None or adapter is None:
            return verifier.alone()
        options = verifier.options({**given, "moe_lora_b_layout": moe_lora_b_layout, "order": order})
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
