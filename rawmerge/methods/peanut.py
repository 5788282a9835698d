"""PEANuT: W + s * net(W.T).T, a small network over the base's own weight.

Source: PEFT 0.21.2 `tuners/peanut/layer.py`: `Linear._compute_delta_weight` and `merge`; the activations are those of
transformers 5.24 `activations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

from rawmerge.formats.kind_fields import KindFields, finite_number, one_of, whole_number
from rawmerge.methods.delta import upcast
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

    _Activation: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

#: Names in transformers to names in `torch.nn.functional`; those with formulas of their own are in `_activation`.
_OF_TORCH: Final = {
    "relu": "relu",
    "gelu": "gelu",
    "hardswish": "hardswish",
    "leaky_relu": "leaky_relu",
    "mish": "mish",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_OWN: Final = ("gelu_pytorch_tanh", "linear", "quick_gelu", "relu2")
#: A network this deep has no use; it would only take memory.
_MOST_LAYERS: Final = 64


class PeanutMethod:
    """The delta of one module: the last layer's product is made for rows, all before it once."""

    def prepare(
        self, settings: Mapping[str, Setting], tensors: Mapping[str, torch.Tensor], context: TileContext
    ) -> PreparedUpdate:
        """Return the update; the network reads the base whole, for the bits of the sum over its rows."""
        own, activate = upcast(tensors, context), _activation(str(settings["activation"]))
        hidden = activate(context.whole().transpose(0, 1) @ own["a"].t())
        depth, kept = int(number(settings, "depth")), []
        for place in range(depth):
            kept.append(hidden)
            hidden = activate(hidden @ own[f"encoder.{place}"].t())
        for place in range(depth):
            hidden = activate(hidden @ own[f"decoder.{place}"].t()) + kept.pop()
        # the delta is (in, out) there, so that as a pair it is hidden @ b.T, transposed
        return PreparedLora(own["b"].t(), hidden, number(settings, "scaling"), True, context.rounding_dtype)


def _activation(name: str) -> _Activation:
    """Return transformers' activation of this name."""
    import torch
    from torch.nn import functional

    own: dict[str, _Activation] = {
        "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
        "linear": lambda hidden: hidden,
        "quick_gelu": lambda hidden: hidden * torch.sigmoid(1.702 * hidden),
        "relu2": lambda hidden: torch.square(functional.relu(hidden)),
    }
    return own[name] if name in own else getattr(functional, _OF_TORCH[name])


class PeanutKind(AdapterKind):
    """PEANUT, weight-aware networks."""

    peft_type: ClassVar[str] = "PEANUT"
    title: ClassVar[str] = "PEANuT"
    formula: ClassVar[str] = "W + s·net(Wᵀ)ᵀ"
    modules: ClassVar[str] = "Linear"
    parts: ClassVar[Mapping[str, str]] = {
        "peanut_A.weight": "a",
        "peanut_B.weight": "b",
        "peanut_encoders.*.weight": "encoder.*",
        "peanut_decoders.*.weight": "decoder.*",
    }
    fields: ClassVar[KindFields] = KindFields(
        followed={
            "r": whole_number(32, 1),
            "depth": whole_number(0, 0, _MOST_LAYERS),
            "act_fn": one_of(*_OF_TORCH, *_OWN),
            "scaling": finite_number(1.0),
        },
        ignored=("init_weights",),
    )
    methods: ClassVar[Mapping[str, Method]] = {"peanut": PeanutMethod()}

    def delta_shape(self, shapes: Mapping[str, Shape], values: Mapping[str, Any]) -> Shape | None:  # noqa: ARG002
        """Return (out, -1)."""
        left = shapes.get("b", ())
        return (left[0], -1) if len(left) == 2 else None

    def plan(self, module: TargetModule) -> Iterable[PlannedUpdate]:
        """Yield the one update."""
        module.refuse_transposed()
        rows, columns = matrix_of_linear(module)
        rank, depth = module.values["r"], module.values["depth"]
        module.expect("a", rank, rows)
        module.expect("b", rows, rank)
        layers = [f"{half}.{place}" for half in ("encoder", "decoder") for place in range(depth)]
        for role in layers:
            module.expect(role, rank, rank)
        settings = {
            "depth": depth,
            "activation": module.values["act_fn"],
            "scaling": module.values["scaling"],
        }
        # the base; all that the network keeps, and what a layer makes; its tensors
        hidden = columns * rank * (depth + 4)
        working = 4 * (2 * prod(module.base_shape) + hidden + 2 * rank * rows + 2 * depth * rank * rank)
        yield PlannedUpdate("peanut", ("a", "b", *layers), settings, reach=WHOLE, working_bytes=working)
