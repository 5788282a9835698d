"""Several adapters on one base: the plan of each by itself becomes one plan, which goes over the base once.

`serial` is what PEFT gives for one adapter merged after the other, each result rounded to the output's dtype: between
the updates of a tensor stands one of the kind `ROUNDING`. `once` adds all deltas up and rounds once, in an order that
does not depend on how the adapters were named; only kinds that add a delta which the base does not enter have a sum.
A combination of such deltas is one update in place of all of them (`rawmerge.combination`), of a single one too.

Source: PEFT 0.21.2 `tuners/tuners_utils.py`: `merge_adapter`; `tuners/lora/layer.py`: `scale_layer` (weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import prod
from typing import Final

from rawmerge.adapter_order import own_order
from rawmerge.combination import Combination, Task, combined, combined_factors, factors_reason
from rawmerge.dtypes import DTYPES
from rawmerge.errors import PlanError, Problem
from rawmerge.formats.shard_header import format_shard_header, parse_shard_header
from rawmerge.merge_options import OF_FACTORS, ONCE, MergeOptions
from rawmerge.merge_plan import (
    ROUNDING,
    SUMMED,
    AdapterInput,
    MergePlan,
    ReplaceTensor,
    ShardPlan,
    Step,
    Update,
    UpdateTensor,
)
from rawmerge.weighted_plan import is_scaled

_OTHER_START: Final = "another tensor to start from"
#: The method that puts rows in place of the base's.
_ROWS: Final = "token_rows"
#: Methods that add a delta of their own, with no setting for its size.
_ADDED: Final = frozenset(["vera", "vblora", "unilora", "c3a", "miss", "shira", "tinylora", "beft"])


def combined_shards(plans: Sequence[MergePlan], options: MergeOptions, places: Sequence[int]) -> tuple[ShardPlan, ...]:
    """Return the shards of one plan for all of them.

    Args:
        plans: of one adapter each, of the same base.
        options: in which order they are merged or how they are combined, and which plan, from 1, gives tensors that
            several replace.
        places: of the plans' adapters among those that were named, from 1.

    Raises:
        PlanError: two of them change a tensor in ways that do not go together; all such tensors at once.
    """
    combiner = _Combiner(plans, options, places)
    shards = tuple(combiner.shard(shards) for shards in zip(*(plan.shards for plan in plans), strict=True))
    if combiner.problems:
        raise PlanError(*combiner.problems)
    return shards


def losing_uses(plans: Sequence[MergePlan], places: Sequence[int], replaced_by: int) -> tuple[AdapterInput, ...]:
    """Return the plans' adapters, in whose accounts tensors that another one's replace are ignored."""
    if not replaced_by:
        return tuple(adapter for plan in plans for adapter in plan.adapters)
    winner = plans[places.index(replaced_by)]
    taken = {step.entry.name for step in winner.steps() if isinstance(step, ReplaceTensor)}
    reason = f"adapter {replaced_by} replaces it, as --replaced-by says"
    return tuple(
        adapter if place == replaced_by else _without(adapter, taken, reason)
        for place, plan in zip(places, plans, strict=True)
        for adapter in plan.adapters
    )


def _without(adapter: AdapterInput, taken: set[str], reason: str) -> AdapterInput:
    uses = (
        replace(use, use="ignored", reason=reason) if use.use == "replaces" and use.tensor_name in taken else use
        for use in adapter.uses
    )
    return replace(adapter, uses=tuple(uses))


class _Combiner:
    def __init__(self, plans: Sequence[MergePlan], options: MergeOptions, places: Sequence[int]) -> None:
        self.problems: list[Problem] = []
        self._options = options
        self._is_once = options.order == ONCE
        self._places = places
        self._winner = places.index(options.replaced_by) if options.replaced_by else -1
        self._changed = [dict(_changed_sources(plan)) for plan in plans]
        self._weights = [plan.adapters[0].weight for plan in plans]
        self._ranks = [max(map(_rank, plan.steps()), default=0) for plan in plans]
        # a sum in floating point depends on its order, which must not be that in which adapters are named
        self._keys = own_order(plans) if self._is_once else []

    def shard(self, shards: Sequence[ShardPlan]) -> ShardPlan:
        """Return one shard's steps of all plans as one."""
        steps: dict[str, dict[int, Step]] = {}
        for place, shard in enumerate(shards):
            for step in shard.steps:
                steps.setdefault(step.entry.name, {})[place] = step
        placed = tuple(placed_steps(map(self._combined, steps.values())))
        entries = tuple(step.entry for step in placed)
        same = (shard for shard in shards if tuple(step.entry for step in shard.steps) == entries)
        first = shards[0]
        if found := next(same, None):
            return ShardPlan(first.name, found.header_text, placed)
        metadata = parse_shard_header(
            first.header_text.encode(), first.byte_count - first.data_start, first.name
        ).metadata
        return ShardPlan(first.name, format_shard_header(entries, metadata), placed)

    def _combined(self, steps: Mapping[int, Step]) -> Step:
        if len(steps) < len(self._places):
            steps = self._with_tied(steps)
        changing = {place: step for place, step in steps.items() if _changes(step)}
        if len(changing) < 2 and not (self._options.combine and self._is_weighed(changing)):
            return next(iter((changing or steps).values()))
        if all(isinstance(step, ReplaceTensor) for step in changing.values()):
            return self._replaced(changing)
        updating = {place: step for place, step in changing.items() if isinstance(step, UpdateTensor)}
        if found := self._reason_against(changing, updating):
            name = next(iter(changing.values())).entry.name
            adapters = self._named(changing)
            hint = "merge them one after the other, with an output between"
            if "no sum" in found:
                hint = "leave --combine out" if self._options.combine else "--order serial"
            elif found == _OTHER_START:
                hint = "they were trained on other values of it, and have no base in common"
            self.problems.append(Problem(name, f"changes of adapters {adapters} that go together", found, hint))
        return self._updated(updating) if updating else next(iter(changing.values()))

    def _is_weighed(self, changing: Mapping[int, Step]) -> bool:
        """Whether a combination changes what one adapter alone does to a tensor; else that stays as it is."""
        ((place, step),) = changing.items() or [(0, None)]
        if not isinstance(step, UpdateTensor) or not step.updates:
            return False
        return self._weights[place] != 1 or all(map(_is_added, step.updates))

    def _named(self, chosen: Iterable[int]) -> str:
        return " and ".join(str(self._places[place]) for place in chosen)

    def _with_tied(self, steps: Mapping[int, Step]) -> Mapping[int, Step]:
        """Return the steps of a tensor that some adapters part from what it is tied to, with the others' on that.

        Those that come later in a serial merge find the two apart, as they would in a merge of their own.
        """
        found = dict(steps)
        for place, step in steps.items():
            tied = (step.source.path, step.source.offset)
            for at in range(len(self._places)):
                if at not in steps and (self._is_once or at < place) and (own := self._changed[at].get(tied)):
                    found[at] = replace(own, entry=replace(own.entry, name=step.entry.name))
        return dict(sorted(found.items()))

    def _replaced(self, changing: Mapping[int, Step]) -> Step:
        step = next(iter(changing.values()))
        if self._winner in changing:
            return changing[self._winner]
        adapters = self._named(changing)
        hint = f"--replaced-by {self._places[next(iter(changing))]} (replaced_by=) names the one that wins"
        self.problems.append(Problem(step.entry.name, "one adapter that replaces it", f"adapters {adapters}", hint))
        return step

    def _reason_against(self, changing: Mapping[int, Step], updating: Mapping[int, UpdateTensor]) -> str:
        steps = list(updating.values())
        if len(updating) < len(changing) or any(step.overlay for step in steps):
            return "values that one stores whole, and a delta of another"
        if any((step.entry.dtype, step.entry.shape, step.source) != _identity(steps[0]) for step in steps):
            return _OTHER_START
        if any(step.columns != steps[0].columns for step in steps):
            return "another view of its rows"
        if found := _lost_rows(steps):
            return found
        kinds = [update.kind for step in steps for update in step.updates if not _is_added(update)]
        return f"an update of the kind {kinds[0]}, which has no sum with another's" if self._is_once and kinds else ""

    def _updated(self, updating: Mapping[int, UpdateTensor]) -> UpdateTensor:
        first = next(iter(updating.values()))
        if self._options.combine:
            return self._mixed(first, updating)
        cuts = tuple(sorted({cut for step in updating.values() for cut in step.cuts}))
        return replace(first, updates=tuple(self._joined(updating)), cuts=cuts)

    def _mixed(self, first: UpdateTensor, updating: Mapping[int, UpdateTensor]) -> UpdateTensor:
        tasks = (Task(place, self._weights[place], step.updates) for place, step in updating.items())
        chosen = self._options
        made = Combination(
            how=chosen.combine,
            density=chosen.density,
            majority_sign=chosen.majority_sign,
            seed=chosen.seed,
            tensor=first.entry.name,
            count=len(self._weights),
            tasks=tuple(tasks),
        )
        if made.how.startswith(OF_FACTORS):
            return self._with_factors(first, made)
        count = prod(first.source.shape)
        if made.prunes_by_magnitude and not made.kept_of(count):
            expected, found = "a density that keeps an element", f"{made.density:g} of {count} elements"
            self.problems.append(Problem(made.tensor, expected, found, "a higher --density"))
        cuts = tuple(sorted({cut for step in updating.values() for cut in step.cuts}))
        return combined(replace(first, cuts=cuts), made)

    def _with_factors(self, first: UpdateTensor, made: Combination) -> UpdateTensor:
        if found := factors_reason(made):
            expected = f"one pair of LoRA's factors of each adapter, for --combine {made.how}"
            self.problems.append(Problem(made.tensor, expected, found, "--combine without peft- looks at deltas"))
            return first
        return combined_factors(first, made, sum(self._ranks))

    def _joined(self, updating: Mapping[int, UpdateTensor]) -> Iterator[Update]:
        if self._is_once:
            order = sorted(updating, key=self._keys.__getitem__)
            updates = chain.from_iterable(updating[place].updates for place in order)
            yield from (replace(update, settings={**update.settings, SUMMED: True}) for update in updates)
            return
        for number_, step in enumerate(updating.values()):
            if number_:
                yield Update(ROUNDING, {}, {})
            yield from step.updates


