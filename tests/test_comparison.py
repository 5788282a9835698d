"""Equality of tensors on disk: bit for bit after one rounding, whatever the dtypes and sizes."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rawmerge.computing.rounding import round_into
from rawmerge.errors import InputChangedError
from rawmerge.inputs import comparison
from rawmerge.inputs.comparison import same_transposed, same_values, sample_rows_equal
from rawmerge.inputs.tensor_source import TensorSource, read_shard_file
from tests.parity.exact_rounding import FORMATS
from tests.strategies import SETTINGS

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(folder: Path, **tensors: torch.Tensor) -> list[TensorSource]:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "t.safetensors")
    found = dict(read_shard_file(folder / "t.safetensors").sources())
    return [found[name] for name in tensors]


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the values in `dtype`, by torch, which goes from float64 to two bytes in two steps; that one is exact."""
    result = torch.empty(values.shape, dtype=DTYPES[dtype])
    if values.dtype == torch.float64:
        round_into(result, values)
        return result
    return values.to(DTYPES[dtype])


def values_of(dtype: str, count: int = 4096) -> torch.Tensor:
    """Return values of every size that the dtypes have, and those that are half-way between two of a smaller one."""
    torch.manual_seed(7)
    wide = torch.randn(count, dtype=torch.float64) * torch.logspace(-46, 38, count, base=10.0, dtype=torch.float64)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-24, 65519.99, 65520.0])
    near = ties.double() + torch.tensor([0, 2.0**-40, -(2.0**-40)], dtype=torch.float64)[:, None]
    edges = torch.tensor([0.0, torch.inf, 3.4e38, 3.4028235677973366e38, 1e300, 1e-320], dtype=torch.float64)
    both = torch.cat([wide, near.flatten(), edges])
    return torch.cat([both, -both]).to(DTYPES[dtype])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_values_equal_their_own_rounding_and_no_neighbour_of_it(source: str, target: str, tmp_path: Path) -> None:
    values = values_of(source)
    nearest = rounded(values, target)
    bits = nearest.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[nearest.element_size()])
    a, b, other = write(tmp_path, a=values, b=nearest, other=(bits ^ 1).view(nearest.dtype))
    assert same_values(a, b, target)
    assert same_values(b, a, target)
    assert sample_rows_equal(a, b, 300, target) == 1
    assert not same_values(a, other, target)
    assert sample_rows_equal(a, other, 300, target) == 0


