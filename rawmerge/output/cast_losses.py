"""What the casts of a merge took: tensor by tensor as JSON, and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any, Final

from rawmerge.computing.cast_loss import CastLoss
from rawmerge.dtypes import OUTPUT_DTYPES

#: Tensors that are told by name: those that lost most.
MOST_NAMED: Final = 20
_NAMES: Final = {code: name for name, code in OUTPUT_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class CastLosses:
    """What all casts of a merge took together.

    Attributes:
        tensors: those that came to a dtype that lacks some values of their own.
        dtypes: what they came to, as `--dtype` names them.
        elements: how many they have.
        rounded: those that are stored as another value; zeroed: of them, those that became 0; subnormal: those that
            are stored below the smallest normal number, with fewer bits, and are not 0.
        largest: the largest relative distance from a value, of those that did not become 0, with four digits: the rest
            depends on the arithmetic.
        worst: tensors that lost something, those with the most zeros first, then those with the largest share of
            rounded elements; at most `MOST_NAMED`.
    """

    tensors: int
    dtypes: tuple[str, ...]
    elements: int
    rounded: int
    zeroed: int
    subnormal: int
    largest: float
    worst: Mapping[str, CastLoss]


def cast_losses(casts: Mapping[str, CastLoss]) -> CastLosses:
    """Return what was taken in all."""
    found = list(casts.values())
    lossy = sorted((item for item in casts.items() if item[1].rounded), key=_by_loss)
    return CastLosses(
        tensors=len(found),
        dtypes=tuple(sorted({_NAMES.get(item.dtype, item.dtype) for item in found})),
        elements=sum(item.elements for item in found),
        rounded=sum(item.rounded for item in found),
        zeroed=sum(item.zeroed for item in found),
        subnormal=sum(item.subnormal for item in found),
        largest=_digits(max((item.largest for item in found), default=0.0)),
        worst=dict(lossy[:MOST_NAMED]),
    )


def _by_loss(item: tuple[str, CastLoss]) -> tuple[int, float, str]:
    name, loss = item
    return -loss.zeroed, -loss.rounded / loss.elements, name


def cast_record(casts: Mapping[str, CastLoss]) -> dict[str, Any]:
    """Return what record and summary tell of it, as JSON; the worst first."""
    losses = cast_losses(casts)
    worst = [{"name": name} | asdict(item) | {"largest": _digits(item.largest)} for name, item in losses.worst.items()]
    return asdict(losses) | {"dtypes": list(losses.dtypes), "worst": worst}


def _digits(ratio: float) -> float:
    return float(f"{ratio:.4g}")


def cast_fields(casts: Mapping[str, CastLoss]) -> dict[str, list[str | float]]:
    """Return all of it as JSON."""
    return {name: list(astuple(item)) for name, item in casts.items()}


def parse_casts(fields: Any) -> dict[str, CastLoss]:
    """Return what `cast_fields` gave.

    Raises:
        AttributeError, OverflowError, TypeError, ValueError: it is something else.
    """
    return {str(name): _parse(*values) for name, values in fields.items()}


def _parse(dtype: Any, elements: Any, rounded: Any, zeroed: Any, subnormal: Any, largest: Any) -> CastLoss:
    loss = CastLoss(str(dtype), int(elements), int(rounded), int(zeroed), int(subnormal), float(largest))
    low = loss.zeroed + loss.subnormal
    if not 0 <= min(loss.zeroed, loss.subnormal) <= low <= loss.rounded <= loss.elements < 2**63 or loss.elements == 0:
        raise ValueError("no counts of elements")
    if dtype not in _NAMES and dtype != "F64":
        raise ValueError("no dtype of floats")
    if not 0 <= loss.largest <= 1:
        raise ValueError("no relative distance")
    return loss
