"""Random numbers that an adapter does not hold: drawn anew from its seed, as PEFT draws them, and their sizes.

Torch does not promise that its generator stays the same; tests hold the streams to literal values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rawmerge.formats.kind_fields import Field, whole_number
from rawmerge.methods.interface import Peer, TargetModule

if TYPE_CHECKING:
    import torch


def seed_field(default: int) -> Field:
    """Return a config field that is a seed of torch's generator."""
    return whole_number(default, 0, 2**64 - 1)


def generator_of(seed: int) -> torch.Generator:
    """Return torch's CPU generator, seeded."""
    import torch

    return torch.Generator(device="cpu").manual_seed(seed)


def kaiming_uniform(
    shape: Sequence[int], fan_in: int, slope: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Return a tensor of He's uniform initialisation, drawn in `dtype`, as `torch.nn.init.kaiming_uniform_` does.

    Args:
        shape: its shape.
        fan_in: how many inputs each output has.
        slope: negative slope of the leaky rectifier that it is made for, `a` in torch.
        dtype: what it is drawn in; streams of different dtypes differ.
        generator: where the numbers come from.
    """
    import torch

    deviation = math.sqrt(2.0 / (1 + slope**2)) / math.sqrt(fan_in)
    bound = math.sqrt(3.0) * deviation  # in this order: each step rounds
    return torch.empty(*shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


# the few sizes of a layer's weights take turns; an entry is no more than twice the stored coefficients
@lru_cache(maxsize=4)
def first_positions(count: int, size: int, seed: int) -> torch.Tensor:
    """Return the first `count` of the shuffled numbers below `size`: (count), int64.

    `torch.randperm` draws the same numbers in int32 as in int64, which takes half the memory.
    """
    import torch

    dtype = torch.int32 if size < 2**31 else torch.int64
    return torch.randperm(size, generator=generator_of(seed), dtype=dtype)[:count].to(torch.int64, copy=True)


def matrix_of_linear(module: TargetModule) -> tuple[int, int]:
    """Return (out, in) of a weight, which must be a matrix, for a kind that PEFT does not train on convolutions.

    Raises:
        ShapeMismatchError: it is none, or nothing tells how it is stored.
    """
    if len(module.base_shape) != 2:
        module.refuse(
            next(iter([*module.shapes, *module.shared])),
            "a base weight of 2 dimensions",
            f"shape {list(module.base_shape)}",
        )
    return module.matrix_shape


def largest_shape(module: TargetModule) -> tuple[int, int]:
    """Return the largest out and the largest in of all modules of the adapter; they need not be of one module."""
    return _largest_shape(_Peers(module.peers))


class _Peers:
    """The same list is the same key; every module of a plan has it."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self.peers = peers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Peers) and self.peers is other.peers

    def __hash__(self) -> int:
        return id(self.peers)


@lru_cache(maxsize=1)
def _largest_shape(key: _Peers) -> tuple[int, int]:
    shapes = [peer.matrix_shape for peer in key.peers]
    return max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
