"""DeLoRA: W + B·diag(lambda / r / (|A_k|·|B_k|))·A, each input times the norm of its column of the base.

Source: PEFT 0.21.2 `tuners/delora/layer.py` `DeloraLayer._compute_delta`, `DeloraLinear.merge` (the delta is rounded to
the base's dtype before it is added). The norms of the base are those that the adapter stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, whole_number
from rawmerge.methods.delta import row_delta, upcast
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

if TYPE_CHECKING:
    import torch

_ROLES: Final = ("a", "b", "lambda", "w_norm")
_LEAST_NORM: Final = 1e-4


class DeloraMethod:
    """The delta of one module."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update: `a` (r, in), `b` (out, r), `lambda` (1), `w_norm` (in)."""
        own = upcast(tensors, context)
        norms = own["a"].norm(dim=1).clamp(min=_LEAST_NORM) * own["b"].norm(dim=0).clamp(min=_LEAST_NORM)
        scaled = own["b"] * (own["lambda"] / number(settings, "rank") / norms)
        product = partial(_rows, scaled, own["a"], own["w_norm"])
        return row_delta(product, (len(scaled), len(own["w_norm"])), context.rounding_dtype)


def _rows(left: torch.Tensor, right: torch.Tensor, norms: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return (left[start:stop] @ right).mul_(norms)


class DeloraKind(AdapterKind):
    """DELORA, decoupled low-rank adaptation."""

    peft_type: ClassVar[str] = "DELORA"
    title: ClassVar[str] = "DeLoRA"
    formula: ClassVar[str] = "W + λ/r·B·diag(1/(|A_k||B_k|))·A·diag(|W_:j|)"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {f"delora_{part}": part.lower() for part in ("A", "B", "lambda", "w_norm")}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(8, 1)},
        ignored=("delora_lambda", "lambda_pattern", "module_dropout", "init_weights"),
        rank="r",
    )
    methods: ClassVar[Mapping[str, Method]] = {"delora": DeloraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in)."""
        left, right = shapes.get("b", ()), shapes.get("a", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        rank, (rows, columns) = module.rank, module.matrix_shape
        module.expect("a", rank, columns)
        module.expect("b", rows, rank)
        module.expect("lambda", 1)
        module.expect("w_norm", columns)
        yield PlannedUpdate("delora", _ROLES, {"rank": rank}, working_bytes=4 * rank * (columns + 2 * rows))
