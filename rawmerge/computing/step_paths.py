"""Which steps the compiled kernel does, which torch does, and what this machine knows about it. No torch here."""

from __future__ import annotations

import sys

from rawmerge.computing.certificates import Certificates
from rawmerge.computing.plain_pairs import PlainPair, find_pairs
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
        self._pairs: dict[int, tuple[Step, tuple[PlainPair, ...]]] = {}

    def pairs(self, step: Step) -> tuple[PlainPair, ...]:
        """Return a step's pairs if the kernel may do it; they are asked for by who forecasts, orders and computes."""
        known = self._pairs.get(id(step))
        if known is None:  # the step is kept beside them, so that no other gets its number
            known = self._pairs[id(step)] = (step, self._find(step))
        return known[1]

    def _find(self, step: Step) -> tuple[PlainPair, ...]:
        pairs = find_pairs(step, self._compute_dtype) if self.certificates else ()
        # bits of low products depend on torch's thread count, which a caller who has torch may have changed
        is_unsure = self._has_callers_torch and any(is_low(pair.recipe.rows, pair.recipe.columns) for pair in pairs)
        return () if is_unsure else pairs

    def block(self, pair: PlainPair) -> int | None:
        """Return the block with which the kernel has torch's bits; 0 for none, None where no trial was made."""
        return self.certificates.block(pair.recipe) if self.certificates else 0

    def needs_torch(self, step: Step) -> bool:
        """Whether torch must be imported before this step can be computed."""
        pairs = self.pairs(step)
        return not pairs or not all(map(self.block, pairs))
