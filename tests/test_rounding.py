"""The one rounding, against rounding done in whole numbers and fractions."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.computing.rounding import (
    make_nans_canonical,
    may_overflow,
    newly_non_finite,
    round_into,
    round_through_odd,
)
from tests.strategies import SETTINGS


@dataclass(frozen=True)
class Format:
    """A binary floating-point format of IEEE 754 (bfloat16 is float32 with 16 bits less)."""

    dtype: torch.dtype
    precision: int
    exponent_bits: int

    @property
    def largest_exponent(self) -> int:
        return int(2 ** (self.exponent_bits - 1) - 1)

    def spacing(self, value: Fraction) -> Fraction:
        """Return the distance between neighbours of this format around `value`, subnormals included."""
        exponent = math.frexp(float(value))[1] - 1 if value else -10_000
        return Fraction(2) ** (max(exponent, 1 - self.largest_exponent) - self.precision + 1)

    def nearest(self, value: float) -> float:
        """Return the nearest number of this format, ties to even; beyond the range infinity."""
        if not math.isfinite(value) or value == 0:
            return value
        exact = Fraction(value)
        rounded = round(exact / self.spacing(exact)) * self.spacing(exact)  # round() of a Fraction: ties to even
        if abs(rounded) >= Fraction(2) ** (self.largest_exponent + 1):
            return math.copysign(math.inf, value)
        return math.copysign(float(rounded), value)


BF16, F16 = Format(torch.bfloat16, 8, 8), Format(torch.float16, 11, 5)
F32, F64 = Format(torch.float32, 24, 8), Format(torch.float64, 53, 11)
NARROW = pytest.mark.parametrize("target", [BF16, F16], ids=lambda target: str(target.dtype))
ALL = pytest.mark.parametrize("target", [BF16, F16, F32], ids=lambda target: str(target.dtype))


def rounded(values: list[float], source: torch.dtype, target: torch.dtype) -> list[float]:
    result = torch.empty(len(values), dtype=target)
    round_into(result, torch.tensor(values, dtype=source))
    return result.double().tolist()


def assert_same(found: list[float], expected: list[float]) -> None:
    """Compare values and the signs of zeros."""
    assert [(value, math.copysign(1, value)) for value in found] == [
        (value, math.copysign(1, value)) for value in expected
    ]


@st.composite
def near_ties(draw: st.DrawFn) -> float:
    """Draw a float64 at a tie of some narrower format, or a little beside it: where rounding twice goes wrong."""
    target = draw(st.sampled_from([BF16, F16, F32]))
    lowest = 2 - target.largest_exponent - target.precision
    exponent = draw(st.integers(lowest, 3) | st.just(lowest) | st.just(target.largest_exponent - target.precision + 1))
    odd_half = 2 * draw(st.integers(0, 2**target.precision)) + 1
    beside = draw(st.sampled_from([0, 0, 1, -1])) * Fraction(2) ** -draw(st.sampled_from([20, 25, 30, 40]))
    value = (odd_half + beside) * Fraction(2) ** (exponent - 1)
    return draw(st.sampled_from([1, -1])) * float(value)


any_double = near_ties() | st.floats(allow_nan=False) | st.floats(-70_000, 70_000)
any_single = st.floats(width=32, allow_nan=False) | near_ties().map(F32.nearest)


@ALL
@SETTINGS
@given(st.lists(any_double, min_size=1, max_size=20))
def test_doubles_are_rounded_once_to_nearest_ties_to_even(target: Format, values: list[float]) -> None:
    assert_same(rounded(values, torch.float64, target.dtype), [target.nearest(value) for value in values])


@ALL
@SETTINGS
@given(st.lists(any_single, min_size=1, max_size=20))
def test_singles_are_rounded_once_to_nearest_ties_to_even(target: Format, values: list[float]) -> None:
    assert_same(rounded(values, torch.float32, target.dtype), [target.nearest(value) for value in values])


@NARROW
@SETTINGS
@given(st.lists(any_single, min_size=1, max_size=40))
def test_singles_are_rounded_as_torch_casts_them(target: Format, values: list[float]) -> None:
    result = torch.empty(len(values), dtype=target.dtype)
    source = torch.tensor(values, dtype=torch.float32)
    round_into(result, source)
    assert torch.equal(result.view(torch.int16), source.to(target.dtype).view(torch.int16))


@NARROW
def test_every_tie_of_a_format_and_its_neighbours_are_rounded_right(target: Format) -> None:
    patterns = torch.arange(0x7F00 if target is BF16 else 0x7B00, dtype=torch.int16)
    low = patterns.view(target.dtype).double()
    ties = (low + (patterns + 1).view(target.dtype).double()) / 2
    for step, expected in ((-(2.0**-30), patterns), (2.0**-30, patterns + 1), (0, patterns + (patterns & 1))):
        result = torch.empty_like(patterns).view(target.dtype)
        round_into(result, ties + (ties - low) * step)
        assert torch.equal(result.view(torch.int16), expected)


@NARROW
@SETTINGS
@given(st.lists(any_double | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=20))
def test_the_way_for_devices_rounds_doubles_once_too(target: Format, values: list[float]) -> None:
    result = torch.empty(len(values), dtype=target.dtype)
    round_through_odd(result, torch.tensor(values, dtype=torch.float64))
    finite = [place for place, value in enumerate(values) if math.isfinite(value)]
    assert_same([result[place].item() for place in finite], [target.nearest(values[place]) for place in finite])
    assert [value.item() for value in result.isnan()] == [math.isnan(value) for value in values]
    assert all(found == math.inf for found, value in zip(result.tolist(), values, strict=True) if value == math.inf)


@NARROW
def test_every_tie_and_its_neighbours_are_rounded_alike_both_ways(target: Format) -> None:
    patterns = torch.arange(0x7F00 if target is BF16 else 0x7B00, dtype=torch.int16)
    low = patterns.view(target.dtype).double()
    ties = (low + (patterns + 1).view(target.dtype).double()) / 2
    for step in (-(2.0**-30), 2.0**-30, 0):
        values = torch.cat([sign * (ties + (ties - low) * step) for sign in (1, -1)])
        result, expected = (torch.empty(len(values), dtype=target.dtype) for _ in range(2))
        round_through_odd(result, values)
        round_into(expected, values)
        assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


@NARROW
def test_torch_alone_would_round_a_near_tie_twice(target: Format) -> None:
    # the reason for the detour; when torch casts in one step, it can go
    value = 1 + 2.0**-target.precision + 2.0**-40
    assert (
        rounded([value], torch.float64, target.dtype) == [target.nearest(value)] == [1 + 2.0 ** (1 - target.precision)]
    )
    assert torch.tensor([value], dtype=torch.float64).to(target.dtype).item() == 1


@ALL
@pytest.mark.parametrize("sign", [1, -1])
def test_the_border_of_the_range_is_where_ieee_has_it(target: Format, sign: int) -> None:
    largest = (2 - 2.0 ** (1 - target.precision)) * 2.0**target.largest_exponent
    border = (2 - 2.0**-target.precision) * 2.0**target.largest_exponent
    below = math.nextafter(border, 0)
    found = rounded([sign * largest, sign * below, sign * border], torch.float64, target.dtype)
    assert found == [sign * largest, sign * largest, sign * math.inf]


@ALL
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_too_small_becomes_a_zero_of_its_sign(target: Format, sign: float) -> None:
    smallest = 2.0 ** (2 - target.largest_exponent - target.precision)
    values = [sign * value for value in (0.0, 5e-324, smallest / 2, math.nextafter(smallest / 2, 1), smallest)]
    expected = [sign * value for value in (0.0, 0.0, 0.0, smallest, smallest)]
    assert_same(rounded(values, torch.float64, target.dtype), expected)


@ALL
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_infinities_stay_and_nans_stay_nans(target: Format, source: torch.dtype) -> None:
    found = rounded([math.inf, -math.inf, math.nan], source, target.dtype)
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounding_to_the_same_dtype_keeps_every_bit(dtype: torch.dtype) -> None:
    values = torch.tensor([0.1, -0.0, 5e-324, 1e-45, math.inf], dtype=dtype)
    result = torch.empty_like(values)
    round_into(result, values)
    assert torch.equal(result.view(torch.uint8), values.view(torch.uint8))


def test_rounding_leaves_its_input_alone_and_keeps_the_shape() -> None:
    values = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    before, result = values.clone(), torch.empty(3, 4, dtype=torch.bfloat16)
    round_into(result, values)
    assert torch.equal(values, before)
    assert result.view(-1).double().tolist() == [BF16.nearest(value) for value in before.view(-1).tolist()]


@ALL
@SETTINGS
@given(st.lists(any_double | st.just(math.nan), max_size=8))
def test_an_overflow_is_never_missed(target: Format, values: list[float]) -> None:
    found = may_overflow(torch.tensor(values, dtype=torch.float64), target.dtype)
    assert found or all(math.isfinite(target.nearest(value)) for value in values)


@ALL
@SETTINGS
@given(st.lists(any_single | st.just(math.nan), max_size=8))
def test_values_within_the_format_are_no_overflow(target: Format, values: list[float]) -> None:
    largest = torch.finfo(target.dtype).max
    found = may_overflow(torch.tensor(values, dtype=torch.float32), target.dtype)
    assert found == any(math.isnan(value) or abs(value) > largest for value in values)


@pytest.mark.parametrize(
    ("result", "before", "is_new"),
    [
        ([1.0, 2.0], [1.0, 2.0], False),
        ([math.inf, 2.0], [1.0, 2.0], True),
        ([1.0, math.nan], [1.0, 2.0], True),
        ([math.inf, math.nan], [-math.inf, math.nan], False),
        ([math.nan, math.inf], [math.inf, math.nan], False),
        ([1.0, 2.0], [math.inf, math.nan], False),
        ([math.inf, math.inf], [math.inf, 0.0], True),
        ([], [], False),
    ],
)
def test_only_what_was_finite_can_become_non_finite(result: list[float], before: list[float], is_new: bool) -> None:
    assert newly_non_finite(torch.tensor(result), torch.tensor(before)) is is_new


def canonical_nan(target: Format) -> bytes:
    if target is BF16:
        return struct.pack("<f", math.nan)[2:]
    return struct.pack({F16: "<e", F32: "<f", F64: "<d"}[target], math.nan)


@pytest.mark.parametrize("target", [BF16, F16, F32, F64], ids=lambda target: str(target.dtype))
@SETTINGS
@given(st.data())
def test_nans_get_the_bits_of_the_plain_quiet_nan_and_nothing_else_changes(target: Format, data: st.DataObject) -> None:
    size = target.dtype.itemsize
    infinity = ((1 << target.exponent_bits) - 1) << (target.precision - 1)
    sign = 1 << (8 * size - 1)
    patterns = st.integers(0, 2 * sign - 1) | st.integers(infinity - 2, infinity + 2) | st.just(sign + infinity + 1)
    bits = data.draw(st.lists(patterns, min_size=1, max_size=20))
    tensor = torch.frombuffer(bytearray(b"".join(value.to_bytes(size, "little") for value in bits)), dtype=target.dtype)
    make_nans_canonical(tensor)
    nan = int.from_bytes(canonical_nan(target), "little")
    expected = [nan if value % sign > infinity else value for value in bits]
    assert [
        int.from_bytes(value.numpy().tobytes(), "little") for value in tensor.view(torch.uint8).view(-1, size)
    ] == expected
