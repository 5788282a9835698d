"""Sums over differences, beside exact arithmetic on fractions."""

from __future__ import annotations

import threading
from fractions import Fraction
from math import inf, isfinite, nan
from typing import Any

import pytest
import torch

from rawmerge.verifying.piece_sums import PIECE_ELEMENTS, PieceSummer, PieceSummers, PieceSums
from rawmerge.verifying.tensor_tally import TensorTally

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def unit(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Return the unit in the last place of a magnitude, by its definition."""
    facts = torch.finfo(dtype)
    smallest = Fraction(facts.tiny)
    power = Fraction(2) ** (value.numerator.bit_length() - value.denominator.bit_length())
    power = power / 2 if power > value else power  # at most the magnitude, and more than half of it
    return (max(power, smallest) if value else smallest) * Fraction(facts.eps)


def exact(expected: torch.Tensor, found: torch.Tensor, base: torch.Tensor) -> dict[str, Any]:
    """Return the sums over finite values, one element after another."""
    sums: dict[str, Any] = {"ulps": Fraction(0), "products": [Fraction(0)] * 4, "counts": [0, 0, 0], "differing": 0}
    for e, f, b in zip(*(map(Fraction, at.double().tolist()) for at in (expected, found, base)), strict=True):
        place = unit(max(abs(e), abs(b)), expected.dtype)
        sums["ulps"] = max(sums["ulps"], abs(f - e) / place)
        terms = ((e - b) ** 2, (e - b) * (f - b), (f - e) ** 2, place**2)
        sums["products"] = [total + term for total, term in zip(sums["products"], terms, strict=True)]
        direction = (e - b) * (f - e)
        sums["counts"][0] += direction > 0
        sums["counts"][1] += direction < 0
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    differs = expected.view(bits) != found.view(bits)
    sums["differing"] = int(differs.sum())
    sums["counts"][2] = int((differs & (found.double() == base.double())).sum())
    return sums


def values(dtype: torch.dtype, seed: int, spread: float) -> torch.Tensor:
    """Return values over so many powers of ten, some of them subnormal, zero, or zero of the other sign.

    Those of float64 are not subnormal: products of their differences are zero in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(400, generator=generator, dtype=torch.float64)
    drawn = signs * 10.0 ** (-spread * torch.rand(400, generator=generator, dtype=torch.float64))
    drawn[:8] = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0, 2.0, 0.5])
    drawn[8:20] = drawn[8:20] * torch.finfo(dtype if dtype != torch.float64 else torch.float32).tiny
    return drawn.to(dtype)


@pytest.mark.parametrize("spread", [1.0, 12.0])
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_exact_arithmetic(dtype: str, base_dtype: str, spread: float) -> None:
    base = values(DTYPES[base_dtype], 1, spread)
    change = values(torch.float64, 2, spread) / 8
    expected = (base.double() + change).to(DTYPES[dtype])
    found = (base.double() + change * 0.75).to(DTYPES[dtype])
    found[::7], found[3::7] = expected[::7], base[3::7].to(DTYPES[dtype])
    found[1] = -found[1]
    sums = PieceSummer().sum(memory(expected), memory(found), dtype, memory(base), base_dtype)
    true = exact(expected, found, base)
    assert sums.differing == true["differing"]
    assert sums.max_ulps == pytest.approx(float(true["ulps"]), rel=1e-6)
    assert sums.products == pytest.approx([float(term) for term in true["products"]], rel=1e-6)
    assert list(sums.counts) == true["counts"]
    assert not sums.equals_base


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_infinitely_far_and_equal_ones_are_not(dtype: str) -> None:
    expected = torch.tensor([inf, -inf, nan, 1.0, 2.0], dtype=DTYPES[dtype])
    summer = PieceSummer()
    same = summer.sum(memory(expected), memory(expected), dtype, None, dtype)
    assert (same.differing, same.max_ulps) == (0, 0.0)
    found = expected.clone()
    found[4] = 1.0
    beside = summer.sum(memory(expected), memory(found), dtype, memory(expected), dtype)
    assert (beside.differing, beside.max_ulps) == (1, 0.5 / torch.finfo(DTYPES[dtype]).eps)
    for wrong in (inf, nan):
        found[3] = wrong
        assert summer.sum(memory(expected), memory(found), dtype, None, dtype).max_ulps == inf


def test_a_difference_beyond_float32_is_measured() -> None:
    large = torch.tensor([3e38, -3e38], dtype=torch.bfloat16)
    sums = PieceSummer().sum(memory(large), memory(-large), "BF16", memory(large), "BF16")
    true = exact(large, -large, large)
    assert isfinite(sums.max_ulps)
    assert sums.max_ulps == float(true["ulps"])
    assert sums.products == pytest.approx([float(term) for term in true["products"]])


def test_a_piece_says_whether_it_is_the_base() -> None:
    base = values(torch.bfloat16, 3, 1.0)
    expected = base + 1
    bare = PieceSummer().sum(memory(expected), memory(base), "BF16", memory(base), "BF16")
    assert (bare.equals_base, bare.counts[2], bare.differing) == (True, len(base), len(base))
    assert bare.products[1] == 0


def test_threads_that_share_summers_count_what_one_would() -> None:
    count = PIECE_ELEMENTS * 3 + 5
    base = (torch.arange(count) % 251).to(torch.bfloat16)
    expected, found = base + 2, base + 1
    wanted, there, before = (memory(at) for at in (expected, found, base))

    def tally(threads: int) -> Any:
        made = TensorTally("t", "BF16", 6 * count, is_updated=True, summers=PieceSummers(2))

        def run() -> None:
            for _ in range(6 // threads):
                made.add(wanted, there, before, "BF16")

        started = [threading.Thread(target=run) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return made.difference()

    alone = tally(1)
    assert alone.differing == 6 * count
    assert alone == tally(3) == tally(6)


def test_no_element_is_a_sum_of_nothing() -> None:
    nothing = memoryview(b"")
    assert PieceSummer().sum(nothing, nothing, "F32", None, "F32") == PieceSums(0, 0.0)
