"""Which steps are plain LoRA, one pair of factors on one whole matrix, and all that their arithmetic depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Final

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import Step, Update, UpdateTensor
from rawmerge.methods.interface import number
from rawmerge.methods.lora import KIND
from rawmerge.native import DTYPE_CODES
from rawmerge.native.recipe import Recipe

#: A trial of fewer elements may agree by chance with an order of sums that is not torch's.
LEAST_ELEMENTS: Final = 4096


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a product in an adapter's file: (outer, rank), or (rank, outer) where it lies transposed."""

    source: TensorSource
    lies_transposed: bool


@dataclass(frozen=True, slots=True)
class PlainPair:
    """A step that is `W + scaling * (left @ right)`; left (rows, rank), right (columns, rank)."""

    step: UpdateTensor
    left: Factor
    right: Factor
    scaling: float
    recipe: Recipe = field(compare=False)


def find_pair(step: Step, compute_dtype: str) -> PlainPair | None:
    """Return the pair of a step that is nothing but one; None for any other step."""
    if not isinstance(step, UpdateTensor) or len(step.updates) != 1 or step.columns or step.overlay:
        return None
    update = step.updates[0]
    if update.kind != KIND or update.window or not _has_plain_dtypes(step, update):
        return None
    (_, lora_a), (_, lora_b) = sorted(update.tensors.items())
    if len(lora_a.shape) != 2 or len(lora_b.shape) != 2 or 0 in (*step.source.shape, *lora_a.shape):
        return None
    if lora_a.shape[0] == 1:  # torch multiplies without a sum then, so that a product of -0.0 stays one
        return None
    if prod(step.source.shape) < LEAST_ELEMENTS:
        return None
    is_transposed = bool(update.settings["is_transposed"])
    left, right = Factor(lora_b, lies_transposed=False), Factor(lora_a, lies_transposed=True)
    if is_transposed:
        left, right = right, left
    rows, columns = step.source.shape[0], prod(step.source.shape[1:])
    # PEFT rounds a delta to the base's dtype; where the output has another, rawmerge does not
    is_peft = compute_dtype == "float32" and step.source.dtype == step.entry.dtype
    recipe = Recipe(
        rows=rows,
        columns=columns,
        rank=lora_a.shape[0],
        is_transposed=is_transposed,
        is_double=compute_dtype == "float64",
        stored=step.source.dtype,
        result=step.entry.dtype,
        rounds_delta=bool(update.settings["rounds_delta"]) and is_peft and step.entry.dtype != "F32",
    )
    return PlainPair(step, left, right, number(update.settings, "scaling"), recipe)


def _has_plain_dtypes(step: UpdateTensor, update: Update) -> bool:
    codes = {step.source.dtype, step.entry.dtype, *(source.dtype for source in update.tensors.values())}
    return codes <= DTYPE_CODES.keys() and step.base_dtype == step.source.dtype
