"""DEFT: W + Q @ (s * R - Z.T @ W), which takes a subspace out of W and puts a trained part in; PaRa only takes out.

Source: PEFT 0.21.2 `tuners/deft/layer.py`: `DeftLinear._project`, `_merge_factor` and `_delta_from_factor`. Q and Z are
P and relu(P), or both the orthogonal factor of P.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import KindFields, finite_number, one_of, switch, whole_number
from rawmerge.methods.interface import (
    WHOLE,
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


class DeftMethod:
    """The delta of one module, as a LoRA pair of Q and what it multiplies."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the base is projected whole, for the bits of the sum over its rows."""
        import torch

        # PEFT computes on a float64 base in float32, too
        dtype = context.compute_dtype if context.rounding_dtype is None else torch.float32
        own = {role: tensor.to(dtype) for role, tensor in tensors.items()}
        is_transposed = bool(settings["is_transposed"])
        direction, whole = own["projection"], context.whole().to(dtype)
        left = torch.linalg.qr(direction)[0] if settings["is_orthogonal"] else direction
        right = left if settings["is_orthogonal"] else torch.relu(direction)
        taken = right.transpose(0, 1) @ (whole.transpose(0, 1) if is_transposed else whole)
        if "injection" not in own:
            return PreparedLora(taken, left, -1.0, is_transposed, context.rounding_dtype)
        change = own["injection"] * number(settings, "scaling") - taken
        return PreparedLora(change, left, 1.0, is_transposed, context.rounding_dtype)


class DeftKind(AdapterKind):
    """DEFT, decompositional fine-tuning, and PaRa."""

    peft_type: ClassVar[str] = "DEFT"
    title: ClassVar[str] = "DEFT, PaRa"
    formula: ClassVar[str] = "W + Q@(s·R - Zᵀ@W), PaRa: R = 0"
    parts: ClassVar[Mapping[str, str]] = {"deft_P": "projection", "deft_R": "injection"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(8, 1),
            "decomposition_method": one_of("relu", "qr"),
            "alpha": finite_number(0),
            "para": switch(False),
        },
        ignored=("init_scale", "deft_dropout", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"deft": DeftMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in), (out, -1) of PaRa."""
        left, right = shapes.get("projection", ()), shapes.get("injection", ())
        if len(left) != 2 or len(right) not in (0, 2):
            return None
        return (left[0], right[1] if right else -1)

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; PEFT lowers r to the number of outputs."""
        values, (rows, columns) = module.values, matrix_of_linear(module)
        rank = min(values["r"], rows)
        module.expect("projection", rows, rank)
        roles = ["projection"]
        if not values["para"]:
            module.expect("injection", rank, columns)
            roles.append("injection")
        settings = {
            "is_transposed": module.needs_transpose,
            "is_orthogonal": values["decomposition_method"] == "qr",
            "scaling": values["alpha"] / rank if values["alpha"] else 1.0,
        }
        # the base, twice while it is multiplied; P, Q, Z and their copies; R, what is taken, their difference
        working = 4 * (2 * prod(module.base_shape) + rank * (5 * rows + 4 * columns))
        yield PlannedUpdate("deft", tuple(roles), settings, reach=WHOLE, working_bytes=working)
