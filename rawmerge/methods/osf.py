"""OSF: the low part of the base's singular value decomposition, replaced by a trained one.

Source: PEFT 0.21.2 `tuners/osf/utils.py` `decompose_weight_matrix`, `tuners/osf/layer.py` `OSFLayer.get_delta_weight`
and `merge`. The base's own low part is rounded to the base's dtype, as it was when the adapter was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.delta import decomposition_bytes, upcast, whole_delta
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
)

if TYPE_CHECKING:
    import torch


class OsfMethod:
    """The difference of the trained and the base's own low part."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the base is decomposed whole."""
        import torch

        own, weight = upcast(tensors, context), context.whole()
        # PEFT decomposes a float64 base in float32, too
        weight = weight if context.rounding_dtype is None else weight.to(torch.float32)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        high = len(values) - own["values"].numel()
        parts = (left[:, high:], values[high:], right[high:])
        low = [part.contiguous().to(context.base_dtype).to(context.compute_dtype) for part in parts]
        initial = torch.mm(low[0] * low[1], low[2])
        trained = torch.mm(own["left"] * own["values"], own["right"])
        return whole_delta(trained - initial)


class OsfKind(AdapterKind):
    """OSF, orthogonal subspace fine-tuning."""

    peft_type: ClassVar[str] = "OSF"
    title: ClassVar[str] = "OSF"
    formula: ClassVar[str] = "W + U·S·V - U0·S0·V0, the base's lowest singular values"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {
        "osf_svd_params.U_low": "left",
        "osf_svd_params.S_low": "values",
        "osf_svd_params.V_low": "right",
    }
    fields: ClassVar[KindFields] = KindFields(
        # how many singular values are kept shows in how many are stored
        ignored=("effective_rank", "rank_pattern", "init_weights"),
    )
    methods: ClassVar[Mapping[str, Method]] = {"osf": OsfMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in)."""
        left, right = shapes.get("left", ()), shapes.get("right", ())
        return (left[0], right[1]) if len(left) == len(right) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update; the rank that is replaced is that of the stored tensors."""
        module.refuse_transposed()
        rows, columns = module.matrix_shape
        module.expect("values", -1)
        rank = module.shapes["values"][0]
        module.expect("left", rows, rank)
        module.expect("right", rank, columns)
        if rank > min(rows, columns):
            module.refuse("values", f"at most {min(rows, columns)} values", f"{rank}")
        working = decomposition_bytes(rows, columns)
        yield PlannedUpdate("osf", ("left", "values", "right"), reach=WHOLE, working_bytes=working)
