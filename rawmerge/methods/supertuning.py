"""Super-Tuning: W plus some numbers, at stored places or where |W| is largest, and in Supra mode plus a LoRA pair.

Source: PEFT 0.21.2 `tuners/supertuning/layer.py`: `SupertuningLayer.update_layer` (how many, and where),
`Linear.merge` and `_lora_delta`. Numbers, their sums with W, the pair's product and its sum are each rounded to the
base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.errors import MergeError
from rawmerge.formats.kind_fields import Field, KindFields, is_finite, switch, whole_number
from rawmerge.methods.interface import (
    ROWS,
    WHOLE,
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Scratch,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.randomness import matrix_of_linear

if TYPE_CHECKING:
    import torch


class SparseMethod:
    """Numbers added at places of the flattened weight."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update, its places in ascending order.

        Raises:
            MergeError: a place is none of the base's, or stands twice.
        """
        values = tensors["values"].to(context.compute_dtype)
        if context.rounding_dtype is not None:
            values = values.to(context.rounding_dtype).to(context.compute_dtype)
        if "indices" in tensors:
            places = _checked(tensors["indices"], prod(context.shape))
        else:
            places = _largest(context, len(values), bool(settings["select_top"]))
        order = places.argsort()
        return PreparedSparse(places[order], values[order], context.rounding_dtype)


@dataclass(frozen=True, slots=True)
class PreparedSparse:
    """Numbers and their places, which ascend.

    Attributes:
        places: (n,) int64, in the flattened weight.
        values: (n,) in compute dtype.
        rounding_dtype: dtype to which the sums are rounded, for another update may follow; None for none.
    """

    places: torch.Tensor
    values: torch.Tensor
    rounding_dtype: torch.dtype | None

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Add the numbers of these rows to `tile` (rows, columns), in place."""
        import torch

        rows, columns = tile.shape
        bounds = torch.tensor([first_row * columns, (first_row + rows) * columns])
        start, stop = torch.searchsorted(self.places, bounds).tolist()
        places = self.places[start:stop] - first_row * columns
        inside = (places // columns, places % columns)
        sums = tile[inside] + self.values[start:stop]
        tile[inside] = sums if self.rounding_dtype is None else sums.to(self.rounding_dtype).to(tile.dtype)


def _checked(indices: torch.Tensor, size: int) -> torch.Tensor:
    places = indices.long()
    lowest, highest = int(places.min()), int(places.max())
    if lowest < 0 or highest >= size:
        found = f"{lowest} to {highest}"
        raise MergeError(f"'supertuning_indices': expected places from 0 to {size - 1}, found {found}")
    in_order = places.sort().values
    if bool((in_order[1:] == in_order[:-1]).any()):
        raise MergeError("'supertuning_indices': expected each place once, found one twice")
    return places


def _largest(context: TileContext, count: int, is_top: bool) -> torch.Tensor:
    """Return the places of the largest (or smallest) elements; PEFT's own call, for many elements are equal."""
    import torch

    magnitudes = context.whole().to(context.base_dtype).abs().flatten()
    return torch.topk(magnitudes, k=count, largest=is_top).indices


class SupraMethod:
    """The LoRA pair's delta."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; PEFT rounds the delta."""
        lora_a, lora_b = (tensors[role].to(context.compute_dtype) for role in ("a", "b"))
        return PreparedLora(lora_a, lora_b, number(settings, "scaling"), False, context.rounding_dtype)


class SupertuningKind(AdapterKind):
    """SUPERTUNING, sparse fine-tuning, and Supra, with a LoRA pair beside."""

    peft_type: ClassVar[str] = "SUPERTUNING"
    title: ClassVar[str] = "Super-Tuning, Supra"
    formula: ClassVar[str] = "W + v at stored places or where |W| is largest; Supra: + s·B@A"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {
        "supertuning_values": "values",
        "supertuning_indices": "indices",
        "supertuning_lora_A.weight": "a",
        "supertuning_lora_B.weight": "b",
    }
    integers: ClassVar[tuple[str, ...]] = ("indices",)
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "sparsity": Field(lambda value: is_finite(value) and 0 <= value < 1, "a number from 0 to below 1", 0.99),
            "select_top": switch(True),
            "r": whole_number(0, 1),
            "lora_alpha": Field(is_finite, "a finite number"),
            "save_precomputed_indices": switch(True),
        },
        ignored=("lora_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"supertuning": SparseMethod(), "supra": SupraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in) in Supra mode; numbers at places do not tell."""
        left, right = shapes.get("b", ()), shapes.get("a", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the numbers' update, then that of the pair."""
        module.refuse_transposed()
        rows, columns = matrix_of_linear(module)
        values = module.values
        count = int(rows * columns * (1 - values["sparsity"]))  # as PEFT rounds it
        module.expect("values", count)
        # places, their order, places in order and their checks; numbers thrice
        working, roles, reach = count * (6 * 8 + 3 * 4), ["values"], ROWS
        if values["save_precomputed_indices"] or "indices" in module.shapes:
            module.expect("indices", count)
            if module.dtypes["indices"] not in ("I32", "I64"):
                module.refuse("indices", "dtype I32 or I64", module.dtypes["indices"])
            roles.append("indices")
        else:
            reach, working = WHOLE, working + 3 * 4 * rows * columns + 16 * rows * columns
        settings = {"select_top": values["select_top"]}
        yield PlannedUpdate("supertuning", tuple(roles), settings, reach=reach, working_bytes=working)
        if rank := values["r"]:
            alpha = 2 * rank if values["lora_alpha"] is None else values["lora_alpha"]
            module.expect("a", rank, columns)
            module.expect("b", rows, rank)
            working = 4 * rank * (rows + columns)
            yield PlannedUpdate("supra", ("a", "b"), {"scaling": alpha / rank}, working_bytes=working)
