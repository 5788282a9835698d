"""What a merge loses, tensor by tensor: of deltas in sums, and of values in casts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from rawmerge.computing.cast_loss import CastLoss
from rawmerge.computing.survival import Survival


@dataclass(frozen=True, slots=True)
class Losses:
    """What was measured of some output tensors, by their names.

    Attributes:
        survivals: what rounding left of the delta of each updated tensor.
        casts: what was taken from each tensor that came to another dtype, where that may lose something.
    """

    survivals: Mapping[str, Survival] = field(default_factory=dict)
    casts: Mapping[str, CastLoss] = field(default_factory=dict)

    def __or__(self, other: Losses) -> Losses:
        """Return both together."""
        return Losses({**self.survivals, **other.survivals}, {**self.casts, **other.casts})

    @property
    def names(self) -> set[str]:
        """The tensors that were measured."""
        return {*self.survivals, *self.casts}

    def of(self, names: Collection[str]) -> Losses:
        """Return what was measured of these tensors; others may be added meanwhile."""
        survivals = {name: self.survivals[name] for name in names if name in self.survivals}
        return Losses(survivals, {name: self.casts[name] for name in names if name in self.casts})
