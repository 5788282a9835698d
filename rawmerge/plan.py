"""The decision: base and adapter to a `MergePlan`, from headers and configs alone, or every reason against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rawmerge.adapter_source import AdapterSource
from rawmerge.combined_plan import combined_shards, losing_uses
from rawmerge.dtypes import AUTO_DTYPE, OUTPUT_DTYPES, did_you_mean
from rawmerge.errors import PlanError, Problem, ProblemCollector, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.formats.model_config import with_dtype
from rawmerge.inputs.adapter import Adapter, read_adapter
from rawmerge.inputs.base_checkpoint import BaseCheckpoint, read_base
from rawmerge.inputs.comparison import same_bytes
from rawmerge.inputs.identity import check_identity
from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.layer_replication import layer_order, replicate_layers
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.matcher import match_adapter
from rawmerge.matching.shared_bytes import shared_bytes_problems
from rawmerge.matching.tie import find_tie
from rawmerge.matching.tied_copies import without_tied_copy
from rawmerge.merge_options import BIN, CHOICES, MergeOptions, combination_problems, like_problems
from rawmerge.merge_plan import (
    AdapterInput,
    AdapterUse,
    KeepTensor,
    MergePlan,
    ReplaceTensor,
    Step,
    UpdateTensor,
    WrittenFile,
)
from rawmerge.output.card_sources import with_card
from rawmerge.output.output_config import OutputConfig
from rawmerge.output.side_files import SideFile, differing_tokenizer_files, list_side_files
from rawmerge.pickled_plan import as_pickles
from rawmerge.planner import Planner, check_shard_names, check_unique, input_file, sha256_of
from rawmerge.resharding import reshard
from rawmerge.saved_model.peft_differences import check_adapter
from rawmerge.weighted_plan import plan_with_weight, weighted_plan


def make_plan(
    base_root: Path, sources: Sequence[AdapterSource], options: MergeOptions, *, base_repo: str = ""
) -> MergePlan:
    """Return the plan of merging adapters into the base; nothing is written.

    No tensor is read, but for the few that decide whether two copies are equal, and whether the base is the one that
    an adapter was trained on.

    Args:
        base_root: directory or safetensors file of the base.
        sources: the adapters, in order.
        options: the choices that decide the output's bytes.
        base_repo: `org/name@commit` of a base from the hub, else empty.

    Raises:
        RefusedError: all reasons against the merge at once; the class is the reasons' own where they share one.
        ValueError: an option is none of its choices, or there is no adapter.
    """
    _check_options(options, sources)
    count = sum(source.weight != 0 for source in sources)
    if found := [*combination_problems(options, count), *like_problems(options, count)]:
        raise PlanError(*found)
    problems = ProblemCollector()
    with problems.absorb():
        base = without_tied_copy(read_base(base_root.absolute()))  # a plan may be run from another folder
    adapters = []
    for source in sources:
        with problems.absorb():
            adapters.append((source, read_adapter(source.path.absolute())))
    problems.raise_if_any()
    options = _with_stated_dtype(options, base)
    plan = _plan_all(base, adapters, options, base_repo)
    if found := list(shared_bytes_problems(base, plan.steps())):
        raise PlanError(*found)
    plan = _resharded(plan, base, options)
    plan = as_pickles(plan) if options.format == BIN else plan
    check_shard_names(plan)
    return with_card(plan, base, [adapter for _, adapter in adapters]) if options.card and base.is_directory else plan


def _resharded(plan: MergePlan, base: BaseCheckpoint, options: MergeOptions) -> MergePlan:
    if options.like:
        from rawmerge.saved_model.layout_request import saved_layout  # few merges need it
        from rawmerge.saved_model.like_saved import like_saved

        return like_saved(plan, saved_layout(base, options.dtype, options.max_shard_size), base)
    return reshard(plan, options.max_shard_size) if options.max_shard_size else plan


class _Planned(NamedTuple):
    """One adapter's own plan, its place among those that were named, from 1, and what made it."""

    place: int
    planner: Planner
    plan: MergePlan


def _plan_all(
    base: BaseCheckpoint, adapters: Sequence[tuple[AdapterSource, Adapter]], options: MergeOptions, base_repo: str
) -> MergePlan:
    problems, planned = ProblemCollector(), []
    for place, (source, adapter) in enumerate(adapters, 1):
        if source.weight:
            with problems.absorb():
                planned.append(_Planned(place, *_plan_one(base, source, adapter, options, base_repo)))
    problems.raise_if_any()
    if not planned:
        hint = "the merge would equal the base"
        raise PlanError(Problem("weights of the adapters", "one that is not 0", "none", hint))
    if options.replaced_by and options.replaced_by not in {one.place for one in planned}:
        raise PlanError(Problem("--replaced-by", "an adapter that is merged", f"{options.replaced_by}, of weight 0"))
    plan = planned[0].plan if len(planned) == 1 else _combined(base, planned, adapters, options)
    merged = iter(plan.adapters)
    inputs = (next(merged) if source.weight else _unused(source, adapter) for source, adapter in adapters)
    return replace(plan, adapters=tuple(inputs))


