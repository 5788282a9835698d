"""IA3: W times a vector, of its inputs on feed-forward modules and of its outputs, bias included, on all others.

Source: PEFT 0.21.2 `tuners/ia3/layer.py`: `Linear.merge`, `_ConvNd.merge`; `tuners/ia3/model.py`
`_check_target_module_feedforward`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import Field, KindFields
from rawmerge.formats.patterns import MAX_CHARACTERS, MAX_REPEATS, compiled, fits_whole, may_explode
from rawmerge.methods.delta import PreparedChange, upcast
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
        return PreparedChange(partial(_with_rows_scaled, scale.reshape(-1, 1)))


def _with_rows_scaled(column: torch.Tensor, tile: torch.Tensor, first: int) -> torch.Tensor:
    return tile * column[first : first + len(tile)]


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
        return PreparedChange(partial(_with_columns_scaled, scale.reshape(groups, 1, inputs, 1), outputs))


def _with_columns_scaled(by_group: torch.Tensor, outputs: int, tile: torch.Tensor, first: int) -> torch.Tensor:
    """Return rows whose inputs are scaled by the numbers of the row's group, of which `by_group` has one for each."""
    groups, inputs = by_group.shape[0], by_group.shape[2]
    group_of_row = [row * groups // outputs for row in range(first, first + len(tile))] if groups > 1 else [0]
    return (tile.view(len(tile), inputs, -1) * by_group[group_of_row, 0]).view(tile.shape)


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
                lambda value: _is_names(value) if isinstance(value, list) else _is_pattern(value),
                f"a list of module names, or a pattern of at most {MAX_REPEATS} repeats, none of them of a group",
            )
        },
        ignored=("init_ia3_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"scale_rows": RowScaleMethod(), "scale_columns": ColumnScaleMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, -1) or (-1, in) of a linear layer; a convolution's vector does not tell which it is."""
        shape = shapes.get("scale", ())
        if len(shape) != 2 or (shape[0] == 1) == (shape[1] == 1):
            return None
        return (-1, shape[1]) if shape[0] == 1 else (shape[0], -1)

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the weight's update, and the bias's where outputs are scaled."""
        module.need("scale")
        if len(module.base_shape) < 2:
            module.refuse("scale", "a weight of two dimensions or more", f"{list(module.base_shape)}")
        is_convolution = len(module.base_shape) > 2
        is_feedforward = self._check_convolution(module) if is_convolution else self._check_linear(module)
        is_by_column = is_feedforward != module.needs_transpose
        yield PlannedUpdate("scale_columns" if is_by_column else "scale_rows", ("scale",))
        if is_feedforward or module.bias_shape is None:
            return
        if module.bias_shape != (module.shapes["scale"][1 if is_convolution else 0],):
            module.refuse("scale", f"a number for each of the bias's {list(module.bias_shape)}", "another count")
        yield PlannedUpdate("scale_rows", ("scale",), parameter="bias")

    def _check_linear(self, module: TargetModule) -> bool:
        """Return whether inputs are scaled: the shape tells it, also of a square weight."""
        outputs, inputs = module.matrix_shape
        stated = _stated_feedforward(module)
        is_feedforward = module.shapes["scale"] == (1, inputs) if stated is None else stated
        module.expect("scale", *((1, inputs) if is_feedforward else (outputs, 1)))
        return is_feedforward

    def _check_convolution(self, module: TargetModule) -> bool:
        """Return whether inputs are scaled: the config tells it, or else the number of channels."""
        kernel = [1] * (len(module.base_shape) - 2)
        outputs, inputs = module.base_shape[:2]
        module.expect("scale", 1, -1, *kernel)
        channels, stated = module.shapes["scale"][1], _stated_feedforward(module)
        if stated is None and channels == outputs == inputs:
            module.refuse("scale", "a config that states feedforward_modules, for shapes do not tell them", "none")
        if stated is False or (stated is None and channels == outputs):
            module.expect("scale", 1, outputs, *kernel)
            return False
        if channels % inputs or outputs % (channels // inputs):
            module.refuse("scale", f"a number for each of {inputs} input channels, or of whole groups", f"{channels}")
        return True


def _stated_feedforward(module: TargetModule) -> bool | None:
    """Return whether the config says that the module's inputs are scaled; None where it says nothing."""
    names = module.values["feedforward_modules"]
    if names is None:
        return None
    if isinstance(names, str):
        return fits_whole(names, module.path, "feedforward_modules")
    return any(module.path.endswith(name) for name in names)  # dot or not, as PEFT


def _is_names(value: list[Any]) -> bool:
    return all(isinstance(name, str) for name in value)


def _is_pattern(value: Any) -> bool:
    """Whether a value is a regular expression that takes no exponential time."""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        return False
    try:
        compiled(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return not may_explode(value)
