"""What rounding left of the deltas of a merge: as the record has it, and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from math import fsum, isfinite, nan, sqrt
from typing import Any, Final

from rawmerge.computing.survival import Survival

#: From here on much is lost: the error is as long as half of the delta.
MUCH: Final = 0.5


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
        sqrt(fsum(item.stride * getattr(item, name) ** 2 for item in found if isfinite(item.delta_norm)))
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
        AttributeError, TypeError, ValueError: it is something else.
    """
    return {str(name): _parse(*values) for name, values in fields.items()}


def _parse(touched: Any, changed: Any, delta: Any, applied: Any, error: Any, stride: Any) -> Survival:
    return Survival(int(touched), int(changed), _norm(delta), _norm(applied), _norm(error), int(stride))


def _norm(value: Any) -> float:
    return nan if value is None else float(value)
