"""The dtype table against the two libraries that define it: safetensors and torch."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import pytest
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from rawmerge.dtypes import COMPUTE_DTYPES, DTYPES, OUTPUT_DTYPES, StorageDtype

deserialize: Any = safetensors.deserialize  # untyped

MERGEABLE = [dtype for dtype in DTYPES.values() if dtype.is_mergeable]


def file_of(code: str, element_count: int, data_bytes: int) -> bytes:
    fields = {"dtype": code, "shape": [element_count], "data_offsets": [0, data_bytes]}
    header = json.dumps({"a": fields}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


def test_the_codes_are_those_that_the_library_knows() -> None:
    with pytest.raises(SafetensorError, match="unknown variant `F7`") as caught:
        deserialize(file_of("F7", 0, 0))
    assert set(re.findall(r"`(\w+)`", str(caught.value))) - {"F7"} == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.code)
@pytest.mark.parametrize("element_count", [0, 4, 8])
def test_the_library_takes_just_that_many_bytes(dtype: StorageDtype, element_count: int) -> None:
    needed = dtype.byte_count(element_count)
    [(_, tensor)] = deserialize(file_of(dtype.code, element_count, needed))
    assert tensor["dtype"] == dtype.code
    with pytest.raises(SafetensorError, match="invalid shape, data type, or offset"):
        deserialize(file_of(dtype.code, element_count, needed + 1))


@pytest.mark.parametrize(("code", "element_count"), [("F4", 1), ("F4", 3), ("F6_E2M3", 2), ("F6_E3M2", 5)])
def test_elements_that_do_not_fill_bytes_have_no_byte_count(code: str, element_count: int) -> None:
    assert DTYPES[code].byte_count(element_count) == -1
    with pytest.raises(SafetensorError, match="does not end up at a byte boundary"):
        deserialize(file_of(code, element_count, 1))


def test_plain_floats_and_no_others_are_mergeable() -> None:
    assert {dtype.code for dtype in MERGEABLE} == {"F16", "BF16", "F32", "F64"}


@pytest.mark.parametrize("dtype", MERGEABLE, ids=lambda dtype: dtype.code)
def test_torch_names_are_what_the_library_stores_under_the_code(dtype: StorageDtype) -> None:
    tensor = torch.zeros(3, dtype=getattr(torch, dtype.torch_name))
    [(_, stored)] = deserialize(save({"a": tensor}))
    assert stored["dtype"] == dtype.code
    assert tensor.nbytes == dtype.byte_count(3)


def test_output_dtypes_are_named_as_torch_names_them() -> None:
    assert {name: DTYPES[code].torch_name for name, code in OUTPUT_DTYPES.items()} == {
        name: name for name in OUTPUT_DTYPES
    }


def test_compute_dtypes_are_floats_of_torch() -> None:
    assert all(getattr(torch, name).is_floating_point for name in COMPUTE_DTYPES)
