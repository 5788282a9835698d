"""DoRA: (m / ||W + delta||) * (W + delta), the delta LoRA's, norms over each output's weights.

Outputs are the rows of linear and convolution weights, so those are scaled row by row. They are the columns of Conv1D's
weights and of embeddings (there one norm for each dimension, over the whole vocabulary): their norms are taken in a
pass of its own. Nothing is rounded but the result, once.

Source: PEFT 0.21.2 `tuners/lora/variants.py` (`DoraLinearVariant.merge_unsafe`, `DoraEmbeddingVariant`,
`_DoraConvNdVariant`), `tuners/lora/dora.py` `get_weight_norm`. In float64 the norms are, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rawmerge.engine.tiles import BLOCK_ELEMENTS
from rawmerge.methods.interface import (
    COLUMNS,
    ROWS,
    PlannedUpdate,
    PreparedUpdate,
    Scratch,
    Setting,
    TargetModule,
    TileContext,
    number,
)
from rawmerge.methods.lora import PreparedLora
from rawmerge.methods.movable import Movable
from rawmerge.methods.row_magnitude import PreparedMagnitude

if TYPE_CHECKING:
    import torch

KIND: Final = "dora"
COLUMN_KIND: Final = "dora_columns"
MAGNITUDE: Final = "magnitude"


class DoraMethod:
    """Rows scaled to their trained norms."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the norms are those of the rows at hand."""
        magnitude = tensors[MAGNITUDE].to(context.compute_dtype).flatten()
        return PreparedMagnitude(_pair(settings, tensors, context), magnitude, 0.0)


class DoraColumnsMethod:
    """Columns scaled to their trained norms."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the base is gone through once for the norms."""
        lora = _pair(settings, tensors, context)
        magnitude = tensors[MAGNITUDE].to(context.compute_dtype)
        return PreparedColumns(lora, magnitude / _column_norms(lora, context))


@dataclass(frozen=True, slots=True)
class PreparedColumns(Movable):
    """An update that adds a delta, and scales columns after it.

    Attributes:
        delta: adds the delta.
        factors: one for each column, (columns,), in compute dtype.
    """

    delta: PreparedLora
    factors: torch.Tensor

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Replace `tile` (rows, columns), in place."""
        self.delta.apply(tile, first_row, scratch)
        tile.mul_(self.factors)


class _OwnScratch:
    """Memory for the pass before the tiles, when there is no thread's yet."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def tensor(self, slot: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        buffer = self._buffers.get((slot, dtype))
        if buffer is None or buffer.numel() < shape[0] * shape[1]:
            buffer = self._buffers[slot, dtype] = torch.empty(shape[0] * shape[1], dtype=dtype)
        return buffer[: shape[0] * shape[1]].view(shape)


def _pair(settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext) -> PreparedLora:
    factors = sorted((role, tensor) for role, tensor in tensors.items() if role != MAGNITUDE)
    (_, lora_a), (_, lora_b) = factors
    return PreparedLora(
        lora_a=lora_a.to(context.compute_dtype),
        lora_b=lora_b.to(context.compute_dtype),
        scaling=number(settings, "scaling"),
        is_transposed=bool(settings["is_transposed"]),
        rounding_dtype=None,
    )


def _column_norms(lora: PreparedLora, context: TileContext) -> torch.Tensor:
    """Return the norm of each column of base and delta, (columns,), in compute dtype."""
    import torch

    scratch = _OwnScratch()
    total: torch.Tensor | None = None
    for first_row, rows in context.tiles():
        lora.apply(rows, first_row, scratch)
        squares = rows.mul_(rows)
        if total is None:
            total = torch.zeros(rows.shape[1], dtype=rows.dtype)
        for row in squares.unbind(0):  # one after the other, as torch's norm over a strided dimension adds them
            total += row
    assert total is not None
    # torch's float32 square root is not always the nearest one, but that in its norm is
    return total.double().sqrt().to(context.compute_dtype)


def plan_dora(module: TargetModule, roles: tuple[str, ...], settings: Mapping[str, Setting]) -> Iterator[PlannedUpdate]:
    """Yield the update of a module, given the roles and settings of its pair.

    Raises:
        MissingTensorError, ShapeMismatchError: there is no magnitude, or not one for each output.
    """
    own = {name: value for name, value in settings.items() if name != "rounds_delta"}
    shape, is_transposed = module.base_shape, bool(settings["is_transposed"])
    if len(shape) > 2:
        module.expect(MAGNITUDE, 1, shape[0], *(1 for _ in shape[2:]))
    else:
        module.expect(MAGNITUDE, shape[1] if is_transposed else shape[0])
    yield PlannedUpdate(
        COLUMN_KIND if is_transposed else KIND,
        (*roles, MAGNITUDE),
        own,
        reach=COLUMNS if is_transposed else ROWS,
        working_bytes=8 * BLOCK_ELEMENTS + 16 * shape[1] if is_transposed else 0,
    )