def _plan_one(
    base: BaseCheckpoint, source: AdapterSource, adapter: Adapter, options: MergeOptions, base_repo: str
) -> tuple[Planner, MergePlan]:
    """Return the plan of one adapter by itself, and what made it."""
    if options.like:
        check_adapter(base, adapter)
    order = layer_order(adapter.config.layer_replication)
    notes = check_identity(base, adapter, base_repo, is_forced=options.force)
    base = replicate_layers(base, order) if order else base
    matches = match_adapter(base, adapter, options)
    config = OutputConfig(base, matches, adapter.config.task_type)
    config.edit(options.dtype, order)
    planner = Planner(base, adapter, matches, options, config)
    made = replace(planner.plan([*notes, *config.notes]), base_repo=base_repo)
    made = replace(made, adapters=(replace(made.adapters[0], repo=source.repo),))
    weighted = plan_with_weight if options.combine else weighted_plan
    return planner, (made if source.weight == 1 else weighted(made, source.weight))


def _combined(
    base: BaseCheckpoint,
    planned: Sequence[_Planned],
    adapters: Sequence[tuple[AdapterSource, Adapter]],
    options: MergeOptions,
) -> MergePlan:
    """Return one plan for several of one adapter each.

    Raises:
        PlanError: they do not go together.
    """
    tied = _tied_output(base)
    plans, places = [_from_base(one.plan, base, tied) for one in planned], [one.place for one in planned]
    problems = ProblemCollector()
    problems.add(PlanError, _shared_problems(base, planned, adapters))
    problems.raise_if_any()
    shards = combined_shards(plans, options, places)
    check_unique(shards)
    plain = _plain_config(base, options)
    edited = next((one for one in planned if one.planner.config.text != plain), planned[0])
    written = tuple(edited.planner.written_files(shards))
    brought = next((plan for plan in plans if _brings_files(base, plan)), edited.plan)
    return replace(
        plans[0],
        adapters=losing_uses(plans, places, options.replaced_by),
        shards=shards,
        written_files=written,
        side_files=_beside(written, brought, plans),
        left_out=brought.left_out,
        notes=tuple(_all_notes(planned)),
    )


def _tied_output(base: BaseCheckpoint) -> dict[str, TensorSource]:
    """Return the input embedding by the name of the output projection that the base lacks for it, if there is one."""
    tie = find_tie(base.config, DiskNames(base, ""))
    return {tie.output: base.tensors[tie.input]} if tie and tie.is_certain and not tie.is_written else {}


def _from_base(plan: MergePlan, base: BaseCheckpoint, tied: Mapping[str, TensorSource]) -> MergePlan:
    """Return the plan with updates starting from the base where the adapter's copy of its tensor is the same.

    PEFT stores the embeddings beside a LoRA on them; two such adapters would begin with a copy each. A copy of a tied
    one in place of the output projection is one that the base has, too.
    """
    adapter = {file.path for file in plan.adapter_files}

    def started(step: Step) -> Step:
        found = tied.get(step.entry.name) or (
            base.tensors.get(step.entry.name) if isinstance(step, UpdateTensor) else None
        )
        if isinstance(step, KeepTensor) or step.source.path not in adapter or found is None:
            return step
        alike = (found.dtype, found.shape) == (step.source.dtype, step.source.shape)
        if not alike or not same_bytes(step.source, found):
            return step
        return replace(step, source=found) if isinstance(step, UpdateTensor) else _kept(step, found)

    shards = (replace(shard, steps=tuple(map(started, shard.steps))) for shard in plan.shards)
    return replace(plan, shards=tuple(shards))


def _kept(step: ReplaceTensor, source: TensorSource) -> Step:
    """Return the step that keeps a tensor whose replacement is the base's own."""
    is_kept = step.entry.dtype == source.dtype
    return KeepTensor(step.entry, source) if is_kept else UpdateTensor(step.entry, source, source.dtype, ())