def _changed_sources(plan: MergePlan) -> Iterator[tuple[tuple[str, int], Step]]:
    """Yield where the base tensors lie that a plan changes, and the steps."""
    for step in plan.steps():
        source = step.base if isinstance(step, ReplaceTensor) else step.source
        if source and _changes(step):
            yield (source.path, source.offset), step


def _lost_rows(steps: Sequence[UpdateTensor]) -> str:
    """Return what is lost where rows of one adapter take the place of what those before it made; empty for nothing."""
    rows: set[int] = set()
    has_delta = False
    for step in steps:
        for update in step.updates:
            indices = update.settings.get("indices") if update.kind == _ROWS else None
            if isinstance(indices, tuple) and (has_delta or rows & set(indices)):
                return "token rows that take the place of what one before them made"
            rows |= set(indices) if isinstance(indices, tuple) else set()
        has_delta = has_delta or any(update.kind != _ROWS for update in step.updates)
    return ""


def _identity(step: UpdateTensor) -> tuple[str, tuple[int, ...], object]:
    return step.entry.dtype, step.entry.shape, step.source


def _is_added(update: Update) -> bool:
    return is_scaled(update) or update.kind in _ADDED


def _rank(step: Step) -> int:
    """Return the largest rank of a step's pairs, 0 where it has none."""
    return max((at.rank for at in step.updates), default=0) if isinstance(step, UpdateTensor) else 0


def _changes(step: Step) -> bool:
    """Whether a step is more than keeping a tensor, or casting it."""
    return isinstance(step, ReplaceTensor) or (
        isinstance(step, UpdateTensor) and (bool(step.updates) or step.overlay is not None)
    )


def placed_steps(steps: Iterator[Step]) -> Iterator[Step]:
    """Yield the steps with their entries' offsets filled in, one after the other."""
    position = 0
    for step in steps:
        entry = step.entry
        count = 1
        for size in entry.shape:
            count *= size
        end = position + DTYPES[entry.dtype].byte_count(count)
        yield replace(step, entry=replace(entry, start=position, end=end))
        position = end
