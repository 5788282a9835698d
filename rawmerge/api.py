"""The library: hub ids and paths in, plans and checkpoints out. Never prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    VerifyChoices,
    chosen_options,
    named_adapters,
    plan_for_output,
    plan_inputs,
    read_errors_refused,
    split_choices,
    split_replay,
)
from rawmerge.run import MergeSummary, run_plan
from rawmerge.run_options import choose_run
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
            which changes a bit on the CPU: `overwrite: bool`, `threads: int | None`, `max_memory: int | str | None`,
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
    options: MergeOptions | None = None,
    tolerance: float = 0,
    progress: ProgressCallback | None = None,
    **choices: Unpack[VerifyChoices],
) -> Verification:
    """Tell whether `output` is what base and adapter give; nothing is written, and no more is held than by a merge.

    With base and adapter, every tensor is computed again and compared bit for bit, whoever merged them and however the
    output is cut into shards. Without them, headers, index, config and record are compared with each other.

    Args:
        output: directory or safetensors file.
        base: see `plan_merge`; None, as `adapter`, to look at the output alone.
        adapter: see `plan_merge`.
        options: all of what decides the output's bytes, whatever its record tells; or else `choices`.
        tolerance: distance that passes in tensors that the adapter changes, in units in the last place of the larger
            of the expected value and the base's. Tensors that it does not change must be equal.
        progress: called as bytes are compared; an exception from it ends the verification.
        choices: `dtype`, `order`, `combine` and so on, as in `plan_merge`, those that the output's record does not
            tell; and `threads`, `max_memory` and `without`, as in `RunOptions`.

    Raises:
        RefusedError: base and adapter allow no merge. MergeError: the merge cannot be computed, or a file cannot be
            read. ValueError: an option is none of its choices, one of base and adapter is missing, or options are
            given in both ways. TypeError: there is no such choice.
    """
    from rawmerge.verifying.verification import OutputVerifier  # no merge needs it

    if (base is None) != (adapter is None):
        raise ValueError("base and adapter go together")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number of at least 0, not {tolerance!r}")
    at = Path(output).expanduser()
    given, replay = split_replay(options, choices)
    run = choose_run(replay)
    with read_errors_refused(at):
        verifier = OutputVerifier(at)
        if base is None or adapter is None:
            if isinstance(given, MergeOptions) or any(value is not None for value in given.values()):
                raise ValueError("options are of no use without base and adapter")
            return verifier.alone()
        chosen = verifier.options(given, len(named_adapters(adapter)))
    plan = plan_inputs(base, adapter, chosen)
    with _unverified(at):
        return verifier.against(plan, run, tolerance=tolerance, report=progress)


@contextmanager
def _unverified(output: Path) -> Iterator[None]:
    """Make a MergeError of what the system says against reading."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RawmergeError):
            raise
        found = f"{quote(error.filename or output)}: {error.strerror or error}"
        raise MergeError(f"{found}; it was not verified") from error


def inspect_path(path: str | os.PathLike[str]) -> Inspection:
    """Tell what a directory, file or hub id holds: a base or an adapter, and whether it can be merged.

    Raises:
        RefusedError: neither a base nor an adapter can be read there.
    """
    with read_errors_refused(path):
        return inspect_root(resolve_either(path).path)
