"""Stored tensors as torch's."""

from __future__ import annotations

import torch

from rawmerge.dtypes import DTYPES
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a storage dtype code that tensors are read in: plain floats and integers."""
    dtype = getattr(torch, DTYPES[code].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's memory; it must be contiguous and lie in the processor's."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_tensor(files: OpenFiles, source: TensorSource) -> torch.Tensor:
    """Return a stored tensor.

    Raises:
        InputChangedError: its file ended early; OSError: it cannot be read.
    """
    tensor = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
    files.read_into(source.path, source.offset, as_bytes(tensor))
    return tensor


def read_part(files: OpenFiles, source: TensorSource, first: int, count: int, is_columns: bool) -> torch.Tensor:
    """Return some rows of a stored matrix, or some of its columns, as a matrix of its own; errors as `read_tensor`."""
    if not is_columns:
        return read_tensor(files, source.rows(first, count))
    part = torch.empty(source.shape[0], count, dtype=torch_dtype(source.dtype))
    for number, row in enumerate(part):
        offset = source.offset + (number * source.shape[1] + first) * part.itemsize
        files.read_into(source.path, offset, as_bytes(row))
    return part
