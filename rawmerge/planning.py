"""From what a caller names, paths and hub ids and choices, to the plan of a merge."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypedDict, Unpack

from rawmerge.adapter_source import AdapterSource, split_weight
from rawmerge.byte_sizes import byte_limit
from rawmerge.consuming.finished_merge import finished_merge
from rawmerge.consuming.plan_difference import difference
from rawmerge.consuming.unfinished import unfinished_plan
from rawmerge.dtypes import AUTO_DTYPE
from rawmerge.errors import MissingFileError, OutputError, PlanError, Problem, RawmergeError, quote
from rawmerge.formats.adapter_config import CONFIG_NAME as ADAPTER_CONFIG
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.weight_map import INDEX_NAME
from rawmerge.inputs.hub import resolve_adapter, resolve_base
from rawmerge.merge_options import (
    COMBINATIONS,
    LIKE_SHARD_BYTES,
    SERIAL,
    MergeOptions,
    combination_problems,
    settled_order,
)
from rawmerge.merge_plan import AdapterInput, MergePlan
from rawmerge.plan import make_plan
from rawmerge.run_options import ReplayChoices, RunChoices

#: A path or hub id.
Place: TypeAlias = str | os.PathLike[str]
#: One adapter or several, each with a weight behind a colon if it is a text.
Adapters: TypeAlias = Place | Sequence[Place]


#: So many adapters can be combined, where it is not known yet how many there are.
_ENOUGH: Final = 2


class PlanChoices(TypedDict, total=False):
    """The fields of `MergeOptions` as keyword arguments; None for what is not chosen.

    A `max_shard_size` may be a text, such as `5GB` or `512MiB`, and `combine="sum"` is another name for `order="once"`.
    """

    compute_dtype: str
    dtype: str | None
    vocab: str | None
    tokenizer: str
    moe_lora_b_layout: str | None
    max_shard_size: int | str | None
    format: str | None
    like: str | None
    order: str | None
    replaced_by: int | None
    combine: str | None
    density: float | None
    majority_sign: str
    seed: int
    force: bool
    card: bool


class MergeChoices(PlanChoices, RunChoices, total=False):
    """The choices that decide an output's bytes, and those of how it is made."""


class VerifyChoices(ReplayChoices, total=False):
    """Those of the choices that decide an output's bytes which its record may not tell, and those of a replay.

    None for what the record tells, else the usual ones. With `combine`, `density`, `majority_sign` and `seed` are not
    the record's.
    """

    compute_dtype: str | None
    dtype: str | None
    vocab: str | None
    tokenizer: str | None
    moe_lora_b_layout: str | None
    like: str | None
    order: str | None
    replaced_by: int | None
    combine: str | None
    density: float | None
    majority_sign: str | None
    seed: int | None


def named_adapters(adapters: object) -> list[Place]:
    """Return the adapters that are named, one by one.

    Raises:
        TypeError: they are no sequence: of a mapping the values would be lost, of an iterator all at the second look.
    """
    if isinstance(adapters, str | os.PathLike):
        return [adapters]
    if not isinstance(adapters, Sequence):
        kind, hint = type(adapters).__name__, "write a weight as 'path:0.5'"
        raise TypeError(f"adapters must be a path, a hub id or a list of them, not {kind}: {hint}")
    return list(adapters)


def adapter_sources(adapters: Adapters) -> list[AdapterSource]:
    """Return the adapters that are named, those from the hub fetched.

    Raises:
        RefusedError: one cannot be found. ValueError: a weight is not finite. TypeError: one is no path.
    """
    return [_source(place) for place in named_adapters(adapters)]


def _source(place: object) -> AdapterSource:
    if not isinstance(place, str | os.PathLike):
        shown = ":".join(map(str, place)) if isinstance(place, tuple) and len(place) == 2 else "path:0.5"
        raise TypeError(f"an adapter must be a path or hub id, not {place!r}: write a weight as {shown!r}")
    path, weight = split_weight(place) if isinstance(place, str) else (place, 1.0)
    found = resolve_adapter(path)
    return AdapterSource(found.path, found.pinned, weight)


def plan_inputs(base: Place, adapters: Adapters, options: MergeOptions) -> MergePlan:
    """Return the plan of merging adapters into a base.

    Raises:
        RefusedError: with every reason against the merge. ValueError: an option is none of its choices.
    """
    with read_errors_refused(base):
        base_source, sources = resolve_base(base), adapter_sources(adapters)
        return make_plan(base_source.path, sources, for_adapters(options, adapters), base_repo=base_source.pinned)


def for_adapters(options: MergeOptions, adapters: Adapters) -> MergeOptions:
    """Return the options without those that have no meaning for one adapter."""
    is_one = len(named_adapters(adapters)) == 1
    # one adapter cannot be combined, which is refused
    return replace(options, order=SERIAL, replaced_by=0) if is_one and not options.combine else options


