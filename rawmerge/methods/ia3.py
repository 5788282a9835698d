"""IA3: W times a vector, of its inputs on feed-forward modules and of its outputs, bias included, on all others.

Source: PEFT 0.21.2 `tuners/ia3/layer.py`: `Linear.merge`, `_ConvNd.merge`; `tuners/ia3/model.py`
`_check_target_module_feedforward`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields
from rawmerge.methods.delta import PreparedChange, upcast
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    TargetModule,
    TileContext,
)

if TYPE_CHECKING:
    import torch


class RowScaleMethod:
    """Each row times its own number."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the one tensor holds a number for each row."""
        (scale,) = upcast(tensors, context).values()
        column = scale.reshape(-1, 1)
        return PreparedChange(lambda tile, first: tile * column[first : first + len(tile)])


class ColumnScaleMethod:
    """Each column, of a convolution each input channel, times its own number."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; the one tensor holds a number for each input of all groups, the base is grouped."""
        (scale,) = upcast(tensors, context).values()
        outputs, inputs = context.shape[:2]
        groups = scale.numel() // inputs
        by_group = scale.reshape(groups, 1, inputs, 1)

        def change(tile: torch.Tensor, first: int) -> torch.Tensor:
            group_of_row = [row * groups // outputs for row in range(first, first + len(tile))]
            factors = by_group[0] if groups == 1 else by_group[group_of_row, 0]
            return (tile.view(len(tile), inputs, -1) * factors).view(tile.shape)

        return PreparedChange(change)


class Ia3Kind(AdapterKind):
    """IA3, learned scales."""

    peft_type: ClassVar[str] = "IA3"
    title: ClassVar[str] = "IA3"
    formula: ClassVar[str] = "W * l, and the bias where l scales outputs"
    modules: ClassVar[str] = "Linear, Conv1D, Conv2d, Conv3d"
    parts: ClassVar[Mapping[str, str]] = {"ia3_l": "scale"}
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "feedforward_modules": Field(
                lambda value: isinstance(value, str | list) and all(isinstance(name, str) for name in value),
                "a pattern or a list of module names",
            )
        },
        ignored=("init_ia3_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"scale_rows": RowScaleMethod(), "scale_columns": ColumnScaleMethod()}

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the weight's update, and the bias's where outputs are scaled."""
        module.need("scale")
        if len(module.base_shape) > 2:
            yield from self._plan_convolution(module)
            return
        outputs, inputs = module.matrix_shape
        is_feedforward = module.shapes["scale"] == (1, inputs)
        if not is_feedforward:
            module.expect("scale", outputs, 1)
        is_by_column = is_feedforward != module.needs_transpose
        yield PlannedUpdate("scale_columns" if is_by_column else "scale_rows", ("scale",))
        if not is_feedforward and module.bias_shape is not None:
            yield PlannedUpdate("scale_rows", ("scale",), parameter="bias")

    def _plan_convolution(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        is_feedforward = _is_feedforward(module.values["feedforward_modules"], module.path)
        kernel = [1] * (len(module.base_shape) - 2)
        if not is_feedforward:
            module.expect("scale", 1, module.base_shape[0], *kernel)
            yield PlannedUpdate("scale_rows", ("scale",))
            if module.bias_shape is not None:
                yield PlannedUpdate("scale_rows", ("scale",), parameter="bias")
            return
        module.expect("scale", 1, -1, *kernel)
        outputs, inputs = module.base_shape[:2]
        channels = module.shapes["scale"][1]
        if channels % inputs or outputs % (channels // inputs):
            module.refuse("scale", f"a number for each of {inputs} input channels, or of whole groups", f"{channels}")
        yield PlannedUpdate("scale_columns", ("scale",))


def _is_feedforward(names: str | list[str] | None, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in names or ())