@SETTINGS
@given(
    st.lists(st.floats(-3e38, 3e38, allow_nan=False), min_size=1, max_size=8),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_float64_is_rounded_once(tmp_path: Path, numbers: list[float], name: str) -> None:
    kept = [number for number in numbers if name != "float16" or abs(number) < 65504] or [1.0]
    codes = FORMATS[name].tensor([[Fraction(number) for number in kept]])
    signed = codes.abs().copysign(torch.tensor([kept], dtype=torch.float64).to(codes.dtype))  # of -0.0 and underflow
    a, b = write(tmp_path, a=torch.tensor([kept], dtype=torch.float64), b=signed)
    assert same_values(a, b, {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name])


def test_what_differs_only_below_the_rounding_is_equal_in_it_alone(tmp_path: Path) -> None:
    a, b = write(tmp_path, a=torch.tensor([1.0, 2.0]), b=torch.tensor([1.0, 2.0 + 2**-20]))
    assert same_values(a, b, "BF16")
    assert not same_values(a, b, "F32")


def test_shapes_are_part_of_the_values(tmp_path: Path) -> None:
    a, b = write(tmp_path, a=torch.zeros(2, 3), b=torch.zeros(3, 2))
    assert not same_values(a, b, "F32")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_is_no_plain_float_is_compared_by_its_bytes(dtype: Any, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    a, b, c, d = write(tmp_path, a=tensor, b=tensor.clone(), c=tensor.roll(1), d=tensor.float())
    assert same_values(a, b, "BF16")
    assert not same_values(a, c, "BF16")
    assert not same_values(a, d, "BF16")


def test_empty_tensors_are_equal_and_have_no_rows(tmp_path: Path) -> None:
    a, b, c = write(tmp_path, a=torch.zeros(0, 3), b=torch.zeros(0, 3).bfloat16(), c=torch.zeros(3, 0))
    assert same_values(a, b, "BF16")
    assert same_transposed(a, c)
    assert sample_rows_equal(a, b, 5, "BF16") == 0
    assert sample_rows_equal(c, c, 5, "BF16") == 0


def test_a_last_element_behind_many_chunks_counts(tmp_path: Path) -> None:
    values = torch.arange(3 * comparison.CHUNK_ELEMENTS + 5).float()
    other = values.double()
    other[-1] += 1
    a, b, c = write(tmp_path, a=values, b=values.double(), c=other)
    assert same_values(a, b, "F32")
    assert not same_values(a, c, "F32")


def test_large_tensors_are_compared_in_little_memory(tmp_path: Path) -> None:
    values = torch.ones(16 * 2**20)
    a, b = write(tmp_path, a=values, b=values.bfloat16())
    assert same_values(a, b, "F32")  # numpy is imported by now
    tracemalloc.start()
    assert same_values(a, b, "F32")
    assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    tracemalloc.stop()


# Sampled rows


def test_the_share_of_equal_rows_is_that_of_the_common_ones(tmp_path: Path) -> None:
    base = torch.randn(101, 8)
    grown = torch.cat([base, torch.randn(9, 8)])
    grown[:50] += 1
    a, b = write(tmp_path, a=base, b=grown)
    assert sample_rows_equal(a, b, 200, "F32") == sample_rows_equal(b, a, 200, "F32") == 51 / 101
    assert sample_rows_equal(a, b, 3, "F32") == 2 / 3  # rows 0, 50 and 100
    assert sample_rows_equal(a, b, 1, "F32") == 0


def test_rows_of_two_dtypes_are_compared_as_the_output_holds_them(tmp_path: Path) -> None:
    base = torch.randn(20, 8)
    a, b = write(tmp_path, a=base, b=base.bfloat16())
    assert sample_rows_equal(a, b, 7, "BF16") == 1
    assert sample_rows_equal(a, b, 7, "F32") == 0


@pytest.mark.parametrize(
    ("a", "b", "rows"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), 3),
        (torch.ones(3, 4), torch.ones(12), 3),
        (torch.tensor(1.0), torch.tensor(1.0), 3),
        (torch.ones(3, 4), torch.ones(3, 4), 0),
        (torch.ones(3, 4), torch.ones(3, 4), -1),
    ],
)
def test_rows_that_cannot_be_compared_agree_in_none(a: Any, b: Any, rows: int, tmp_path: Path) -> None:
    first, second = write(tmp_path, a=a, b=b)
    assert sample_rows_equal(first, second, rows, "F32") == 0


# Transposes


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_a_transpose_is_recognised_across_dtypes(first: str, second: str, tmp_path: Path) -> None:
    matrix = torch.arange(1000 * 7).remainder(251).view(1000, 7)  # exact in all dtypes
    wrong = matrix.clone()
    wrong[999, 6] += 1
    a, b, c = write(
        tmp_path,
        a=matrix.to(DTYPES[first]),
        b=matrix.T.contiguous().to(DTYPES[second]),
        c=wrong.T.contiguous().to(DTYPES[second]),
    )
    assert same_transposed(a, b)
    assert not same_transposed(a, c)


def test_the_narrower_of_two_is_not_rounded_to(tmp_path: Path) -> None:
    a, b = write(tmp_path, a=torch.tensor([[1 + 2**-20]]), b=torch.tensor([[1.0]]).bfloat16())
    assert not same_transposed(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(3, 4), torch.ones(3, 4)),
        (torch.ones(4), torch.ones(4)),
        (torch.ones(2, 2, 2), torch.ones(2, 2, 2)),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(4, 3, dtype=torch.int32)),
    ],
    ids=str,
)
def test_what_is_no_matrix_of_that_shape_is_no_transpose(a: Any, b: Any, tmp_path: Path) -> None:
    assert not same_transposed(*write(tmp_path, a=a, b=b))


def test_matrices_beyond_the_bound_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path, a=torch.ones(3, 4), b=torch.ones(4, 3))
    monkeypatch.setattr(comparison, "MAX_TRANSPOSED_BYTES", 96)
    assert same_transposed(a, b)
    monkeypatch.setattr(comparison, "MAX_TRANSPOSED_BYTES", 95)
    (tmp_path / "t.safetensors").unlink()
    assert not same_transposed(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_that_ends_early_is_no_difference(dtype: Any, tmp_path: Path) -> None:
    a, b = write(tmp_path, a=torch.ones(300, 300), b=torch.ones(300, 300, dtype=dtype))
    path = tmp_path / "t.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputChangedError):
        same_values(a, b, "BF16")
