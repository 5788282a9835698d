"""What differences probably come from: a delta left out, scaled, added twice, another base, another rounding."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil, isclose, isfinite, sqrt
from typing import Final, TypeAlias

from rawmerge.computing.cast_loss import significand_bits
from rawmerge.errors import Problem
from rawmerge.merge_plan import MergePlan, Update, UpdateTensor
from rawmerge.verifying.compared_shard import is_changed
from rawmerge.verifying.findings import TensorDifference

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_NAMES: Final = 3
#: So many of the differences of a scaled delta go along with it; and from so few on it may be chance.
_ALIGNED: Final = 0.98
_FEW: Final = 8
#: What other arithmetic or another order of sums explains, in units in the last place.
_ROUNDING_ULPS: Final = 2
#: Errors of arithmetic are in more of the elements than this share.
_EVERYWHERE: Final = 0.1
#: Errors of arithmetic are smaller than this share of the delta.
_IMPRECISION: Final = 0.1
#: So far off may a scale be that is meant.
_BLUR: Final = 0.08
#: Scales that differ by more are no common one.
_SPREAD: Final = 0.05
_TWICE: Final = "the sum was rounded to the base's dtype first, as LLaMA-Factory does"
#: Makes one finding of tensors that differ alike.
_Tell: TypeAlias = Callable[[Sequence[TensorDifference]], Problem]


def diagnose(plan: MergePlan, differences: Sequence[TensorDifference], tolerance: float) -> Iterator[Problem]:
    """Yield one finding for each way in which tensors differ, with what it probably comes from.

    Args:
        plan: what the checkpoint should hold.
        differences: of its tensors.
        tolerance: distance that is let pass in tensors that the adapter changes, in units in the last place.
    """
    kept = [item for item in differences if not item.is_updated]
    if kept:
        yield _kept(plan, kept)
    others = [item for item in differences if item.is_updated and not _is_within(item, tolerance)]
    for is_such, tell in _causes(plan):
        found = [item for item in others if is_such(item)]
        others = [item for item in others if item not in found]
        if found:
            yield tell(found)


def _causes(plan: MergePlan) -> Iterator[tuple[Callable[[TensorDifference], bool], _Tell]]:
    """Yield what differences in changed tensors may come from, each with its finding; the first that fits counts."""
    limits = _twice_limits(plan)
    yield (lambda item: item.equals_base), partial(_bare, plan)
    yield _is_partly_bare, _partly_bare
    yield _is_scaled, partial(_scaled, plan)
    yield (lambda item: _is_rounded_twice(item, limits)), _rounded_twice
    yield (lambda item: item.max_ulps <= _ROUNDING_ULPS), partial(_rounded, limits)
    yield _is_imprecise, _imprecise
    yield (lambda _: True), _strange


def _is_scaled(item: TensorDifference) -> bool:
    is_sure = abs(item.alignment) >= _ALIGNED and item.differing >= _FEW
    return item.scale is not None and item.is_explained and is_sure


def _is_partly_bare(item: TensorDifference) -> bool:
    """Whether what differs lacks the delta, which is more than rounding makes of it."""
    return item.bare >= _ALIGNED and item.max_ulps > _ROUNDING_ULPS and item.differing >= _FEW


def _is_within(item: TensorDifference, tolerance: float) -> bool:
    """Whether a difference may be of rounding: small, and neither of a delta that is missing nor of a wrong scale."""
    is_known = item.equals_base or _is_partly_bare(item) or _is_scaled(item)
    return tolerance > 0 and item.max_ulps <= tolerance and not is_known


def _kept(plan: MergePlan, kept: Sequence[TensorDifference]) -> Problem:
    total = sum(not is_changed(step) for step in plan.steps())
    hint = "it was made from another base" if len(kept) > total / 2 else "they were changed, or damaged, afterwards"
    found = f"other bits in {_count(kept)} of {total} that the adapter does not change"
    return Problem(_names(kept), "the base's values", found, hint)


def _bare(plan: MergePlan, bare: Sequence[TensorDifference]) -> Problem:
    total = sum(map(is_changed, plan.steps()))
    hint = "the adapter was not applied" if len(bare) == total else "the adapter was applied to the others only"
    return Problem(_names(bare), "base and delta", f"the base without the delta in {_count(bare)} of {total}", hint)


def _scaled(plan: MergePlan, scaled: Sequence[TensorDifference]) -> Problem:
    scales = sorted(item.scale for item in scaled if item.scale is not None)
    if scales[-1] - scales[0] > _SPREAD * max(map(abs, scales)):
        found = f"the base and {scales[0]:.4g} to {scales[-1]:.4g} times the delta: {_measured(scaled)}"
        hint = "ranks, alphas or weights were taken otherwise, such as without rank_pattern or alpha_pattern"
        return Problem(_names(scaled), "base and delta", found, hint)
    scale = scales[len(scales) // 2]
    found = f"the base and {scale:.4g} times the delta: {_measured(scaled)}"
    return Problem(_names(scaled), "base and delta", found, _meaning(plan, scale))


def _twice_limits(plan: MergePlan) -> dict[str, float]:
    """Return how far a sum may be off that was rounded to the base's dtype before the output's, in ulps of the latter.

    Only tensors are listed of which the base has a dtype of 16 bits, and the output another.
    """
    limits = {}
    for step in plan.steps():
        if isinstance(step, UpdateTensor) and step.updates and step.base_dtype in {"BF16", "F16"} - {step.entry.dtype}:
            gained = significand_bits(step.entry.dtype) - significand_bits(step.base_dtype)
            limits[step.entry.name] = 2 ** max(gained, 0) / 2 + 1
    return limits


def _is_rounded_twice(item: TensorDifference, limits: Mapping[str, float]) -> bool:
    """Whether another rounding than the output's explains a difference that one rounding does not."""
    is_small = _ROUNDING_ULPS < item.max_ulps <= limits.get(item.name, 0)
    return is_small and item.differing > _EVERYWHERE * item.element_count


