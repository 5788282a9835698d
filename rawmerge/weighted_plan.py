"""One adapter whose deltas are multiplied by a weight.

Source: PEFT 0.21.2 `tuners/lora/layer.py`: `scale_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from rawmerge.errors import PlanError, Problem
from rawmerge.merge_plan import (
    MergePlan,
    ReplaceTensor,
    Step,
    Update,
    UpdateTensor,
)
from rawmerge.methods.interface import number

#: Methods whose delta is a multiple of the setting `scaling`.
_SCALED: Final = frozenset(
    [
        *("lora", "lora_bias", "lora_twice", "expert_lora", "bdlora"),
        *("adalora", "fourierft", "gralora", "loha", "lokr", "randlora", "waveft"),
        *("kohya_lora", "kohya_loha", "kohya_lokr", "mlx"),
    ]
)


def weighted_plan(plan: MergePlan, weight: float) -> MergePlan:
    """Return a plan of one adapter whose deltas are multiplied by `weight`, which is neither 0 nor 1.

    Raises:
        PlanError: it changes tensors in a way that has no multiple.
    """
    problems = [problem for step in plan.steps() for problem in _weight_problems(step, weight)]
    if problems:
        raise PlanError(*problems)
    shards = tuple(
        replace(shard, steps=tuple(_weighted(step, weight) for step in shard.steps)) for shard in plan.shards
    )
    return replace(plan, shards=shards, adapters=tuple(replace(at, weight=weight) for at in plan.adapters))


def plan_with_weight(plan: MergePlan, weight: float) -> MergePlan:
    """Return a plan of one adapter that only notes its weight, for a combination, which applies it at last.

    Raises:
        PlanError: the adapter stores values whole, which have no multiple.
    """
    if problems := [problem for step in plan.steps() for problem in _stored_problems(step, weight)]:
        raise PlanError(*problems)
    return replace(plan, adapters=tuple(replace(at, weight=weight) for at in plan.adapters))


def _stored_problems(step: Step, weight: float) -> Iterator[Problem]:
    if isinstance(step, ReplaceTensor) or (isinstance(step, UpdateTensor) and step.overlay):
        expected = f"a delta that can be multiplied by {weight:g}"
        yield Problem(step.entry.name, expected, "values that the adapter stores whole", "leave the weight out")


def _weight_problems(step: Step, weight: float) -> Iterator[Problem]:
    expected = f"a delta that can be multiplied by {weight:g}"
    hint = "leave the weight out"
    yield from _stored_problems(step, weight)
    for update in step.updates if isinstance(step, UpdateTensor) else ():
        if not is_scaled(update):
            yield Problem(step.entry.name, expected, f"an update of the kind {update.kind}", hint)


def is_scaled(update: Update) -> bool:
    """Whether an update is a multiple of its scaling; one with norms of its own (DoRA) is not."""
    has_norms = any("dora" in role or "magnitude" in role for role in update.tensors)
    return update.kind in _SCALED and "scaling" in update.settings and not has_norms


def _weighted(step: Step, weight: float) -> Step:
    if not isinstance(step, UpdateTensor):
        return step
    updates = (
        replace(update, settings={**update.settings, "scaling": number(update.settings, "scaling") * weight})
        for update in step.updates
    )
    return replace(step, updates=tuple(updates))
