"""A plain LoRA pair on the torch path whose left factor is too large to be held: each tile reads its own rows of it.

The products are those of `PreparedLora`, row for row, so the bits are the same; importing this imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rawmerge.inputs.tensor_source import TensorSource
from rawmerge.methods.interface import Scratch
from rawmerge.methods.lora import PreparedLora

#: Reads (first, count) of a stored matrix's rows, or of its columns, as a tensor of their own in their own dtype.
PartReader = Callable[[TensorSource, int, int, bool], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SlicedLora:
    """A LoRA pair in compute dtype, without its left factor; it stays on the CPU, where files are read.

    Attributes:
        pair: the pair; the left factor is an empty stand-in.
        source: where the left factor lies.
        read: reads a part of it.
    """

    pair: PreparedLora
    source: TensorSource
    read: PartReader

    def apply(self, tile: torch.Tensor, first_row: int, scratch: Scratch) -> None:
        """Add the delta's rows to `tile` (rows, columns), in place."""
        part = self.read(self.source, first_row, len(tile), self.pair.is_transposed).to(self.pair.lora_a.dtype)
        pair = replace(self.pair, lora_a=part) if self.pair.is_transposed else replace(self.pair, lora_b=part)
        pair.apply(tile, 0, scratch)
