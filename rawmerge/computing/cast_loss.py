"""What a cast takes from a tensor: how many of its elements the output's dtype does not hold, and how far they moved.

Counted of tensors that a merge leaves alone but for their dtype, and of those that the adapter gives in another dtype:
each element, none by sample. Of tensors with updates nothing is counted here: a sum of base and delta is rounded nearly
everywhere in any dtype, and `rawmerge.computing.survival` tells what this leaves of the delta. Overflow is no loss: it
ends the merge.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

#: Bits of the significand, with the hidden one, and of the exponent. Source: IEEE 754; bfloat16 is a float32 without
#: the last 16 bits.
_BITS: Final = {"F16": (11, 5), "BF16": (8, 8), "F32": (24, 8), "F64": (53, 11)}


def significand_bits(code: str) -> int:
    """Return the bits of a float dtype's significand, the hidden one included; `code` is safetensors'."""
    return _BITS[code][0]


def may_lose(source: str, target: str) -> bool:
    """Whether the float dtype `target` lacks some finite values of `source`; both are codes of safetensors."""
    (precision, exponent), (wide_precision, wide_exponent) = _BITS[source], _BITS[target]
    return precision > wide_precision or exponent > wide_exponent


@dataclass(frozen=True, slots=True)
class CastLoss:
    """What a cast took from one tensor, or from some of its rows.

    Attributes:
        dtype: what the tensor is stored as, a code of safetensors.
        elements: how many it has.
        rounded: those that are stored as another value; infinities and NaN, which stay what they are, are none.
        zeroed: of them, those that became 0.
        subnormal: of them, those that are stored below the smallest normal number, with fewer bits, and are not 0.
        largest: the largest distance from a value, in units of the value, of those that did not become 0: at most 1.
    """

    dtype: str
    elements: int
    rounded: int = 0
    zeroed: int = 0
    subnormal: int = 0
    largest: float = 0.0

    def __add__(self, other: CastLoss) -> CastLoss:
        """Return the loss of both together, of the same dtype."""
        return CastLoss(
            self.dtype,
            self.elements + other.elements,
            self.rounded + other.rounded,
            self.zeroed + other.zeroed,
            self.subnormal + other.subnormal,
            max(self.largest, other.largest),
        )


class CastTally:
    """What the cast of one tensor takes while its tiles are in work; any number of threads.

    Numbers are added up and the largest is kept, so that neither the order of tiles nor their height changes anything.

    Attributes:
        dtype: what the tensor is cast to.
    """

    def __init__(self, dtype: str, rows: int) -> None:
        """Begin with none of the rows of the matrix view."""
        self.dtype = dtype
        self._rows_left = rows
        self._loss = CastLoss(dtype, 0)
        self._lock = threading.Lock()

    def add(self, loss: CastLoss) -> None:
        """Count what the cast took from elements that are seen once."""
        with self._lock:
            self._loss += loss

    def finish(self, row_count: int) -> CastLoss | None:
        """Count rows whose tiles are done; return the loss of the whole tensor with the last."""
        with self._lock:
            self._rows_left -= row_count
            return None if self._rows_left else self._loss
