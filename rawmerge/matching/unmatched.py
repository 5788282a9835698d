"""Why a name of the adapter has no place in the base, and what to do about it."""

from __future__ import annotations

from rawmerge.dtypes import DTYPES
from rawmerge.errors import Problem, quote
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.matching.disk_names import DiskNames
from rawmerge.matching.naming import Resolution
from rawmerge.matching.near_misses import suggest
from rawmerge.matching.places import Place

#: Finding near misses compares names with names; past this many, one more suggestion tells nothing new.
_MAX_SUGGESTIONS = 25
_MAX_CANDIDATES = 6
#: How quantised formats name a module's packed weight: GPTQ and AWQ, compressed-tensors, MXFP4.
_PACKED_ENDINGS = ("qweight", "weight_packed", "weight_blocks")


class Unmatched:
    """Makes the problems of names that lead nowhere, or to several places."""

    def __init__(self, base: BaseCheckpoint, names: DiskNames) -> None:
        self._base = base
        self._names = names
        self._suggestions = 0

    def problem(self, subject: str, target: str, resolution: Resolution, what: str) -> Problem:
        """Return why `subject`, an adapter tensor that is about `target`, cannot be placed."""
        if resolution.candidates:
            listed = ", ".join(map(quote, resolution.candidates[:_MAX_CANDIDATES]))
            found = f"{len(resolution.candidates)} that fit: {listed}"
            hint = "rename the adapter's tensors to the full path of the one that it was trained on"
            return Problem(subject, f"one base tensor for {quote(target)}", found, hint)
        expected = f"a base tensor {quote(target)} {what}"
        canonical = self._names.family.canonical(target)
        if place := resolution.place:
            found = f"it in parts: {', '.join(map(quote, place.tensors[:_MAX_CANDIDATES]))}"
            return Problem(subject, f"one whole base tensor for {quote(target)} {what}", found)
        if reason := self._incomplete(canonical):
            return Problem(subject, expected, reason, "the checkpoint is incomplete; fetch it again")
        if packed := self._packed(target, canonical):
            return Problem(subject, expected, f"packed weights, {quote(packed)}", "merge into the unquantised base")
        return Problem(subject, expected, "none", self.suggest(target))

    def suggest(self, target: str) -> str:
        """Return a hint of what the name may have meant."""
        self._suggestions += 1
        return suggest(target, self._base.tensors) if self._suggestions <= _MAX_SUGGESTIONS else ""

    def dtype_problem(self, place: Place, tied_dtype: str = "F32") -> Problem | None:
        """Return why a delta cannot be added to a place.

        Args:
            place: the place.
            tied_dtype: dtype of the tensor that a place not on disk is tied to.
        """
        for name in place.tensors:
            if reason := self._names.family.unsupported(name):
                hint = "save the base with the transformers version that the adapter was trained with"
                return Problem(name, "a tensor as the model holds it", reason, hint)
            dtype = self._base.tensors[name].dtype if name in self._base.tensors else tied_dtype
            if not DTYPES[dtype].is_mergeable:
                hint = "merge into the unquantised base"
                return Problem(name, "a plain float dtype (F64, F32, BF16, F16)", dtype, hint)
        return None

    def _incomplete(self, canonical: str) -> str:
        """Return what is missing of a fused parameter, or of one of a module whose pairs name none."""
        module = canonical.removesuffix(".weight")
        found = self._names.incomplete.items()
        return next((why for name, why in found if name == canonical or name.rpartition(".")[0] == module), "")

    def _packed(self, target: str, canonical: str) -> str:
        stems = [name.removesuffix(".weight") for name in (target, canonical)]
        joined = (f"{stem}{mark}{ending}" for stem in stems for mark in "._" for ending in _PACKED_ENDINGS)
        experts = (f"{stem}_{ending}" for stem in stems for ending in ("blocks", "scales"))
        return next((name for name in (*joined, *experts) if name in self._base.tensors), "")
