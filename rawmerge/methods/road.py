"""RoAD: W's outputs, rotated and scaled in pairs: the first half of each group with its second half; the bias too.

Source: PEFT 0.21.2 `tuners/road/layer.py` `_prepare_cols`, `_get_delta_weight` (R), `Linear.merge` (R is rounded to the
base's dtype and multiplied by W in it). A row of R has two numbers. Of 16-bit bases their products are exact in
float32, so only the sum rounds, whatever the order; of others the library decides which product it fuses with the sum,
by where it breaks the long sum over all outputs. So there R's rows are multiplied with their zeros, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from rawmerge.engine.tiles import ROW_BLOCK
from rawmerge.formats.kind_fields import Field, KindFields, one_of
from rawmerge.methods.delta import PreparedChange, upcast
from rawmerge.methods.interface import (
    ROWS,
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

if TYPE_CHECKING:
    import torch

#: Numbers of theta and of alpha for two outputs.
_SIZES: Final = {"road_1": 1, "road_2": 2, "road_4": 4}
#: Storage dtypes of which float32 holds all products.
_SHORT_DTYPES: Final = ("BF16", "F16")
#: So many elements of R are made at a time: 64 MiB of float32.
_DENSE_ELEMENTS: Final = 2**24
#: Up to this width tiles begin at multiples of `ROW_BLOCK` rows.
_WIDEST: Final = 2**16


@dataclass(frozen=True, slots=True)
class Rotation:
    """R, all but its zeros.

    Attributes:
        diagonal: (out,), what each output keeps of itself.
        crossing: (out,), what it gets of its partner.
        partner: (out,) int64, which output that is.
    """

    diagonal: torch.Tensor
    crossing: torch.Tensor
    partner: torch.Tensor

    def times(self, whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of R @ whole, by as few products as memory allows."""
        import torch

        height = max(ROW_BLOCK, _DENSE_ELEMENTS // len(whole) // ROW_BLOCK * ROW_BLOCK)
        parts = [(first, min(first + height, stop)) for first in range(start, stop, height)]
        return torch.cat([self.rows(first, last) @ whole for first, last in parts])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of R with their zeros, (stop - start, out)."""
        import torch

        dense = torch.zeros(stop - start, len(self.diagonal), dtype=self.diagonal.dtype)
        places = torch.arange(stop - start)
        dense[places, places + start] = self.diagonal[start:stop]
        dense[places, self.partner[start:stop]] = self.crossing[start:stop]
        return dense


class RoadMethod:
    """R times the weight or the bias."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; `theta` and `alpha` are (out / 2), (out) or (2 * out), as the variant has it."""
        own = upcast(tensors, context)
        group = int(number(settings, "group_size"))
        rotation = _rotation(own["theta"], own["alpha"], str(settings["variant"]), group, context)
        whole = context.whole() if settings["is_whole"] else None
        is_product = whole is not None and context.rounding_dtype == context.compute_dtype

        def change(tile: torch.Tensor, first: int) -> torch.Tensor:
            stop = first + len(tile)
            if whole is None:
                others = tile[rotation.partner[first:stop] - first]
            elif is_product:
                return rotation.times(whole, first, stop)
            else:
                others = whole[rotation.partner[first:stop]]
            return tile * rotation.diagonal[first:stop, None] + others * rotation.crossing[first:stop, None]

        return PreparedChange(change)


def _rotation(theta: torch.Tensor, alpha: torch.Tensor, variant: str, group: int, context: TileContext) -> Rotation:
    """Return R in compute dtype, its numbers rounded as PEFT rounds them."""
    import torch

    if variant == "road_1":  # both halves of a group have the same
        theta, alpha = (one.reshape(-1, 1, group // 2).repeat(1, 2, 1).flatten() for one in (theta, alpha))
    if variant == "road_4":
        (cosine, sine), (own, cross) = (one.reshape(-1, 2, group).unbind(1) for one in (theta, alpha))
        diagonal, crossing = (own * cosine.cos()).flatten(), (cross * sine.sin()).flatten()
    else:
        diagonal, crossing = alpha * theta.cos(), alpha * theta.sin()
    halves = torch.arange(len(diagonal)).reshape(-1, 2, group // 2)
    signs = torch.tensor([-1.0, 1.0], dtype=crossing.dtype)[:, None]
    crossing = (crossing.reshape(halves.shape) * signs).flatten()
    dtype = context.rounding_dtype or context.compute_dtype
    diagonal, crossing = (one.to(dtype).to(context.compute_dtype) for one in (diagonal, crossing))
    return Rotation(diagonal, crossing, halves.flip(1).flatten())


class RoadKind(AdapterKind):
    """ROAD, rotations in pairs."""

    peft_type: ClassVar[str] = "ROAD"
    title: ClassVar[str] = "RoAD"
    formula: ClassVar[str] = "R·W and R·bias, R rotates and scales pairs of outputs"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {"road_theta": "theta", "road_alpha": "alpha"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "variant": one_of("road_1", "road_2", "road_4"),
            "group_size": Field(
                lambda value: type(value) is int and 0 < value < 2**31 and value % 2 == 0,
                "an even positive whole number",
                64,
            ),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"road": RoadMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:
        """Return (out, unknown)."""
        shape, size = shapes.get("theta", ()), _SIZES[values["variant"]]
        return (shape[0] * 2 // size, -1) if len(shape) == 1 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the weight's update and the bias's; the weight must be in memory whole where tiles cut groups."""
        module.refuse_transposed()
        (rows, columns), group, variant = module.matrix_shape, module.values["group_size"], module.values["variant"]
        if rows % group:
            module.refuse("theta", f"a group_size that divides {rows} outputs", f"group_size {group}")
        for role in ("theta", "alpha"):
            module.expect(role, rows * _SIZES[variant] // 2)
        settings: dict[str, Setting] = {"variant": variant, "group_size": group}
        roles, own = ("theta", "alpha"), 64 * rows
        is_local = module.base_dtype in _SHORT_DTYPES and ROW_BLOCK % group == 0 and columns <= _WIDEST
        dense = min(rows * rows, max(_DENSE_ELEMENTS, ROW_BLOCK * rows))
        working = own if is_local else own + 4 * (rows * columns + dense)
        reach = ROWS if is_local else WHOLE
        yield PlannedUpdate("road", roles, {**settings, "is_whole": not is_local}, "weight", reach, working)
        if module.bias_shape is not None:
            if module.bias_shape != (rows,):
                module.refuse("theta", f"a bias of {rows} numbers", f"one of shape {list(module.bias_shape)}")
            yield PlannedUpdate("road", roles, {**settings, "is_whole": False}, "bias", ROWS, own)
