"""IEEE 754 rounding with whole numbers and fractions alone: an oracle that shares no code with torch or numpy."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import torch


@dataclass(frozen=True)
class BinaryFormat:
    """A binary floating-point format.

    Attributes:
        exponent_bits: width of the exponent field.
        fraction_bits: width of the field after the leading one.
        torch_dtype: the torch dtype of the format.
    """

    exponent_bits: int
    fraction_bits: int
    torch_dtype: torch.dtype

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def _hidden_one(self) -> int:
        return 1 << self.fraction_bits

    def ulp(self, exponent: int) -> Fraction:
        """Return the distance of neighbours in [2**exponent, 2**(exponent + 1)), subnormals included."""
        return _power_of_two(max(exponent, 1 - self.bias) - self.fraction_bits)

    def decode(self, code: int) -> Fraction:
        """Return the value of a finite number's bits."""
        fraction = code % self._hidden_one
        exponent = (code >> self.fraction_bits) % (1 << self.exponent_bits)
        magnitude = fraction + (self._hidden_one if exponent else 0)
        sign = -1 if code >> (self.exponent_bits + self.fraction_bits) else 1
        return sign * magnitude * self.ulp(exponent - self.bias)

    def encode(self, value: Fraction) -> int:
        """Return the bits of the nearest number, of two equally near ones that with an even last bit."""
        exponent = max(_floor_log2(abs(value)), 1 - self.bias)
        ulp = self.ulp(exponent)
        steps, rest = divmod(abs(value), ulp)
        if rest * 2 > ulp or (rest * 2 == ulp and steps % 2 == 1):
            steps += 1
        # the leading one of a normal number counts as one more exponent; so does a carry out of the fraction
        code = ((exponent + self.bias - 1) << self.fraction_bits) + steps
        assert code < ((1 << self.exponent_bits) - 1) << self.fraction_bits, "overflow"
        return code + ((value < 0) << (self.exponent_bits + self.fraction_bits))

    def tensor(self, values: list[list[Fraction]]) -> torch.Tensor:
        """Return the nearest numbers as a matrix."""
        size = self.exponent_bits + self.fraction_bits + 1
        codes = [[self.encode(value) for value in row] for row in values]
        signed = [[code - 2**size if code >= 2 ** (size - 1) else code for code in row] for row in codes]
        return torch.tensor(signed, dtype={16: torch.int16, 32: torch.int32}[size]).view(self.torch_dtype)


FORMATS: Final = {
    "float32": BinaryFormat(8, 23, torch.float32),
    "bfloat16": BinaryFormat(8, 7, torch.bfloat16),
    "float16": BinaryFormat(5, 10, torch.float16),
}


def exact_values(matrix: torch.Tensor) -> list[list[Fraction]]:
    """Return a matrix of finite floats as fractions."""
    return [[Fraction(value) for value in row] for row in matrix.double().tolist()]


def exact_product(left: list[list[Fraction]], right: list[list[Fraction]]) -> list[list[Fraction]]:
    """Return the matrix product, without any rounding."""
    columns = list(zip(*right, strict=True))
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction()) for column in columns] for row in left]


def _power_of_two(exponent: int) -> Fraction:
    return Fraction(1 << max(exponent, 0), 1 << max(-exponent, 0))


def _floor_log2(size: Fraction) -> int:
    if size == 0:
        return -10_000
    guess = size.numerator.bit_length() - size.denominator.bit_length()
    return guess if _power_of_two(guess) <= size else guess - 1
