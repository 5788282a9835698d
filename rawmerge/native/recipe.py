"""What the bits of a plain LoRA pair depend on besides the values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the bits of a plain pair depend on besides the values.

    Attributes:
        rows, columns: of the delta as the base is stored; rank: of the pair.
        is_transposed: the product is made transposed, (columns, rank) @ (rank, rows).
        is_double: summed in float64.
        stored, result: storage dtype codes of the base and of the output.
        rounds_delta: the scaled product is rounded to the result's dtype before it is added.
    """

    rows: int
    columns: int
    rank: int
    is_transposed: bool
    is_double: bool
    stored: str
    result: str
    rounds_delta: bool
