"""Writes a safetensors file of random weights tensor by tensor, so that its size never becomes memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

#: Elements drawn once and then repeated. A prime, so that rows of a tensor never line up with the repetition.
BLOCK_ELEMENTS: Final = 4_194_301

TORCH_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One tensor to be drawn from a normal distribution.

    Attributes:
        name: its name in the file.
        dtype: safetensors dtype code.
        shape: row-major.
        mean: of the distribution.
        std: standard deviation of the distribution.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        """Bytes on disk."""
        return self.element_count * TORCH_DTYPES[self.dtype].itemsize


class RandomBlock:
    """A block of normal noise from which every tensor reads cyclically, each from a place of its own.

    Drawing billions of normals would take minutes; what is timed later depends on no weight's value.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(BLOCK_ELEMENTS, generator=generator)
        self._scaled: dict[tuple[str, float, float], memoryview] = {}

    def pieces(self, tensor: RandomTensor) -> Iterator[memoryview]:
        """Yield the bytes of `tensor`, in order."""
        block = self._block_for(tensor)
        itemsize = TORCH_DTYPES[tensor.dtype].itemsize
        start = zlib.crc32(tensor.name.encode()) % BLOCK_ELEMENTS * itemsize
        remaining = tensor.byte_count
        while remaining:
            piece = block[start : start + remaining]
            yield piece
            remaining -= len(piece)
            start = 0

    def _block_for(self, tensor: RandomTensor) -> memoryview:
        key = (tensor.dtype, tensor.mean, tensor.std)
        if key not in self._scaled:
            scaled = (tensor.mean + tensor.std * self._noise).to(TORCH_DTYPES[tensor.dtype])
            self._scaled[key] = scaled.view(torch.uint8).numpy().data
        return self._scaled[key]


def header_bytes(tensors: Sequence[RandomTensor]) -> bytes:
    """Return the length prefix and JSON header for `tensors` lying one after the other.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.byte_count
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_random_shard(path: Path, tensors: Sequence[RandomTensor], block: RandomBlock) -> None:
    """Write `tensors` to `path`, sorted by name as the safetensors library sorts tensors of one dtype."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    with path.open("wb") as file:
        file.write(header_bytes(ordered))
        for tensor in ordered:
            for piece in block.pieces(tensor):
                file.write(piece)
