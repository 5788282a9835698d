"""The bias that `lora_bias` trains beside lora_b: b + scaling * bias.

Source: PEFT 0.21.2 `tuners/lora/layer.py`: `Linear.merge` and `_ConvNd.merge`. The product is not rounded before it is
added; the caller rounds once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rawmerge.methods.interface import (
    ModuleFacts,
    Scratch,
    Setting,
    Shape,
    ShapeMismatchError,
    TileContext,
    number,
)
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

KIND: Final = "lora_bias"


class LoraBiasMethod:
    """The `lora_B.bias` of a linear or convolution module, added to the module's own bias."""

    def settings(self, shapes: Mapping[str, Shape], facts: ModuleFacts) -> Mapping[str, Setting]:
        """Return `scaling`.

        Shapes: one tensor of any role, (out,); base (out,), the module's bias. `facts.rank` is not used.
        """
        ((role, shape),) = shapes.items()
        if len(shape) != 1 or shape != facts.base_shape:
            hint = "is this the base the adapter was trained on?"
            expected = f"a vector of the base bias's shape {list(facts.base_shape)}"
            raise ShapeMismatchError(role, expected, f"shape {list(shape)}", hint)
        return {"scaling": facts.scaling}

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedBias:
        """Return the scaled bias in compute dtype, exactly upcast from its storage dtype before it is scaled."""
        (bias,) = tensors.values()
        return PreparedBias(bias.to(context.compute_dtype)[:, None] * number(settings, "scaling"))


@dataclass(frozen=True, slots=True)
class PreparedBias(Movable):
    """A scaled bias: `delta` (out, 1) in compute dtype."""

    delta: torch.Tensor

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:  # noqa: ARG002  # a PreparedUpdate
        """Add the delta's rows to `tile` (rows, 1), in place."""
        tile.add_(self.delta[first_row : first_row + tile.shape[0]])
