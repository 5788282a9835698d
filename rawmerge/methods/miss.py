"""MiSS, and Bone, its older name: one block repeated along the inputs; as Bat each output's block times W's.

Source: PEFT 0.21.2 `tuners/miss/layer.py` `MissLayer.update_layer` (shapes), `MissLinear.get_delta_weight` (Bat),
`get_delta_weight_miss`. All compute in float32 and round once. `init_weights` tells which of the three it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.formats.kind_fields import KindFields, one_of, whole_number
from rawmerge.methods.delta import PreparedChange, PreparedDelta, upcast
from rawmerge.methods.interface import (
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

_BAT: Final = "bat"
_MINI: Final = "mini"


class MissMethod:
    """The block, repeated along the inputs; a narrow one along the outputs too."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; `block` is (r, out), or (r, divisor of out)."""
        import torch

        block = upcast(tensors, context)["block"].T
        columns = torch.arange(context.shape[1]) % block.shape[1]
        return PreparedDelta(partial(_repeated, block, columns))


def _repeated(block: torch.Tensor, columns: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return rows of the block repeated along the outputs, its columns in the order that repeats them."""
    import torch

    return block[torch.arange(start, stop, device=block.device) % len(block)][:, columns]


class BatMethod:
    """W's blocks of r outputs by r inputs, times the block of their outputs, plus it."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; `block` is (out / r, r, r)."""
        block = upcast(tensors, context)["block"]
        return PreparedChange(partial(_with_bat_delta, block))


def _with_bat_delta(block: torch.Tensor, tile: torch.Tensor, first_row: int) -> torch.Tensor:
    """Return rows (rows, columns), which may begin or end inside a block, with their delta.

    Rows that a block lacks are filled with zeros, so that all products have PEFT's shape, and so its bits.
    """
    rank, columns = block.shape[-1], tile.shape[1]
    first, stop = first_row // rank, -(-(first_row + len(tile)) // rank)
    own = block[first:stop]
    start = first_row - first * rank
    whole = tile
    if start or len(tile) % rank:
        whole = tile.new_zeros(len(own) * rank, columns)
        whole[start : start + len(tile)] = tile
    blocks = whole.reshape(len(own), rank, columns // rank, rank).permute(2, 0, 1, 3)
    delta = blocks @ own + own
    return tile + delta.permute(1, 2, 0, 3).reshape(whole.shape)[start : start + len(tile)]


class MissKind(AdapterKind):
    """MISS, matrix shard sharing."""

    peft_type: ClassVar[str] = "MISS"
    title: ClassVar[str] = "MiSS"
    formula: ClassVar[str] = "W + D repeated; bat: W_ij + W_ij·D_i + D_i"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {"miss_block": "block"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(64, 1),
            "mini_r": whole_number(1, 1),
            "init_weights": one_of(True, False, _BAT, _MINI),
        },
        ignored=("miss_dropout",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"miss": MissMethod(), "miss_bat": BatMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (out, unknown); a narrow block does not tell it."""
        shape, form = shapes.get("block", ()), values.get("init_weights")
        if form == _BAT:
            return (shape[0] * shape[1], -1) if len(shape) == 3 else None
        return (shape[1], -1) if len(shape) == 2 and form != _MINI else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        (rows, columns), rank, form = module.matrix_shape, module.values["r"], module.values["init_weights"]
        if form == _BAT:
            module.expect("block", -1, rank, rank)
            if rows % rank or columns % rank:
                module.refuse("block", f"an r that divides {rows} and {columns}", f"r {rank}")
            module.expect("block", rows // rank, rank, rank)
            yield PlannedUpdate("miss_bat", ("block",), working_bytes=4 * rows * rank)
            return
        width = module.values["mini_r"] if form == _MINI else rows
        module.expect("block", rank, width)
        if rows % width or rank > columns:
            expected = f"r up to {columns} inputs, and a mini_r that divides {rows} outputs"
            module.refuse("block", expected, f"r {rank} and mini_r {width}")
        yield PlannedUpdate("miss", ("block",), working_bytes=4 * rank * width + 8 * columns)


class BoneKind(MissKind):
    """BONE, as PEFT called it up to 0.18."""

    peft_type: ClassVar[str] = "BONE"
    title: ClassVar[str] = "Bone"
    parts: ClassVar[Mapping[str, str]] = {"bone_block": "block"}
    fields: ClassVar[KindFields] = KindFields(
        followed={"r": whole_number(64, 1), "init_weights": one_of(True, False, _BAT)}
    )