def _rounded_twice(twice: Sequence[TensorDifference]) -> Problem:
    return Problem(_names(twice), "base and delta", _measured(twice), f"{_TWICE}: --like llamafactory")


def _partly_bare(partly: Sequence[TensorDifference]) -> Problem:
    found = f"the base without the delta in part of {_count(partly)}: {_measured(partly)}"
    hint = "the adapter was applied to some rows, experts or blocks of them only"
    return Problem(_names(partly), "base and delta", found, hint)


def _rounded(limits: Mapping[str, float], rounded: Sequence[TensorDifference]) -> Problem:
    tolerance = ceil(max(item.max_ulps for item in rounded))
    count = sum(item.differing for item in rounded)
    cause = "the arithmetic was another, such as another dtype's or device's" if count >= _FEW else "so few are damage"
    cause += f", or {_TWICE}" if any(item.name in limits for item in rounded) else ""
    hint = f"{cause}; --tolerance {tolerance} lets it pass"
    return Problem(_names(rounded), "base and delta, bit for bit", _measured(rounded), hint)


def _is_imprecise(item: TensorDifference) -> bool:
    """Whether the delta is there as a whole, with errors everywhere: damage is in parts, other deltas do not fit."""
    is_whole = item.scale is not None and item.error < _IMPRECISION
    return is_whole and item.differing > _EVERYWHERE * item.element_count and isfinite(item.max_ulps)


def _imprecise(imprecise: Sequence[TensorDifference]) -> Problem:
    hint = "the delta is there, but less precise: the adapter or its product was rounded, such as to bfloat16"
    return Problem(_names(imprecise), "base and delta", _measured(imprecise), hint)


def _strange(strange: Sequence[TensorDifference]) -> Problem:
    are_parts = all(item.differing < item.element_count / 2 for item in strange)
    hint = "parts were damaged, or merged otherwise" if are_parts else "another adapter, another base, or damage"
    return Problem(_names(strange), "base and delta", _measured(strange), hint)


def _measured(items: Sequence[TensorDifference]) -> str:
    differing, total = sum(item.differing for item in items), sum(item.element_count for item in items)
    worst = max(item.max_ulps for item in items)
    share = f"{differing} of {total} elements ({differing / total:.2g})" if differing < total / 100 else ""
    share = share or f"{differing / total:.0%} of the elements"
    return f"other bits in {share} of {_count(items)}, at most {worst:.3g} ulp away"


def _meaning(plan: MergePlan, scale: float) -> str:
    """Return what a scale other than 1 probably comes from."""
    updates = (update for step in plan.steps() if isinstance(step, UpdateTensor) for update in step.updates)
    first = next(updates, Update("", {}, {}))
    scaling = first.settings.get("scaling")
    known = [(2.0, "the adapter was merged twice"), (-1.0, "the adapter was subtracted")]
    if first.rank > 1:
        known.append((sqrt(first.rank), "scaled by rsLoRA's alpha / sqrt(r) in place of alpha / r"))
        known.append((1 / sqrt(first.rank), "scaled by alpha / r in place of rsLoRA's alpha / sqrt(r)"))
    if isinstance(scaling, float) and scaling not in {0.0, 1.0}:
        known.append((1 / scaling, "the scaling alpha / r was left out"))
    # a delta near the rounding of the base is blurred by it
    fitting = [meaning for value, meaning in known if isclose(scale, value, rel_tol=_BLUR)]
    return ", or ".join([*fitting, f"it was merged with a weight of {scale:.4g} or another alpha"])


def _count(items: Sequence[TensorDifference]) -> str:
    return "1 tensor" if len(items) == 1 else f"{len(items)} tensors"


def _names(items: Iterable[TensorDifference]) -> str:
    members: dict[str, list[str]] = {}
    for item in items:
        members.setdefault(_NUMBER.sub("*", item.name), []).append(item.name)
    families = [family if len(names) > 1 else names[0] for family, names in members.items()]
    more = f" and {len(families) - _MAX_NAMES} more" if len(families) > _MAX_NAMES else ""
    return ", ".join(families[:_MAX_NAMES]) + more
