"""What rounding left of the deltas of a merge: as the record has it, and in all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple, dataclass
from math import fsum, isfinite, nan, sqrt
from typing import Any, Final

from rawmerge.computing.survival import Survival

#: From here on much is lost: the error is as long as half of the delta.
MUCH: Final = 0.5
_MOST_NAMES: Final = 8
#: Its square, times any number of rows, is a float.
_LONGEST: Final = 1e140


@dataclass(frozen=True, slots=True)
class Surviving:
    """What rounding left of all deltas of a merge together; ratios are None where there is no delta.

    Attributes:
        tensors: updated tensors that were measured.
        changed: share of the elements that the deltas touch whose stored value is another than the base's.
        norm: length of the stored changes beside that of the deltas; rounding may make it longer.
        lost: length of the error beside that of the deltas, at most 1.
        much_lost: tensor to its own `lost`, where that is half or more; the most first.
    """

    tensors: int
    changed: float | None
    norm: float | None
    lost: float | None
    much_lost: Mapping[str, float]


def surviving(survivals: Mapping[str, Survival]) -> Surviving:
    """Return what is left in all; tensors count by their size, of which each was sampled."""
    found = list(survivals.values())
    delta, applied, error = (
        sqrt(fsum(item.stride * getattr(item, name) ** 2 for item in found if _is_short(item)))
        for name in ("delta_norm", "applied_norm", "error_norm")
    )
    touched = sum(item.stride * item.touched for item in found)
    changed = sum(item.stride * item.changed for item in found)
    much = {name: item.lost for name, item in survivals.items() if item.lost is not None and item.lost >= MUCH}
    return Surviving(
        tensors=len(found),
        changed=changed / touched if touched else None,
        norm=applied / delta if delta else None,
        lost=min(1.0, error / delta) if delta else None,
        much_lost=dict(sorted(much.items(), key=lambda item: (-item[1], item[0]))),
    )


def _is_short(item: Survival) -> bool:
    """Whether squares of an item's norms are finite."""
    return max(item.delta_norm, item.applied_norm, item.error_norm) <= _LONGEST and isfinite(item.delta_norm)


def lost_notes(survivals: Mapping[str, Survival], unchanged: Collection[str]) -> Iterator[str]:
    """Yield a warning where much of a delta is lost; tensors of which nothing is left are told elsewhere."""
    much = surviving(survivals).much_lost
    if listed := [f"{name} {lost:.0%}" for name, lost in much.items() if name not in unchanged]:
        more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
        yield (
            f"warning: half of the delta or more was lost in rounding in {len(listed)} of {len(survivals)} updated "
            f"tensors ({', '.join(listed[:_MOST_NAMES])}{more}); --dtype float32 keeps it"
        )


def survival_records(survivals: Mapping[str, Survival]) -> dict[str, dict[str, float | int | None]]:
    """Return what the record tells of each tensor.

    Ratios have four digits: the rest depends on in which order a processor sums.
    """
    return {name: _record(item) for name, item in survivals.items()}


def _record(item: Survival) -> dict[str, float | int | None]:
    ratios = {"changed": item.changed_share, "norm": item.norm_kept, "lost": item.lost}
    record: dict[str, float | int | None] = {
        name: None if ratio is None else float(f"{ratio:.4g}") for name, ratio in ratios.items()
    }
    return record if item.stride == 1 else record | {"every_row": item.stride}


def survival_fields(survivals: Mapping[str, Survival]) -> dict[str, list[float | None]]:
    """Return all of it as JSON, in which what is not finite is null."""
    return {name: [value if isfinite(value) else None for value in astuple(item)] for name, item in survivals.items()}


def parse_survivals(fields: Any) -> dict[str, Survival]:
    """Return what `survival_fields` gave.

    Raises:
        AttributeError, OverflowError, TypeError, ValueError: it is something else.
    """
    return {str(name): _parse(*values) for name, values in fields.items()}


def _parse(touched: Any, changed: Any, delta: Any, applied: Any, error: Any, stride: Any) -> Survival:
    counts = [int(count) for count in (touched, changed, stride)]
    if not 0 <= counts[1] <= counts[0] < 2**63 or not 1 <= counts[2] < 2**63:
        raise ValueError("no counts of elements")
    return Survival(counts[0], counts[1], _norm(delta), _norm(applied), _norm(error), counts[2])


def _norm(value: Any) -> float:
    norm = nan if value is None else float(value)
    if norm < 0 or norm > _LONGEST:
        raise ValueError("no length of a delta")
    return norm