@contextmanager
def read_errors_refused(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a refusal of what the system says against reading, where nothing is written yet."""
    try:
        yield
    except OSError as error:
        if isinstance(error, RawmergeError):
            raise
        found = error.strerror or str(error)
        raise MissingFileError(Problem(str(error.filename or path), "to be readable", found)) from error


def plan_for_output(
    base: Place,
    adapters: Adapters,
    output: Place,
    options: MergeOptions,
    *,
    consumes: bool,
) -> MergePlan:
    """Return `plan_merge`'s plan, or that of the same merge to `output` where `consume_base` was cut off.

    The base of such a merge is gone in part, so it cannot be planned again.

    Args:
        base: see `plan_merge`.
        adapters: see `plan_merge`.
        output: directory to make.
        options: what decides the output's bytes; see `MergeOptions`.
        consumes: whether the merge is to consume its base, so that a finished one may have.

    Raises:
        RefusedError: with every reason against the merge in `.problems`; an OutputError where another merge to
            `output` is unfinished, or this one has consumed its base and is finished. ValueError: an option is none
            of its choices.
    """
    options = for_adapters(options, adapters)
    with read_errors_refused(output):
        plan = unfinished_plan(Path(output), options, lambda plan: _other_inputs(plan, base, adapters))
    if plan:
        return plan
    try:
        return plan_inputs(base, adapters, options)
    except MissingFileError as error:
        root = Path(base).expanduser()
        if consumes and (problem := finished_merge(Path(output), root, adapter_sources(adapters), options)):
            raise OutputError(problem) from error
        raise


def choose_options(**choices: Unpack[PlanChoices]) -> MergeOptions:
    """Return the choices that decide an output's bytes as a frozen value, to be used for several merges.

    Args:
        choices: the fields of `MergeOptions`, None for what is not chosen; a `max_shard_size` may be a text, such as
            `5GB` or `512MiB`, and `combine="sum"` is another name for `order="once"`.

    Raises:
        RefusedError: what is said about combining does not go together, whatever the adapters. ValueError: a size is
            none. TypeError: there is no such choice.
    """
    given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    if unknown := sorted(given.keys() - PlanChoices.__annotations__.keys()):
        raise TypeError(f"there is no choice {', '.join(unknown)}; those of a merge are in MergeOptions and RunOptions")
    if "max_shard_size" in given:
        given["max_shard_size"] = byte_limit("max_shard_size", given["max_shard_size"])
    if "density" in given:
        given["density"] = float(given["density"])  # a plan's JSON tells 1 from 1.0
    if given.get("like"):
        given = {"dtype": AUTO_DTYPE, "max_shard_size": LIKE_SHARD_BYTES, **given}
    options = MergeOptions(**settled_order(given))
    if options.combine in {"", *COMBINATIONS} and (problems := tuple(combination_problems(options, _ENOUGH))):
        raise PlanError(*problems)
    return options


def chosen_options(options: MergeOptions | None, choices: PlanChoices) -> MergeOptions:
    """Return the options that a caller gives as a value, or choice by choice.

    Raises:
        ValueError: both. TypeError: `options` are no MergeOptions. RefusedError, TypeError: as `choose_options`.
    """
    return choose_options(**choices) if options is None else _given_options(options, choices)


def _given_options(options: object, choices: Mapping[str, object]) -> MergeOptions:
    if not isinstance(options, MergeOptions):
        made = "make them with rawmerge.choose_options(order='once'), or give order='once' itself"
        raise TypeError(f"options must be MergeOptions, not {type(options).__name__}: {made}")
    if choices:
        raise ValueError(f"give options or {', '.join(choices)}, not both; dataclasses.replace changes options")
    return options


def split_choices(choices: MergeChoices) -> tuple[PlanChoices, RunChoices]:
    """Return what decides an output's bytes, unknown names included, and what decides how it is made."""
    run = {name: value for name, value in choices.items() if name in RunChoices.__annotations__}
    plan = {name: value for name, value in choices.items() if name not in run}
    return plan, run  # type: ignore[return-value]  # mypy does not follow names through dicts


def split_replay(
    options: MergeOptions | None, choices: VerifyChoices
) -> tuple[MergeOptions | Mapping[str, Any], ReplayChoices]:
    """Return what decides the bytes that an output should have, and how they are computed.

    Raises:
        ValueError: options and choices. TypeError: there is no such choice, or `options` are no MergeOptions.
    """
    if unknown := sorted(choices.keys() - VerifyChoices.__annotations__.keys()):
        known = ", ".join(VerifyChoices.__annotations__)
        raise TypeError(f"there is no choice {', '.join(unknown)}; those of a verification are {known}")
    run = {name: value for name, value in choices.items() if name in ReplayChoices.__annotations__}
    given = {name: value for name, value in choices.items() if name not in run}
    settled = given if options is None else _given_options(options, given)
    return settled, run  # type: ignore[return-value]  # mypy does not follow names through dicts


def _other_inputs(plan: MergePlan, base: Place, adapters: Adapters) -> Iterator[Problem]:
    """Yield what is named as base and adapters and is not the plan's; of the base, less than that may be left."""
    given = os.path.realpath(Path(base).expanduser())
    roots = {plan.base_root, *(str(Path(plan.base_root) / name) for name in (INDEX_NAME, CONFIG_NAME))}
    if given not in map(os.path.realpath, roots):
        yield difference("BASE", quote(plan.base_root), quote(given))
    sources = adapter_sources(adapters)
    if len(sources) != len(plan.adapters):
        yield difference("ADAPTER", f"{len(plan.adapters)} of them", f"{len(sources)}")
        return
    for adapter, source in zip(plan.adapters, sources, strict=True):
        if os.path.realpath(source.path) not in map(os.path.realpath, _names(adapter)):
            yield difference("ADAPTER", quote(adapter.root), quote(os.path.realpath(source.path)))
        if source.weight != adapter.weight:
            yield difference(f"the weight of {quote(adapter.root)}", f"{adapter.weight:g}", f"{source.weight:g}")


def _names(adapter: AdapterInput) -> set[str]:
    """Return the paths by which an adapter may be named."""
    return {adapter.root, str(Path(adapter.root) / ADAPTER_CONFIG), *(file.path for file in adapter.files)}
