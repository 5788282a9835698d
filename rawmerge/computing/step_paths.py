"""Which steps the compiled kernel does, which torch does, and what this machine knows about it. No torch here."""

from __future__ import annotations

import sys

from rawmerge.computing.certificates import Certificates
from rawmerge.computing.plain_pairs import PlainPair, find_pair
from rawmerge.engine.tiles import is_low
from rawmerge.merge_plan import Step
from rawmerge.native import kernel
from rawmerge.run_options import RunOptions


class StepPaths:
    """The ways in which the steps of one merge are computed.

    Attributes:
        certificates: what is known of the kernel's bits; None where it is not there, or not to be used.
    """

    def __init__(self, compute_dtype: str, options: RunOptions) -> None:
        has_kernel = kernel() is not None and options.uses("kernel") and options.device == "cpu"
        self.certificates = Certificates() if has_kernel else None
        self._compute_dtype = compute_dtype
        self._has_callers_torch = "torch" in sys.modules
        self._pairs: dict[int, tuple[Step, PlainPair | None]] = {}

    def pair(self, step: Step) -> PlainPair | None:
        """Return a step's pair if the kernel may do it; it is asked for by whoever forecasts, orders and computes."""
        known = self._pairs.get(id(step))
        if known is None:  # the step is kept beside it, so that no other gets its number
            known = self._pairs[id(step)] = (step, self._find(step))
        return known[1]

    def _find(self, step: Step) -> PlainPair | None:
        pair = find_pair(step, self._compute_dtype) if self.certificates else None
        # bits of low products depend on torch's thread count, which a caller who has torch may have changed
        return None if pair and self._has_callers_torch and is_low(pair.recipe.rows, pair.recipe.columns) else pair

    def block(self, pair: PlainPair) -> int | None:
        """Return the block with which the kernel has torch's bits; 0 for none, None where no trial was made."""
        return self.certificates.block(pair.recipe) if self.certificates else 0

    def needs_torch(self, step: Step) -> bool:
        """Whether torch must be imported before this step can be computed."""
        pair = self.pair(step)
        return pair is None or not self.block(pair)
