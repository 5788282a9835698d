"""VB-LoRA: W + B @ A, whose parts are weighted sums of vectors from one bank for all modules.

Source: PEFT 0.21.2 `tuners/vblora/layer.py` `Linear._get_lora_matrices` and `get_delta_weight`;
`tuners/vblora/model.py` `VBLoRAModel._remap_adapter_state_dict_for_load`, for adapters that hold the largest weights
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.errors import MergeError
from rawmerge.formats.kind_fields import KindFields, switch, whole_number
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
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

_HALVES: Final = ("A", "B")


class VbloraMethod:
    """The delta of one module, as a LoRA pair."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update."""
        count, bank = int(number(settings, "count")), tensors["bank"].to(context.compute_dtype)
        parts = []
        for half in _HALVES:
            logits, indices = _largest(half, tensors, count, context.compute_dtype)
            _check_indices(half, indices, len(bank))
            weights = logits.softmax(dim=-1)
            parts.append((weights.unsqueeze(-1) * bank[indices]).sum(-2))
        return PreparedLora(
            lora_a=parts[0].flatten(1),
            lora_b=parts[1].transpose(1, 2).flatten(0, 1),
            scaling=1.0,
            is_transposed=bool(settings["is_transposed"]),
            rounding_dtype=None,
        )


def _largest(
    half: str, tensors: Mapping[str, torch.Tensor], count: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest logits of each part, and which vectors they are of: (…, count), largest first."""
    import torch

    if f"logits_{half}" in tensors:
        values, indices = tensors[f"logits_{half}"].to(dtype).topk(count, dim=-1)
        return values, indices
    weights, indices = tensors[f"weights_{half}"].to(dtype), tensors[f"indices_{half}"].long()
    # the last weight is what the others leave; PEFT makes logits of them and takes those apart again
    logits = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).log()
    values, order = logits.topk(count, dim=-1)
    return values, indices.gather(-1, order)


def _check_indices(half: str, indices: torch.Tensor, vector_count: int) -> None:
    if indices.min() < 0 or indices.max() >= vector_count:
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise MergeError(
            f"'vblora_logits_{half}_topk_indices': expected numbers from 0 to {vector_count - 1}, found {found}"
        )
    ordered = indices.sort(dim=-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise MergeError(f"'vblora_logits_{half}_topk_indices': expected different vectors in a sum, found one twice")


class VbloraKind(AdapterKind):
    """VBLORA, sums of shared vectors."""

    peft_type: ClassVar[str] = "VBLORA"
    title: ClassVar[str] = "VB-LoRA"
    formula: ClassVar[str] = "W + B@A, of weighted sums of a bank's vectors"
    parts: ClassVar[Mapping[str, str]] = {
        **{f"vblora_logits_{half}": f"logits_{half}" for half in _HALVES},
        **{f"vblora_logits_{half}_topk_indices": f"indices_{half}" for half in _HALVES},
        **{f"vblora_logits_{half}_topk_weights": f"weights_{half}" for half in _HALVES},
    }
    shared: ClassVar[Mapping[str, str]] = {"vblora_vector_bank": "bank"}
    integers: ClassVar[tuple[str, ...]] = ("indices_A", "indices_B")
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(4, 1),
            "num_vectors": whole_number(256, 1),
            "vector_length": whole_number(256, 1),
            "topk": whole_number(2, 1),
            "save_only_topk_weights": switch(False),
        },
        ignored=("vblora_dropout", "init_vector_bank_bound", "init_logits_std"),
        rank="r",
    )
    methods: ClassVar[Mapping[str, Method]] = {"vblora": VbloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (out, in): how many vectors stand in each, times their length."""
        halves = {name.rpartition("_")[2]: shape for name, shape in shapes.items() if len(shape) == 3}
        if halves.keys() != set(_HALVES):
            return None
        length = values["vector_length"]
        return halves["B"][0] * length, halves["A"][1] * length

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        values, (rows, columns) = module.values, matrix_of_linear(module)
        count, vectors, length = (values[name] for name in ("topk", "num_vectors", "vector_length"))
        module.expect("bank", vectors, length)
        if rows % length or columns % length or count > vectors:
            expected = (
                f"a bank of at least topk = {count} vectors, whose length divides the base's {rows} and {columns}"
            )
            module.refuse("bank", expected, f"shape {list(module.shared['bank'])}")
        tiles = {"A": (module.rank, columns // length), "B": (rows // length, module.rank)}
        roles = ["bank"]
        for half, shape in tiles.items():
            roles += self._expect_half(module, half, shape)
        settings = {"count": count, "is_transposed": module.needs_transpose}
        # weighted vectors and the vectors themselves; logits in compute dtype
        parts = sum(map(prod, tiles.values()))
        working = 4 * parts * (2 * count * length + (0 if values["save_only_topk_weights"] else vectors))
        yield PlannedUpdate("vblora", tuple(roles), settings, working_bytes=working)

    def _expect_half(self, module: TargetModule, half: str, shape: Shape) -> list[str]:
        """Check the tensors of A or B; return their roles."""
        count = module.values["topk"]
        if not module.values["save_only_topk_weights"]:
            module.expect(f"logits_{half}", *shape, module.values["num_vectors"])
            return [f"logits_{half}"]
        indices, weights = f"indices_{half}", f"weights_{half}"
        module.expect(indices, *shape, count)
        module.need(weights)
        if module.dtypes[indices] not in {"U8", "I8", "I16", "I32", "I64"}:
            module.refuse(indices, "whole numbers", module.dtypes[indices])
        if module.shapes[weights] != (
            *shape,
            count - 1,
        ):  # of the largest alone there are none: a tensor of no elements
            module.refuse(weights, f"shape {[*shape, count - 1]}", f"shape {list(module.shapes[weights])}")
        return [indices, weights]