def _beside(written: Iterable[WrittenFile], brought: MergePlan, plans: Iterable[MergePlan]) -> tuple[SideFile, ...]:
    """Return the copied files beside those that are written; each plan lacks what it writes itself."""
    own = {file.name for file in written}
    known = {file.name: file for plan in (*plans, brought) for file in plan.side_files}
    names = {CONFIG_NAME, *(file.name for file in brought.side_files)} - own
    return tuple(file for name, file in sorted(known.items()) if name in names)


def _brings_files(base: BaseCheckpoint, plan: MergePlan) -> bool:
    """Whether an adapter's own files are copied."""
    own = list_side_files(base.root, ())[0] if base.is_directory else ()
    return bool(set(plan.side_files) - set(own))


def _shared_problems(
    base: BaseCheckpoint,
    planned: Sequence[_Planned],
    adapters: Sequence[tuple[AdapterSource, Adapter]],
) -> Iterator[Problem]:
    """Yield what the plans decide for the whole model in more than one way."""
    options = planned[0].planner.options
    for _, adapter in adapters:
        if adapter.config.layer_replication:
            found = "layer_replication beside another adapter"
            yield Problem(str(adapter.root), "adapters for the same layers", found, "merge them one after the other")
    plain = _plain_config(base, options)
    edits = {one.planner.config.text: one.place for one in planned if one.planner.config.text != plain}
    if len(edits) > 1 or (edits and options.replaced_by not in {0, *edits.values()}):
        found = "edits of several adapters, or of one that --replaced-by does not name, such as two vocabularies"
        yield Problem(CONFIG_NAME, "one adapter that changes it", found, "merge them one after the other")
    brought = [one.plan.side_files for one in planned if _brings_files(base, one.plan)]
    if any(differing_tokenizer_files(*pair) or differing_tokenizer_files(*pair[::-1]) for pair in pairwise(brought)):
        found = "other ones of several adapters"
        yield Problem("--tokenizer adapter", "one adapter that brings a tokenizer", found, "--tokenizer base")


def _plain_config(base: BaseCheckpoint, options: MergeOptions) -> str:
    """Return the config of an output whose tensors have the base's names and shapes."""
    has_edit = options.dtype and base.config.text
    return with_dtype(base.config, options.dtype) if has_edit else base.config.text


def _all_notes(planned: Sequence[_Planned]) -> Iterator[str]:
    """Yield the notes of all plans, each once; those that not all have say whose they are."""
    for note in dict.fromkeys(note for one in planned for note in one.plan.notes):
        places = [str(one.place) for one in planned if note in one.plan.notes]
        yield note if len(places) == len(planned) else f"adapter {' and '.join(places)}: {note}"
    same: dict[str, list[str]] = {}
    for one in planned:
        same.setdefault(one.plan.adapters[0].root, []).append(str(one.place))
    yield from (f"adapters {' and '.join(at)} are the same: {quote(root)}" for root, at in same.items() if len(at) > 1)


def _unused(source: AdapterSource, adapter: Adapter) -> AdapterInput:
    """Return an adapter of which nothing is merged."""
    uses = (AdapterUse(name, "ignored", "", reason="its weight is 0") for name, _ in adapter.weights.sources())
    return AdapterInput(
        str(adapter.root), source.repo, sha256_of(adapter.config_text), (input_file(adapter.weights),), tuple(uses), 0.0
    )


def _with_stated_dtype(options: MergeOptions, base: BaseCheckpoint) -> MergeOptions:
    """Return the options with the dtype that `auto` stands for.

    Raises:
        PlanError: the config states none that an output may have.
    """
    if options.dtype != AUTO_DTYPE:
        return options
    stated = base.config.stated_dtype
    if stated not in OUTPUT_DTYPES:
        expected = f"one of {', '.join(OUTPUT_DTYPES)}, for --dtype auto"
        found = quote(stated) if stated else base.config.odd_dtype or "none"
        raise PlanError(Problem(f"dtype in {CONFIG_NAME}", expected, found, "name the dtype, as in --dtype bfloat16"))
    return replace(options, dtype=stated)


def _check_options(options: MergeOptions, sources: Sequence[AdapterSource]) -> None:
    if not sources:
        raise ValueError("at least one adapter is needed")
    if options.replaced_by > len(sources):
        problem = Problem("--replaced-by", f"the place of an adapter, 1 to {len(sources)}", str(options.replaced_by))
        raise PlanError(problem)
    for field, allowed in CHOICES.items():
        if (value := getattr(options, field)) not in allowed:
            meant = did_you_mean(value, allowed) if field.endswith("dtype") and value else ""
            raise ValueError(f"{field} must be one of {tuple(filter(None, allowed))}, not {value!r}{meant}")
