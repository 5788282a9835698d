"""LoRA on nn.MultiheadAttention: a pair on its in_proj_weight, and one inside on out_proj, whose delta counts twice.

PEFT merges the output projection's delta once by the attention's own code and once by the projection's, in training's
forward pass, too. Between the two the weight has the base's dtype.

Source: PEFT 0.21.2 `tuners/lora/layer.py` `MultiheadAttention.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rawmerge.methods.interface import (
    MissingTensorError,
    Scratch,
    Setting,
    TargetModule,
    TileContext,
    UnmergeableError,
)
from rawmerge.methods.lora import LoraMethod, PreparedLora
from rawmerge.methods.movable import Movable

if TYPE_CHECKING:
    import torch

KIND: Final = "lora_twice"
OUT_PROJECTION: Final = ".out_proj"


class TwiceMethod:
    """A pair whose delta is added twice."""

    def prepare(
        self,
        settings: Mapping[str, Setting],
        tensors: Mapping[str, torch.Tensor],
        context: TileContext,
    ) -> PreparedTwice:
        """Return the update; without PEFT's roundings it is twice the delta."""
        lora = LoraMethod().prepare({**settings, "rounds_delta": False}, tensors, context)
        return PreparedTwice(lora, context.rounding_dtype)


@dataclass(frozen=True, slots=True)
class PreparedTwice(Movable):
    """A delta that is added twice.

    Attributes:
        delta: the pair, its delta not rounded.
        rounding_dtype: dtype to which the first delta and the sum with it are rounded, or None.
    """

    delta: PreparedLora
    rounding_dtype: torch.dtype | None

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add the delta's rows to `tile` (rows, columns), in place."""
        delta = scratch.tensor("twice", (tile.shape[0], tile.shape[1]), tile.dtype)
        self.delta.apply(delta.zero_(), first_row, scratch)
        if self.rounding_dtype is None:
            tile.add_(delta, alpha=2)
        else:
            tile.add_(delta.to(self.rounding_dtype))
            tile.copy_(tile.to(self.rounding_dtype)).add_(delta)


def check_attention(module: TargetModule) -> None:
    """Check that an output projection has its attention module's pair beside it, and that no bias gets lost.

    Raises:
        MissingTensorError: there is no pair on the in_proj_weight.
        UnmergeableError: a bias beside the pair on in_proj, which PEFT does not merge.
    """
    if module.is_inner:
        owner = module.path.removesuffix(OUT_PROJECTION)
        if all(peer.path != owner for peer in module.peers):
            raise MissingTensorError("lora_A of the attention module around it")
    elif "lora_b_bias" in module.shapes:
        raise UnmergeableError("no bias beside the pair of an in_proj_weight", "one", "PEFT trains and merges none")
