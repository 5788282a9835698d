"""BEFT: a vector added to the bias.

Source: PEFT 0.21.2 `tuners/beft/layer.py` `Linear.merge` (in float32, rounded once).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rawmerge.formats.kind_fields import KindFields
from rawmerge.methods.delta import upcast, whole_delta
from rawmerge.methods.interface import (
    AdapterKind,
    Method,
    PlannedUpdate,
    PreparedUpdate,
    Setting,
    Shape,
    TargetModule,
    TileContext,
    UnmergeableError,
)

if TYPE_CHECKING:
    import torch


class BeftMethod:
    """The vector, added."""

    def prepare(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  # a Method
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedUpdate:
        """Return the update; `bias` is (1, out)."""
        return whole_delta(upcast(tensors, context)["bias"].flatten())


class BeftKind(AdapterKind):
    """BEFT, biases alone."""

    peft_type: ClassVar[str] = "BEFT"
    title: ClassVar[str] = "BEFT"
    formula: ClassVar[str] = "bias + v"
    modules: ClassVar[str] = "Linear with bias"
    parts: ClassVar[Mapping[str, str]] = {"beft_bias": "bias"}
    fields: ClassVar[KindFields] = KindFields(ignored=("init_weights",))
    methods: ClassVar[Mapping[str, Method]] = {"beft": BeftMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, unknown)."""
        shape = shapes.get("bias", ())
        return (shape[1], -1) if len(shape) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the bias's update."""
        module.refuse_transposed()
        outputs = module.matrix_shape[0]
        module.expect("bias", 1, outputs)
        if module.bias_shape is None:
            hint = "PEFT does not merge it either; the trained model has a bias that the base cannot hold"
            raise UnmergeableError("a module with a bias, to which the vector is added", "one without", hint)
        if module.bias_shape != (outputs,):
            module.refuse("bias", f"a bias of {outputs} numbers", f"one of shape {list(module.bias_shape)}")
        yield PlannedUpdate("beft", ("bias",), parameter="bias", working_bytes=4 * outputs)
