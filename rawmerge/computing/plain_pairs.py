"""Which steps are plain LoRA, pairs of factors on one whole matrix, and all that their arithmetic depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Final

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.merge_plan import ROUNDING, SUMMED, Step, Update, UpdateTensor
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
    """One pair of a step, `W + scaling * (left @ right)`; left (rows, rank), right (columns, rank).

    Attributes:
        is_summed: it is added to the pairs before it, and the sum is rounded once; else each of them is rounded.
    """

    step: UpdateTensor
    left: Factor
    right: Factor
    scaling: float
    is_summed: bool
    recipe: Recipe = field(compare=False)


def find_pairs(step: Step, compute_dtype: str) -> tuple[PlainPair, ...]:
    """Return the pairs of a step that is nothing but pairs, merged one after the other or all summed; else none."""
    if not isinstance(step, UpdateTensor) or not step.updates or step.columns or step.overlay or step.held_dtype:
        return ()
    if 0 in step.source.shape or prod(step.source.shape) < LEAST_ELEMENTS or step.base_dtype != step.source.dtype:
        return ()
    is_summed = all(update.settings.get(SUMMED) for update in step.updates)
    updates, roundings = (step.updates, ()) if is_summed else (step.updates[::2], step.updates[1::2])
    if any(update.kind != ROUNDING for update in roundings) or not all(_is_plain(update) for update in updates):
        return ()
    between = step.source.dtype if is_summed else step.entry.dtype
    dtypes = (step.source.dtype, *([between] * (len(updates) - 1)))
    if not {*dtypes, step.entry.dtype} <= DTYPE_CODES.keys():
        return ()
    return tuple(_pair(step, update, stored, compute_dtype) for update, stored in zip(updates, dtypes, strict=True))


def _is_plain(update: Update) -> bool:
    if update.kind != KIND or update.window or len(update.tensors) != 2:
        return False
    (_, lora_a), (_, lora_b) = sorted(update.tensors.items())
    if len(lora_a.shape) != 2 or len(lora_b.shape) != 2 or 0 in lora_a.shape:
        return False
    # torch multiplies without a sum where the rank is 1, so that a product of -0.0 stays one
    return lora_a.shape[0] != 1 and {lora_a.dtype, lora_b.dtype} <= DTYPE_CODES.keys()


def _pair(step: UpdateTensor, update: Update, stored: str, compute_dtype: str) -> PlainPair:
    """Return the pair of one update, which meets values of the dtype `stored`, or their sum with pairs before it."""
    (_, lora_a), (_, lora_b) = sorted(update.tensors.items())
    is_transposed = bool(update.settings["is_transposed"])
    left, right = Factor(lora_b, lies_transposed=False), Factor(lora_a, lies_transposed=True)
    if is_transposed:
        left, right = right, left
    # PEFT rounds a delta to the base's dtype; where the output has another, rawmerge does not
    is_summed = bool(update.settings.get(SUMMED))
    is_peft = compute_dtype == "float32" and stored == step.entry.dtype and not is_summed
    recipe = Recipe(
        rows=step.source.shape[0],
        columns=prod(step.source.shape[1:]),
        rank=lora_a.shape[0],
        is_transposed=is_transposed,
        is_double=compute_dtype == "float64",
        stored=stored,
        result=step.entry.dtype,
        rounds_delta=bool(update.settings["rounds_delta"]) and is_peft and step.entry.dtype != "F32",
    )
    return PlainPair(step, left, right, number(update.settings, "scaling"), is_summed, recipe)
