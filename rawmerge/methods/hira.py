"""HiRA: W + W * (B @ A), a low-rank product that scales the weight's elements.

Source: PEFT 0.21.2 `tuners/hira/layer.py`: `HiraLayer._merge`, and `get_delta_weight` of `Linear`, `Embedding` and
`_ConvNd`. The product B @ A, its product with W and the sum are each rounded to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, whole_number
from rawmerge.methods.delta import upcast
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Scratch,
    Setting,
    Shape,
    TargetModule,
    TileContext,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

_PLAIN: Final = ("hira_a", "hira_b")
_EMBEDDING: Final = ("hira_embedding_a", "hira_embedding_b")


class HiraMethod:
    """The scales of one module's elements."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the pair is upcast once."""
        (_, lora_a), (_, lora_b) = sorted(upcast(tensors, context).items())
        is_transposed = bool(settings["is_transposed"])
        return PreparedHira(PreparedLora(lora_a, lora_b, 1.0, is_transposed, context.rounding_dtype))


@dataclass(frozen=True, slots=True)
class PreparedHira(Movable):
    """Scales that are made as LoRA's delta is.

    Attributes:
        scales: what adds B @ A, rounded, to the tile that it is given.
    """

    scales: PreparedLora

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add to `tile` (rows, columns) its own product with the scales, in place."""
        rows, columns = tile.shape
        # begun at zero, as PEFT's sum over adapters is: a scale of -0 becomes 0
        product = scratch.tensor("scales", (rows, columns), tile.dtype).zero_()
        self.scales.apply(product, first_row, scratch)
        product.mul_(tile)
        rounding_dtype = self.scales.rounding_dtype
        tile.add_(product if rounding_dtype is None else product.to(rounding_dtype))


class HiraKind(AdapterKind):
    """HIRA, Hadamard high-rank adaptation."""

    peft_type: ClassVar[str] = "HIRA"
    title: ClassVar[str] = "HiRA"
    formula: ClassVar[str] = "W + W*(B@A)"
    modules: ClassVar[str] = "Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d"
    parts: ClassVar[Mapping[str, str]] = {
        "hira_A": "hira_a",
        "hira_B": "hira_b",
        "hira_embedding_A": "hira_embedding_a",
        "hira_embedding_B": "hira_embedding_b",
    }
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(32, 1)}, ignored=("hira_dropout", "init_weights"), rank="r"
    )
    methods: ClassVar[Mapping[str, Method]] = {"hira": HiraMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, in, *kernel); of an embedding (dimension, vocabulary)."""
        roles = _EMBEDDING if any(role in shapes for role in _EMBEDDING) else _PLAIN
        shape_a, shape_b = (shapes.get(role, ()) for role in roles)
        return (shape_b[0], *shape_a[1:]) if len(shape_a) > 1 and len(shape_b) > 1 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        roles = _EMBEDDING if module.is_embedding else _PLAIN
        module.need(*roles)
        dimensions = len(module.base_shape)
        if not 2 <= dimensions <= 5:
            module.refuse(next(iter(module.shapes)), "a base weight of 2 to 5 dimensions", f"{list(module.base_shape)}")
        kernel, rank = module.base_shape[2:], module.rank
        if module.shapes[roles[0]][:1] == (module.values["r"],):
            rank = module.values["r"]  # PEFT 0.21.2 takes no heed of rank_pattern when it makes a layer
        outputs, inputs = module.matrix_shape if dimensions == 2 else module.base_shape[:2]
        module.expect(roles[0], rank, inputs, *kernel)
        module.expect(roles[1], outputs, rank, *(1 for _ in kernel))
        is_transposed = dimensions == 2 and module.needs_transpose
        working = 4 * rank * (module.matrix_shape[0] + module.matrix_shape[1])
        yield PlannedUpdate("hira", roles, {"is_transposed": is_transposed}, working_bytes=working)
